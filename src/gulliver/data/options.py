"""The options of the steps that make datasets and bring models in."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from gulliver.core.options import MaxRam, Options
from gulliver.tasks import DEFAULT


class PullOptions(Options):
    """Options of `pull`."""

    source: str = Field(description="catalog:NAME, hf:ORG/NAME[@REVISION], a folder or a .gguf file")
    task: str | None = Field(None, description="family of the model; found from its config when left out")


class ReadOptions(Options):
    """Options of `read`."""

    data: str = Field(description="a file or folder of .txt, .jsonl or .parquet, or catalog:NAME")
    eval_data: str | None = Field(None, description="held-out data of its own; else a part of `data` is held out")
    task: str = Field(DEFAULT, description="family of models the data is for")
    family: dict[str, Any] = Field(default_factory=dict, description="options of that family")


class SampleOptions(Options):
    """Options of `sample`."""

    count: int = Field(96, ge=1, le=65536, description="examples to write; empty ones are dropped")
    family: dict[str, Any] = Field(default_factory=dict, description="options of the model's family")
    batch_size: int = Field(48, ge=1, description="examples written at once")
    max_ram_bytes: MaxRam = None
