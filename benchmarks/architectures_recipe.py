"""A config of every causal architecture of transformers at toy size: one general recipe, and what some types need more.

`build` stores a random model of a type as its folder would be: config, weights and a byte tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto import modeling_auto as auto

from gulliver.tasks.text.tokenizer import write_byte_tokenizer

VOCABULARY = 320
SIZES: dict[str, int] = {
    **dict.fromkeys(
        (
            "hidden_size",
            "hidden_size_global",
            "adapter_in_dim",
            "adapter_input_size",
            "adapter_out_dim",
            "n_embd",
            "d_model",
            "embed_dim",
            "dim",
            "model_dim",
            "width",
        ),
        64,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "n_inner",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "ffn_hidden_size",
            "dim_ff",
            "dff",
        ),
        128,
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_ffn_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_kv_heads"), 2),
    **dict.fromkeys(
        (
            "head_dim",
            "attention_head_dim",
            "dim_head",
            "linear_head_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
        ),
        16,
    ),
    **dict.fromkeys(("global_head_dim", "linear_head_dim", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "context_length"), 512),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "depth"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "encoder_hash_byte_group_vocab"), VOCABULARY),
    **dict.fromkeys(("rotary_dim", "mamba_d_state", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_d_ssm",), 128),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 64),
}
"""Config fields and what they are shrunk to, where a config class has them."""
WIDER = {
    **{name: 96 for name, size in SIZES.items() if name in ("hidden_size", "n_embd", "d_model", "dim")},
    **{name: 3 for name in SIZES if name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")},
}
"""Another size: columns that are no power of two, an odd number of layers."""
BIASES = ("attention_bias", "qkv_bias", "use_qkv_bias", "mlp_bias", "use_bias", "bias", "conv_bias", "lm_head_bias")
"""Config fields that say whether linears have biases, all of which the wider recipe has; its head is not tied."""
WIDER_TYPES = (
    *("llama", "qwen2", "qwen3", "gemma3_text", "mistral", "phi3", "gpt2", "mixtral", "mamba2", "lfm2", "olmo2"),
    *("granite",),
)
"""Model types that are tried with the wider recipe too."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
QWEN4_EXP = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "hc_lowrank": 32,
    "ple_layer_ids": [1],
    "heads_per_ngram": 1,
    "ngram_vocab_size_base": 100,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "eos_token_id": 1,
}
DOTS3_NOTE = {
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "index_n_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("kv_lora_rank", "swa_kv_lora_rank", "swa_q_lora_rank"), 32),
    **{"head_dim": 24, "qk_nope_head_dim": 16, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16},
    **{"index_topk": 16, "index_head_dim": 16, "shared_experts_intermediate_size": 64},
}
GEMMA3N = {
    **{"intermediate_size": [128, 128], "activation_sparsity_pattern": [0.95, 0.0]},
    **{"hidden_size_per_layer_input": 16, "laurel_rank": 16},
}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "cpmant": {"init_std": 0.02},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "dots3_note": {"text_config": DOTS3_NOTE},
    "dots3_note_text": DOTS3_NOTE,
    "fuyu": {"patch_size": 4},
    "git": {"vision_config": {"num_hidden_layers": 1, "image_size": 32, "intermediate_size": 64}},
    "gemma3n": {"text_config": GEMMA3N},
    "gemma3n_text": GEMMA3N,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "minimax": {"block_size": 32},
    "phi4_multimodal": {
        "audio_config": {
            **dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels"), 16),
            **{"num_blocks": 1, "hidden_size": 32, "intermediate_size": 32},
        },
        "vision_config": {"num_hidden_layers": 1, "intermediate_size": 64, "image_size": 56, "crop_size": 56},
    },
    "prophetnet": {
        **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
        **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    },
    "qwen4_exp": {"text_config": QWEN4_EXP},
    "qwen4_exp_text": QWEN4_EXP,
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32], "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        **{key: ["linear_attention", "hybrid", "hybrid"] for key in ("layer_types", "layers_block_type")},
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""Model types whose config needs more: fields that are empty by default, or that hang together."""

DRAFTS = {"gemma4_assistant": "gemma4_text", "gemma4_unified_assistant": "gemma4_unified_text"}
"""Model type of a network that drafts for another, which transformers cannot build -> the model type of its layers."""
PARTS = {"musicgen": "decoder", "musicgen_melody": "decoder"}
"""Model type whose causal network is built from a part of its config -> that part."""
STORED_WITHIN = {"gemma3n": ("text_config", {"model.": "model.language_model."})}
"""Model type whose other parts need packages that are not installed: its text part is stored as the whole stores it."""


def settable(config: Any, name: str) -> bool:
    """Whether the config has a field of this name, a whole number that is not computed from others."""
    if isinstance(getattr(type(config), config.attribute_map.get(name, name), None), property):
        return False
    try:
        return isinstance(getattr(config, name, None), int)
    except (AttributeError, ValueError, RuntimeError):  # one that varies from layer to layer
        return False


def small(kind: str, wider: bool = False) -> Any:
    """A config of the model type at toy size."""
    if kind in DRAFTS:
        text = small(DRAFTS[kind]).to_dict() | {"num_kv_shared_layers": SIZES["num_hidden_layers"]}
        text |= {name: 0 for name in ("hidden_size_per_layer_input", "vocab_size_per_layer_input") if name in text}
        return transformers.AutoConfig.for_model(kind, text_config=text, backbone_hidden_size=SIZES["hidden_size"])
    known = transformers.AutoConfig.for_model(kind)
    return transformers.AutoConfig.for_model(kind, **joined(shrunk(known, wider), OWN.get(kind, {})))


def joined(chosen: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Fields with the model type's own laid over them, config inside config."""
    inner = {name: joined(chosen[name], one) for name, one in own.items() if isinstance(one, dict) and name in chosen}
    return {**chosen, **own, **inner}


