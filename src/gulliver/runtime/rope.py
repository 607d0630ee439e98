"""Frequencies of rotary position embeddings, from a model's config, without torch.

Pair i of a head of d numbers turns by position x theta^(-2i/d) (RoFormer, arXiv 2104.09864). `linear` divides all
frequencies by a factor; `llama3` divides the slow ones and blends those between two wavelengths (Llama 3, arXiv
2407.21783).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


class UnknownRope(Exception):
    """A kind of rotary embedding that is not here; the message names it."""


def frequencies(rope: Mapping[str, Any], head_dim: int) -> NDArray[np.float32]:
    """Frequencies [head_dim / 2] in radians per position. `rope` is one entry of a config's `rope_parameters`."""
    kind = str(rope.get("rope_type", "default"))
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnknownRope("it rotates a part of each head only")
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1.0 / np.float32(rope.get("rope_theta", 10000.0)) ** exponent).astype(np.float32)
    if kind == "default":
        return plain
    if kind == "linear":
        return (plain / np.float32(rope["factor"])).astype(np.float32)
    if kind == "llama3":
        return _llama3(plain, rope)
    raise UnknownRope(f"its rotary embedding is of type {kind!r}")


def _llama3(plain: NDArray[np.float32], rope: Mapping[str, Any]) -> NDArray[np.float32]:
    factor, trained = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    wavelength = 2 * math.pi / plain.astype(np.float64)
    blend = np.clip((trained / wavelength - low) / (high - low), 0.0, 1.0)  # 0: slow, divided; 1: fast, left alone
    return (plain * ((1 - blend) / factor + blend)).astype(np.float32)


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Kind of layer -> its rope, from any version of transformers' configs; "full_attention" is always there."""
    given = config.get("rope_parameters")
    if isinstance(given, Mapping) and any(isinstance(value, Mapping) for value in given.values()):
        return {kind: rope for kind, rope in given.items() if isinstance(rope, Mapping)}
    rope = dict(given or config.get("rope_scaling") or {})
    if "type" in rope:  # how older configs spell it
        rope.setdefault("rope_type", rope.pop("type"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    found: dict[str, Mapping[str, Any]] = {"full_attention": rope}
    local = config.get("rope_local_base_freq")
    if local is not None:
        found["sliding_attention"] = {"rope_type": "default", "rope_theta": local}
    return found
