"""A step that makes a dataset of one text file, for whatever task it is told."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from gulliver.core.context import Context
from gulliver.core.store.artifact import Artifact


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str
    eval_data: str | None = None
    task: str = "language"


def run(cfg: Config, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    with ctx.writer(kind="dataset", task=cfg.task, parents=(), step_name="read", config=cfg) as writer:
        (writer.path / "words.txt").write_bytes(Path(cfg.data).read_bytes())
        return writer.commit()
