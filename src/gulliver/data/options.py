"""The options of the steps that make datasets and bring models in."""

from __future__ import annotations

from pydantic import Field

from gulliver.core.options import Options


class PullOptions(Options):
    """Options of `pull`."""

    source: str = Field(description="catalog:NAME, hf:ORG/NAME[@REVISION], a folder or a .gguf file")
    task: str | None = Field(None, description="family of the model; found from its config when left out")


class ReadOptions(Options):
    """Options of `read`."""

    data: str = Field(description="a file or folder of .txt, .jsonl or .parquet, or catalog:NAME")
    eval_data: str | None = Field(None, description="held-out data of its own; else a part of `data` is held out")
    task: str = Field("language", description="family of models the data is for")
    holdout: float = Field(0.1, gt=0, lt=1, description="fraction of the text held out when eval_data is not given")
    text_column: str = Field("text", description="column of .jsonl and .parquet files that holds the text")


class SampleOptions(Options):
    """Options of `sample`."""

    count: int = Field(96, ge=1, description="texts to write; empty ones are dropped")
    tokens: int = Field(512, ge=2, description="tokens of each text, at most what the model has positions for")
    batch_size: int = Field(48, ge=1, description="texts written at once")
