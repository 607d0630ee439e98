"""The options of the steps that measure."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Self

from pydantic import Field, model_validator

from gulliver.core.errors import MissingExtra
from gulliver.core.options import MaxRam, Options
from gulliver.core.store.files import named_path


class QualityOptions(Options):
    """Options of `quality`. What is left out takes the task's own default."""

    share: float = Field(1.0, gt=0, le=1, description="share of the usual windows or examples to score")
    family: dict[str, Any] = Field(default_factory=dict, description="options of the model's family")
    max_ram_bytes: MaxRam = None


class HarnessOptions(Options):
    """Options of `harness`."""

    tasks: tuple[str, ...] = Field(..., min_length=1, description="names of tasks, such as arc_easy and hellaswag")
    limit: int | None = Field(None, ge=1, description="most items of each task (default: all)")
    include_path: str | None = Field(None, description="a folder with tasks of your own (YAML, with their Python code)")

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        """MissingExtra, before a model is looked for, when lm-eval is not installed."""
        if find_spec("lm_eval") is None:
            raise MissingExtra("measuring lm-eval's tasks", "eval")
        if self.include_path is not None and not named_path(self.include_path).is_dir():
            told = "give a folder that holds tasks of your own (YAML files)"
            raise ValueError(f"include_path is {self.include_path!r}; {told}")
        return self


class SpeedOptions(Options):
    """Options of `speed`."""

    repeats: int = Field(5, ge=2, le=1000, description="measured runs of every workload, after one unmeasured")
