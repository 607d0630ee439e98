"""Step `export`: write a model as another tool reads it, exactly or not at all.

`safetensors` is the plain Hugging Face layout in bfloat16: packed weights are dequantized. bfloat16 keeps 8 significant
bits, so a value is rounded by at most 2^-9 of itself; the largest such error is in the artifact's config as
`max_relative_rounding`. `compressed-tensors` keeps integer codes and is bit-exact (see export_compressed.py). `gguf` is
one file for llama.cpp, exact unless another type is asked for (tasks/language/gguf/write.py).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gulliver.compress.export_compressed import compressed_config, compressed_tensors, plan_layout
from gulliver.compress.options import ExportOptions
from gulliver.core.context import Context
from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.manifest import PACKING, read_json
from gulliver.nets.files import copy_companions
from gulliver.runtime import reference
from gulliver.runtime.packing import is_compressed
from gulliver.runtime.shards import ShardWriter
from gulliver.tasks import EXPORTS, exporter, get_task

MAX_CONFIG_BYTES = 10_000_000
CHUNK = 2**22
"""Numbers of which float64 copies are in memory."""


def run(cfg: ExportOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """A model artifact in the layout of `cfg.format`. ConfigError where that format cannot hold the model."""
    model = inputs["model"]
    raw, staging = read_config(model), ctx.work / "export"
    shutil.rmtree(staging, ignore_errors=True)  # what a killed run left: writing again is quick
    staging.mkdir(parents=True)
    if cfg.format == "safetensors":
        facts = _plain(model, raw, staging, ctx)
    elif cfg.format in EXPORTS:
        facts = exporter(cfg.format, model.task)(model, staging, cfg.type, ctx)
    else:
        facts = _compressed(model, raw, staging, ctx, cfg.widen)
    with ctx.writer(kind="model", task=model.task, config={**cfg.model_dump(mode="json"), **facts}) as writer:
        if cfg.format not in EXPORTS:  # one file that holds all of it
            copy_companions(model.paths(), writer.path, ("config.json", PACKING))
        for path in sorted(staging.iterdir()):
            os.replace(path, writer.path / path.name)
        return writer.commit()


def _plain(model: Artifact, raw: dict[str, Any], folder: Path, ctx: Context) -> dict[str, Any]:
    """Write bfloat16 weights and their config.json into `folder`. Returns facts for the artifact's config."""
    worst = 0.0
    with ShardWriter(folder) as shards, ctx.progress.stage("export", unit="tensor") as bar:
        for name, tensor in reference.read_tensors(model.path):
            rounded, error = as_bfloat16(tensor)
            shards.add({name: rounded})
            worst = max(worst, error)
            bar.advance()
    write_config({**raw, "dtype": "bfloat16"} if "model_type" in raw else raw, folder)
    return {"max_relative_rounding": worst}


def _compressed(model: Artifact, raw: dict[str, Any], folder: Path, ctx: Context, widen: bool) -> dict[str, Any]:
    """Write packed codes and the config.json that describes them into `folder`. Returns facts likewise."""
    if not is_compressed(model.path):
        raise ConfigError(
            f"model {model.id[:12]} has no packed weights, so compressed-tensors has nothing to hold; quantize it "
            "first, or export it as safetensors"
        )
    network = get_task(model.task).load(model.path, empty=True)
    layout = plan_layout(reference.read_stored(model.path), network, widen)
    with ShardWriter(folder) as shards, ctx.progress.stage("export", unit="tensor") as bar:
        for name, tensor in reference.read_stored(model.path):
            shards.add({name: tensor} if isinstance(tensor, Tensor) else compressed_tensors(name, tensor, layout))
            bar.advance()
    write_config({**raw, "dtype": "float32", "quantization_config": compressed_config(layout, network)}, folder)
    return {"layout": layout.strategy, "widened": list(layout.widened)}


def as_bfloat16(tensor: Tensor) -> tuple[Tensor, float]:
    """A floating tensor of any shape in bfloat16 and its largest relative rounding error; others as they are and 0."""
    if not tensor.is_floating_point():
        return tensor, 0.0
    rounded, worst = tensor.to(torch.bfloat16), 0.0
    for exact, kept in zip(tensor.flatten().split(CHUNK), rounded.flatten().split(CHUNK), strict=True):
        errors = ((kept.double() - exact.double()) / exact.double()).abs().nan_to_num_(0.0, 0.0, 0.0)
        worst = max(worst, errors.max().item() if errors.numel() else 0.0)
    return rounded, worst


# ---- files --------------------------------------------------------------------------------------------------------
def read_config(model: Artifact) -> dict[str, Any]:
    """config.json of the model as a JSON object. ConfigError when another tool's packing is already in it."""
    path = model.file("config.json")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ArtifactError(f"{path} has {path.stat().st_size} bytes: it is not a model config; make the model again")
    raw = read_json(path.read_bytes(), str(path))
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path} is not a JSON object; make the model again")
    if "quantization_config" in raw:
        raise ConfigError(f"model {model.id[:12]} is already in another tool's format; export the model it came from")
    return raw


def write_config(raw: dict[str, Any], folder: Path) -> None:
    """config.json into `folder`."""
    text = json.dumps(raw, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
