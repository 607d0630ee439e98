"""A step that writes a model of `weights` float32 numbers."""

from __future__ import annotations

import numpy as np
from pydantic import Field
from safetensors.numpy import save_file

from gulliver.core.context import Context
from gulliver.core.options import Options
from gulliver.core.store.artifact import Artifact


class Config(Options):
    weights: int = Field(64, gt=0, description="how many weights to write")
    source: str | None = None


calls: list[Config] = []


def run(cfg: Config, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    calls.append(cfg)
    numbers = np.random.default_rng(ctx.seed).standard_normal(cfg.weights).astype(np.float32)
    with ctx.writer(kind="model", task="toy", config=cfg) as writer:
        save_file({"w": numbers}, writer.path / "model.safetensors")
        return writer.commit()
