"""What tests of hostile model folders share: tiny packed models to be damaged, and what may come of opening one."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load
from tiny_decoders import pack_decoder, write_decoder
from torch import Tensor

from gulliver.core.errors import ArtifactError, BudgetError, ConfigError, KernelError
from gulliver.runtime.decode import open_decoder
from gulliver.runtime.decoder import StepBatch
from gulliver.runtime.shards import write_file

REFUSALS = (ArtifactError, ConfigError, BudgetError)
WEIGHTS = "model.safetensors"


def write_models(root: Path) -> dict[str, Path]:
    """Packed models whose files are laid out as our writer does; "plain" is not packed."""
    found = {}
    for name in ("llama", "gemma3"):
        found[name] = pack_decoder(root / name, write_decoder(root / f"{name}-plain", name))
        write_file(found[name] / WEIGHTS, tensors_of(found[name]))
    return {**found, "plain": root / "llama-plain"}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The stored tensors, in memory of their own."""
    return load((folder / WEIGHTS).read_bytes())


def run(folder: Path, **options: Any) -> np.ndarray:
    """Open and step: one token, then a chunk that begins a sequence anew. Returns the chunk's logits."""
    decoder = open_decoder(folder, backend="native", threads=1, **options)
    ints = lambda *values: np.array(values, np.int32)  # noqa: E731
    decoder.step(StepBatch(ints(3), ints(0), ints(0), ints([0]), ints(0)))
    logits = decoder.step(StepBatch(ints(3, 5, 0), ints(0, 1, 2), ints(0, 0, 0), ints([0]), ints(1, 2)))
    assert logits.shape == (2, decoder.vocabulary)
    decoder.close()
    return logits


def refused(folder: Path, message: str | None = None, **options: Any) -> None:
    with pytest.raises(REFUSALS, match=message) as caught:
        run(folder, **options)
    assert len(str(caught.value)) < 1000


def tried(folder: Path, **options: Any) -> bool:
    """Whether it runs; any other end than a refusal of ours is an error."""
    try:
        run(folder, **options)
    except REFUSALS:
        return False
    except KernelError as error:  # a context of one token has no second position
        assert "outside the context" in str(error)
    return True


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


Header = dict[str, Any]


def split(path: Path) -> tuple[Header, bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(path: Path, header: Any, body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