def shrunk(config: Any, wider: bool = False) -> dict[str, Any]:
    """Every known size that a config's class has, lists of layers cut; so for each config inside it."""
    sizes = SIZES | (WIDER if wider else {})
    chosen: dict[str, Any] = {name: size for name, size in sizes.items() if settable(config, name)}
    if wider:
        chosen |= {name: True for name in BIASES if isinstance(vars(config).get(name), bool)}
        chosen |= {"tie_word_embeddings": False}
    for name in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types"):
        own = getattr(type(config), config.attribute_map.get(name, name), None)
        types = None if isinstance(own, property) else getattr(config, name, None)
        if isinstance(types, (list, tuple)) and types:
            kinds = list(dict.fromkeys(types))
            chosen[name] = [kinds[0], *[kinds[len(kinds) // 2]] * wider, kinds[-1]]
    for name in (
        "num_key_value_heads",
        "n_shared_experts",
        "n_routed_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
    ):
        if vars(config).get(name, 0) is None:
            chosen[name] = SIZES[name]
    if "num_kv_shared_layers" in vars(config):
        chosen["num_kv_shared_layers"] = 0
    if "rope_parameters" in vars(config) and not config.rope_parameters:
        chosen["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    if "qk_rope_head_dim" in chosen:
        if "head_dim" in chosen:
            chosen["head_dim"] = SIZES["qk_rope_head_dim"]  # another name of the same
        if "num_key_value_heads" in chosen:
            chosen["num_key_value_heads"] = SIZES["num_attention_heads"]
    if hasattr(config, "eos_token_id"):
        chosen |= {name: 0 for name in ("bos_token_id", "pad_token_id") if hasattr(config, name)}
        chosen |= {"eos_token_id": 1} | ({"is_decoder": True} if hasattr(config, "is_decoder") else {})
    if "expand" in vars(config) and "head_dim" in chosen:  # heads of a state space
        chosen["head_dim"] = sizes["hidden_size"] * config.expand // sizes["num_heads"]
    if getattr(config, "layer_types", ()) is None:
        chosen["layer_types"] = ["full_attention"] * sizes["num_hidden_layers"]
    if getattr(config, "attention_types", None):
        chosen["attention_types"] = [[["global", "local"], 1]]
    if vars(config).get("head_dim", 0) is None and "head_dim" not in chosen and "qk_rope_head_dim" not in chosen:
        chosen["head_dim"] = SIZES["head_dim"]
    for name in type(config).sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, transformers.PreTrainedConfig):
            chosen[name] = {"model_type": inner.model_type, **shrunk(inner, wider)}
    return chosen


def build(kind: str, folder: Path, wider: bool = False) -> None:
    """A random model of the type, with a byte tokenizer."""
    torch.manual_seed(0)
    config, architecture = small(kind, wider), auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    within, prefixes = STORED_WITHIN.get(kind, ("text_config" if kind in DRAFTS else "", {}))
    if kind in PARTS:
        model = getattr(transformers, architecture)(getattr(config, PARTS[kind])).eval()
    else:
        built = small(DRAFTS[kind]) if kind in DRAFTS else getattr(config, within) if within else config
        model = transformers.AutoModelForCausalLM.from_config(built, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.mul_(2.0)
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    if within:
        (folder / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": [architecture]}))
        tensors = load_file(folder / "model.safetensors")
        save_file({named(name, prefixes): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def named(name: str, prefixes: dict[str, str]) -> str:
    """The name with the first of the prefixes that it has replaced."""
    return next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), name)
