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

from gulliver.core.errors import ArtifactError

LEAST, MOST = 1e-6, 1e30  # what a base, factor or length may be, so that all frequencies are finite in float32


class UnknownRope(Exception):
    """A kind of rotary embedding that is not here; the message names it."""


def frequencies(rope: Mapping[str, Any], head_dim: int) -> NDArray[np.float32]:
    """Frequencies [head_dim / 2] in radians per position. `rope` is one entry of a config's `rope_parameters`.

    ArtifactError for a value that is not a number or is out of range, UnknownRope for a kind that is not here.
    """
    kind = str(rope.get("rope_type", "default"))
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnknownRope("it rotates a part of each head only")
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1.0 / np.float32(number(rope, "rope_theta", LEAST, MOST, 10000.0)) ** exponent).astype(np.float32)
    if kind == "default":
        return plain
    if kind == "linear":
        return (plain / np.float32(number(rope, "factor", LEAST, MOST))).astype(np.float32)
    if kind == "llama3":
        return _llama3(plain, rope)
    raise UnknownRope(f"its rotary embedding is of type {kind[:80]!r}")


def number(
    config: Mapping[str, Any], key: str, least: float, most: float, default: float | None = None, *, whole: bool = False
) -> Any:
    """A number of a config from `least` to `most`; `default` also where it is null. ArtifactError for anything else."""
    value: Any = default if config.get(key) is None else config[key]
    if type(value) not in ((int,) if whole else (int, float)) or not least <= value <= most:
        told = "missing" if value is None else str(value)[:80]
        kind = "whole number" if whole else "number"
        raise ArtifactError(f"config.json: {key} is {told}; it must be a {kind} from {least} to {most}")
    return value if whole else float(value)


def _llama3(plain: NDArray[np.float32], rope: Mapping[str, Any]) -> NDArray[np.float32]:
    keys = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    factor, trained, low, high = (number(rope, key, LEAST, MOST) for key in keys)
    if high <= low:
        raise ArtifactError(f"config.json: high_freq_factor is {high}; it must be above low_freq_factor, {low}")
    wavelength = 2 * math.pi / plain.astype(np.float64)
    blend = np.clip((trained / wavelength - low) / (high - low), 0.0, 1.0)  # 0: slow, divided; 1: fast, left alone
    return (plain * ((1 - blend) / factor + blend)).astype(np.float32)


def rope_parameters(config: Mapping[str, Any], *, gemma: bool) -> dict[str, dict[str, Any]]:
    """Kind of layer -> its rope, from any version of transformers' configs; "full_attention" is always there.

    Gemma 3 alone has another one for "sliding_attention".
    """
    given, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if not gemma:
        return {"full_attention": _rope(config, scaling or given, "rope_theta", 1e4)}
    full, sliding = given.get("full_attention") or {}, given.get("sliding_attention") or {}
    return {
        "full_attention": _rope(config, {**full, **scaling}, "rope_theta", 1e6),
        "sliding_attention": _rope(config, sliding, "rope_local_base_freq", 1e4),
    }


def _rope(config: Mapping[str, Any], given: Mapping[str, Any], base: str, theta: float) -> dict[str, Any]:
    """One rope, with what a config says outside it."""
    rope = dict(given)
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UnknownRope(f"its rotary embeddings are given for {', '.join(sorted(rope))[:80]}")
    rope.setdefault("rope_type", rope.get("type", "default"))  # how older configs spell it
    rope.setdefault("rope_theta", config.get(base, theta))
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    if config.get("original_max_position_embeddings") is not None:
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return rope
