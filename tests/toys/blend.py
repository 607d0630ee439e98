"""A step that takes several models and keeps the mean of their weights."""

from __future__ import annotations

import numpy as np
from safetensors.numpy import load_file, save_file

from gulliver.core.context import Context
from gulliver.core.options import Options
from gulliver.core.store.artifact import Artifact


class Config(Options):
    pass


def run(cfg: Config, inputs: dict[str, tuple[Artifact, ...]], ctx: Context) -> Artifact:
    weights = [load_file(model.file("model.safetensors"))["w"] for model in inputs["model"]]
    with ctx.writer(kind="model", task="toy", config=cfg) as writer:
        save_file({"w": np.mean(weights, axis=0)}, writer.path / "model.safetensors")
        return writer.commit()
