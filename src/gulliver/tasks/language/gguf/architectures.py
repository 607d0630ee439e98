"""What GGUF files and transformers say differently about the same networks, once for reading and for writing.

llama.cpp stores the rows of q and k of some architectures for its own rotary embedding, which turns pairs of neighbours
(2i, 2i + 1), while transformers turns (i, i + d/2): within each head of d rows

    stored row 2i + j  =  transformers row j · d/2 + i        (j = 0, 1)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from torch import Tensor

from gulliver.core.errors import ConfigError

ATTENTION_BIASES = ("attn_q", "attn_k", "attn_v")
ALL_BIASES = (*ATTENTION_BIASES, "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp runs a network: its name there, and what it can hold.

    `permuted`: rows of q and k lie as pairs of neighbours; `norm_offset` is added to every norm's weights; `biases`
    are the layers that may have one; `rope_factors`: divisors of the rotary frequencies may be stored.
    """

    name: gguf.MODEL_ARCH
    permuted: bool = False
    activation: str = "silu"
    norm_offset: float = 0.0
    biases: tuple[str, ...] = ATTENTION_BIASES
    rope_factors: bool = False


_LLAMA = Architecture(gguf.MODEL_ARCH.LLAMA, permuted=True, biases=ALL_BIASES, rope_factors=True)
ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture(gguf.MODEL_ARCH.QWEN2),
    "Qwen3ForCausalLM": Architecture(gguf.MODEL_ARCH.QWEN3),
    "Gemma3ForCausalLM": Architecture(gguf.MODEL_ARCH.GEMMA3, activation="gelu_pytorch_tanh", norm_offset=1.0),
}
"""transformers' class -> how llama.cpp runs it."""
REMEDY = "; use --format safetensors"
"""How errors end about a model that GGUF has no place for, when it is exported."""

GEMMA3_27B_LAYERS = 62
"""By this number of layers llama.cpp knows the one Gemma 3 whose attention is scaled in another way."""


def architecture_of(network: Any) -> Architecture:
    """The row of ARCHITECTURES for a network. ConfigError when GGUF has no place for it."""
    name = type(network).__name__
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ConfigError(f"gguf is written for {known}, and this model is a {name}{REMEDY}")
    config, row = network.config, ARCHITECTURES[name]
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation != row.activation:
        raise no_place(f"the activation {activation!r} where llama.cpp computes {row.activation!r}")
    if row.name == gguf.MODEL_ARCH.GEMMA3:
        _check_gemma3(config)
    return row


def _check_gemma3(config: Any) -> None:
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    scaled_by = config.hidden_size // heads if layers == GEMMA3_27B_LAYERS else config.head_dim
    if config.query_pre_attn_scalar != scaled_by:
        raise no_place(f"query_pre_attn_scalar {config.query_pre_attn_scalar} where llama.cpp takes {scaled_by}")
    if config.attn_logit_softcapping is not None or config.use_bidirectional_attention:
        raise no_place("soft-capped attention scores or attention in both directions")


def no_place(what: str) -> ConfigError:
    """The error of a model that has `what`, which GGUF cannot hold."""
    return ConfigError(f"this model has {what}, for which GGUF has no place{REMEDY}")


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads · d, …] of any dtype from transformers' order to llama.cpp's: (i, i + d/2) become neighbours."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def unpermute(values: Tensor, heads: int) -> Tensor:
    """Rows [heads · d, …] of any dtype from llama.cpp's order to transformers'."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, half, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
