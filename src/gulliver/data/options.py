"""The options of the steps that make datasets and bring models in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field

from gulliver.core.options import MaxRam, Options
from gulliver.core.store.files import named_path
from gulliver.nets.kinds import model_config
from gulliver.tasks import DEFAULT, foreign_files
from gulliver.tasks.options import KnownTask


class PullOptions(Options):
    """Options of `pull`."""

    source: str = Field(description="catalog:NAME, hf:ORG/NAME[@REVISION], a folder or a GGUF file (any part of one)")
    task: Annotated[str | None, KnownTask] = Field(
        None, description="family of the model; found from its config when left out"
    )

    def resolved(self, inputs: Mapping[str, Any]) -> Self:
        """These options; a model that cannot be converted, or whose config cannot be one, is refused here, at once."""
        self.files("source")
        if (path := named_path(self.source)).is_dir() and (path / "config.json").exists():
            model_config(path)
        return self

    def files(self, field: str) -> Any:
        """All parts of a GGUF that is split, whichever is named."""
        found = foreign_files(named_path(self.source)) if field == "source" else ()
        return [str(file) for file in found] if len(found) > 1 else super().files(field)


class ReadOptions(Options):
    """Options of `read`."""

    data: str = Field(description="a file or folder of .txt, .jsonl or .parquet, or catalog:NAME")
    eval_data: str | None = Field(None, description="held-out data of its own; else a part of `data` is held out")
    task: Annotated[str, KnownTask] = Field(DEFAULT, description="family of models the data is for")
    family: dict[str, Any] = Field(default_factory=dict, description="options of that family")


class SampleOptions(Options):
    """Options of `sample`."""

    count: int = Field(96, ge=1, le=65536, description="examples to keep for calibration")
    held_out: int = Field(16, ge=0, le=65536, description="examples to keep beside them for measuring")
    family: dict[str, Any] = Field(default_factory=dict, description="options of the model's family")
    batch_size: int = Field(64, ge=1, description="examples written at once, at most")
    max_ram_bytes: MaxRam = None
