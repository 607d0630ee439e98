"""Configs of every age mean to the native path what they mean to transformers: frequencies, windows and sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gulliver.core.errors import ArtifactError
from gulliver.runtime.lower import NotLowered, read_config

SIZES: dict[str, Any] = {
    **{"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 8},
    **{"intermediate_size": 512, "vocab_size": 100, "max_position_embeddings": 4096},
}
TYPES = {"Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3", "Gemma3": "gemma3_text"}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Llama", {"rope_theta": 500000.0, "head_dim": None, "num_key_value_heads": None}),
    ("Llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4}, "rope_theta": 5000, "sliding_window": 16}),
    ("Llama", {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 512}}),
    ("Llama", {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e5, **LLAMA3}}),
    ("Llama", {"rope_parameters": {"rope_theta": 1e5}, "rope_scaling": None, "head_dim": 32}),
    ("Mistral", {}),
    ("Mistral", {"sliding_window": None, "rope_theta": 1e6, "rope_local_base_freq": 5.0}),
    ("Mistral", {"sliding_window": 128, "head_dim": 32}),
    ("Qwen2", {"sliding_window": 64, "max_window_layers": 3, "use_sliding_window": False}),
    ("Qwen2", {"sliding_window": 64, "max_window_layers": 3, "use_sliding_window": True}),
    ("Qwen2", {"use_sliding_window": True, "num_hidden_layers": 30}),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}),
    ("Qwen3", {"rope_theta": 1000000}),
    ("Qwen3", {"head_dim": 64, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 4}),
    ("Gemma3", {}),
    ("Gemma3", {"sliding_window_pattern": 3, "sliding_window": 32, "rope_theta": 1e5, "rope_local_base_freq": 500.0}),
    ("Gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "head_dim": 64, "query_pre_attn_scalar": 64}),
    ("Gemma3", {"layer_types": ["sliding_attention", "full_attention"] * 4, "rope_parameters": None}),
    ("Gemma3", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}}}),
]


def config_of(folder: Path, name: str, changes: dict[str, Any]) -> Path:
    config = {"architectures": [f"{name}ForCausalLM"], "model_type": TYPES[name], **SIZES, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_a_config_means_what_it_means_to_transformers(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    found = read_config(config_of(tmp_path, name, changes))
    theirs: Any = AutoConfig.from_pretrained(tmp_path)
    if name == "Gemma3":
        rotary: Any = Gemma3RotaryEmbedding(theirs)
        wanted = [rotary.full_attention_inv_freq, rotary.sliding_attention_inv_freq]
        assert found.attention_scale == pytest.approx(theirs.query_pre_attn_scalar**-0.5)
    else:
        wanted = [LlamaRotaryEmbedding(theirs).inv_freq]
    assert len(found.ropes) == len(wanted)
    for ours, right in zip(found.ropes, wanted, strict=True):
        np.testing.assert_allclose(ours, right.numpy(), rtol=2e-6)
    kinds = getattr(theirs, "layer_types", None)
    if name in ("Llama", "Mistral"):
        kinds = ["sliding_attention" if name == "Mistral" else "full_attention"] * theirs.num_hidden_layers
    assert kinds is not None
    windows = [theirs.sliding_window or 0 if kind == "sliding_attention" else 0 for kind in kinds]
    assert list(found.windows) == windows
    assert [found.layer_rope[layer] for layer, window in enumerate(windows)] == [
        int(name == "Gemma3" and window > 0) for window in windows
    ]
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (found.head_dim, found.kv_heads) == (head_dim, theirs.num_key_value_heads)
    assert found.tied == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("Llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("Llama", {"partial_rotary_factor": 0.5}, "part of each head"),
        ("Llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ("Mistral", {"quantization_config": {"quant_method": "gptq"}}, "another tool"),
        ("Gemma3", {"final_logit_softcapping": 30.0}, "caps"),
        ("Gemma3", {"use_bidirectional_attention": True}, "both directions"),
    ],
)
def test_what_has_no_native_form_is_left_to_the_reference(
    tmp_path: Path, name: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(NotLowered, match=reason):
        read_config(config_of(tmp_path, name, changes))


@pytest.mark.parametrize("rope", [[1], "linear", {"rope_type": "linear"}, {"rope_theta": "big"}, {"rope_theta": 0}])
def test_a_damaged_rope_is_an_error(tmp_path: Path, rope: Any) -> None:
    with pytest.raises(ArtifactError):
        read_config(config_of(tmp_path, "Llama", {"rope_parameters": rope}))
