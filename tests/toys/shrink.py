"""A step that works through `blocks` parts slowly and resumes at the part where it was killed."""

from __future__ import annotations

import os
import time
from typing import Literal

import numpy as np
from safetensors.numpy import load_file, save_file

from gulliver.core.context import Context
from gulliver.core.options import MaxRam, Options
from gulliver.core.store.artifact import Artifact


class Config(Options):
    bits: Literal[2, 4, 8] = 4
    blocks: int = 4
    block_seconds: float = 0.0
    group_sizes: tuple[int, ...] = (32,)
    exact: bool = False
    max_ram_bytes: MaxRam = None


def run(cfg: Config, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    model = inputs["model"]
    numbers = load_file(model.file("model.safetensors"))["w"]
    with ctx.progress.stage("shrink", total=cfg.blocks, unit="block") as bar:
        for block in range(cfg.blocks):
            done = ctx.work / f"block-{block}.npy"
            if not done.exists():
                time.sleep(cfg.block_seconds)
                part = np.array_split(numbers, cfg.blocks)[block]
                with open(ctx.work / "unfinished", "wb") as file:
                    np.save(file, np.round(part * 2**cfg.bits).astype(np.int8))
                with open(ctx.work / "log", "a") as log:
                    log.write(f"{block}\n")
                ctx.check_ram(f"block {block}")
                os.rename(ctx.work / "unfinished", done)
            bar.advance()
    parts = [np.load(ctx.work / f"block-{block}.npy") for block in range(cfg.blocks)]
    with ctx.writer(kind="model", task="toy", config=cfg) as writer:
        save_file({"w": np.concatenate(parts)}, writer.path / "model.safetensors")
        return writer.commit()
