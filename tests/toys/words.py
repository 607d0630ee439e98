"""A step that makes a dataset of one text file, for whatever task it is told."""

from __future__ import annotations

from pathlib import Path

from gulliver.core.context import Context
from gulliver.core.options import Options
from gulliver.core.store.artifact import Artifact


class Config(Options):
    data: str
    eval_data: str | None = None
    task: str = "language"


def run(cfg: Config, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    with ctx.writer(kind="dataset", task=cfg.task, config=cfg) as writer:
        (writer.path / "words.txt").write_bytes(Path(cfg.data).read_bytes())
        return writer.commit()
