"""GGUF files of tiny transformers networks as llama.cpp's converter writes them, from the converter's rules alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import MODEL_ARCH as ARCH
from gguf import GGMLQuantizationType as Type

VOCABULARY = 320
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
    **{"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257},
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


@dataclass(frozen=True)
class Case:
    """A network and what its converter does: `rows` of q and k are permuted, `norm` is added to norms, keys `extra`."""

    model_type: str
    arch: ARCH
    options: Mapping[str, Any] = field(default_factory=dict)
    permuted: bool = False
    norm: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)


def _rope(**options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", **options}}


LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32, "factor": 4.0,
    "short_factor": [1.0 + 0.1 * n for n in range(8)], "long_factor": [1.0 + 0.5 * n for n in range(8)],
}  # fmt: skip
GEMMA = {"head_dim": 32, "sliding_window": 8, "num_hidden_layers": 7, "query_pre_attn_scalar": 32}
GRANITE = {
    **{"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0},
}
HYBRID = {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4}
CASES: dict[str, Case] = {
    "llama": Case("llama", ARCH.LLAMA, {"tie_word_embeddings": True}, permuted=True),
    "llama, biases": Case("llama", ARCH.LLAMA, {"attention_bias": True, "mlp_bias": True}, permuted=True),
    "llama, wide heads": Case("llama", ARCH.LLAMA, {"head_dim": 32}, permuted=True),
    "llama 3": Case(
        "llama",
        ARCH.LLAMA,
        permuted=True,
        options=_rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama, linear": Case("llama", ARCH.LLAMA, _rope(rope_type="linear", factor=4.0), permuted=True),
    "mixtral": Case("mixtral", ARCH.LLAMA, {**EXPERTS, "sliding_window": None}, permuted=True),
    "qwen2": Case("qwen2", ARCH.QWEN2),
    "qwen2, yarn": Case("qwen2", ARCH.QWEN2, {"rope_parameters": YARN}),
    "qwen3": Case("qwen3", ARCH.QWEN3, {"head_dim": 32}),
    "qwen2 moe": Case(
        "qwen2_moe", ARCH.QWEN2MOE, {**EXPERTS, "shared_expert_intermediate_size": 48, "norm_topk_prob": False}
    ),
    "qwen3 moe": Case("qwen3_moe", ARCH.QWEN3MOE, {**EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "gemma": Case("gemma", ARCH.GEMMA, {"head_dim": 32}, norm=1.0),
    "gemma 2": Case(
        "gemma2", ARCH.GEMMA2, {**GEMMA, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}, norm=1.0
    ),
    "gemma 3": Case("gemma3_text", ARCH.GEMMA3, GEMMA, norm=1.0),
    "gemma 3, long": Case(
        "gemma3_text",
        ARCH.GEMMA3,
        norm=1.0,
        options={
            **GEMMA,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi 3": Case("phi3", ARCH.PHI3, {"sliding_window": 16}),
    "phi 3, long": Case("phi3", ARCH.PHI3, {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
    "phi 4 mini": Case(
        "phi3", ARCH.PHI3, {"hidden_size": 128, "tie_word_embeddings": True, **_rope(partial_rotary_factor=0.75)}
    ),
    "smollm 3": Case("smollm3", ARCH.SMOLLM3, {"num_hidden_layers": 5, "no_rope_layer_interval": 4}, permuted=True),
    "lfm 2": Case("lfm2", ARCH.LFM2, {**HYBRID, "block_auto_adjust_ff_dim": False}),
    "lfm 2 moe": Case("lfm2_moe", ARCH.LFM2MOE, {**HYBRID, **EXPERTS, "num_dense_layers": 1}),
    "granite": Case("granite", ARCH.GRANITE, GRANITE, permuted=True),
    "granite moe": Case("granitemoe", ARCH.GRANITE_MOE, {**GRANITE, **EXPERTS}, permuted=True),
    "olmo": Case("olmo", ARCH.OLMO, {"clip_qkv": None}, permuted=True),
    "olmo 2": Case("olmo2", ARCH.OLMO2),
    "olmo e": Case("olmoe", ARCH.OLMOE, EXPERTS),
    "stablelm": Case("stablelm", ARCH.STABLELM, _rope(partial_rotary_factor=0.5)),
    "starcoder 2": Case("starcoder2", ARCH.STARCODER2, {"sliding_window": None}),
    "cohere": Case("cohere", ARCH.COMMAND_R, {"logit_scale": 0.25}),
    "cohere 2": Case("cohere2", ARCH.COHERE2, {"logit_scale": 0.25, "sliding_window": 8, "num_hidden_layers": 5}),
    "exaone 4": Case(
        "exaone4", ARCH.EXAONE4, {"sliding_window": 8, "sliding_window_pattern": 4, "num_hidden_layers": 5}
    ),
    "ernie 4.5": Case("ernie4_5", ARCH.ERNIE4_5, {"head_dim": 16}),
    "arcee": Case("arcee", ARCH.ARCEE, permuted=True),
    "seed oss": Case("seed_oss", ARCH.SEED_OSS, {"head_dim": 16}),
    "hunyuan": Case("hunyuan_v1_dense", ARCH.HUNYUAN_DENSE, {"head_dim": 16}),
    "gpt-oss": Case("gpt_oss", ARCH.GPT_OSS, {**EXPERTS, "head_dim": 16, "sliding_window": 8}),
    "nemotron": Case("nemotron", ARCH.NEMOTRON, _rope(partial_rotary_factor=0.5), norm=1.0),
    "glm 4": Case("glm4", ARCH.GLM4, {"head_dim": 16, "attention_bias": True, **_rope(partial_rotary_factor=0.5)}),
    "phi 2": Case("phi", ARCH.PHI2, _rope(partial_rotary_factor=0.5)),
}


def network(case: Case, seed: int = 0) -> Any:
    """A random network of the case, no weight near zero or one, so that whatever is left out would be seen."""
    config = transformers.AutoConfig.for_model(case.model_type, **{**SIZES, **case.options})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer += 0.1 * torch.randn_like(buffer)
    return model


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def stored_tensors(model: Any, case: Case) -> Iterator[tuple[str, np.ndarray]]:
    """Name and float32 values of every tensor in the file."""
    config = model.config
    table = gguf.get_tensor_name_map(case.arch, config.num_hidden_layers)
    tied = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tied.get(id(tensor), name) != name or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        values = tensor.detach().float().numpy()
        number = name.split(".")[2] if ".layers." in name else ""
        leaf = "bias" if name.endswith("bias") else "weight"
        if "experts.gate_up_proj" in name:
            gates, ups = _gates_and_ups(values, case)
            yield f"blk.{number}.ffn_gate_exps.{leaf}", gates
            yield f"blk.{number}.ffn_up_exps.{leaf}", ups
            continue
        if "experts.down_proj" in name:
            turned = case.model_type == "gpt_oss" and values.ndim == 3
            yield f"blk.{number}.ffn_down_exps.{leaf}", values.swapaxes(1, 2).copy() if turned else values
            continue
        if name.endswith("router.weight"):
            found = f"blk.{number}.ffn_gate_inp.weight"
        elif name.endswith("expert_bias"):
            found = f"{table.get_name(name)}.bias"
        else:
            found = table.get_name(name, try_suffixes=(".weight", ".bias"))
            found = found if found.endswith(("weight", "bias")) else f"{found}.weight"
        if case.permuted and name.endswith(("q_proj.weight", "q_proj.bias")):
            values = permute(values, config.num_attention_heads)
        if case.permuted and name.endswith(("k_proj.weight", "k_proj.bias")):
            values = permute(values, config.num_key_value_heads)
        if name.endswith("norm.weight"):
            values = values + np.float32(case.norm)
        yield found, values.squeeze(1) if "conv.conv" in name else values.squeeze()


def _gates_and_ups(values: np.ndarray, case: Case) -> tuple[np.ndarray, np.ndarray]:
    if case.model_type == "gpt_oss":
        rows = values.swapaxes(1, 2) if values.ndim == 3 else values
        return rows[:, ::2].copy(), rows[:, 1::2].copy()
    half = values.shape[1] // 2
    return values[:, :half].copy(), values[:, half:].copy()


def write_keys(writer: gguf.GGUFWriter, model: Any, case: Case) -> None:
    """TextModel.set_gguf_parameters and what single architectures add."""
    c, kind = model.config, case.model_type
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    if "lfm2" in kind:
        writer.add_head_count_kv([c.num_key_value_heads if one != "conv" else 0 for one in c.layer_types])
        writer.add_shortconv_l_cache(c.conv_L_cache)
    else:
        writer.add_head_count_kv(c.num_key_value_heads)
    for name in ("rms_norm_eps", "norm_eps"):
        if kind != "nemotron" and getattr(c, name, None) is not None:
            writer.add_layer_norm_rms_eps(getattr(c, name))
            break
    for name in ("layer_norm_eps", "norm_epsilon", "norm_eps"):
        if kind in ("stablelm", "starcoder2", "cohere", "cohere2", "nemotron", "phi") and getattr(c, name, None):
            writer.add_layer_norm_eps(getattr(c, name))
            break
    if kind == "olmo":
        writer.add_layer_norm_eps(1e-5)
    if getattr(c, "head_dim", None) and kind not in ("granite", "granitemoe"):
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    _write_experts(writer, c, kind)
    _write_rope(writer, c, case)
    if kind == "granite" or kind == "granitemoe":
        writer.add_attention_scale(c.attention_multiplier)
        writer.add_embedding_scale(c.embedding_multiplier)
        writer.add_residual_scale(c.residual_multiplier)
    if kind in ("granite", "granitemoe"):
        writer.add_logit_scale(c.logits_scaling)
    if kind in ("cohere", "cohere2"):
        writer.add_logit_scale(c.logit_scale)
    if kind in ("gemma2", "gemma3_text", "cohere2", "exaone4", "gpt_oss", "phi3"):
        writer.add_sliding_window(c.sliding_window or 0)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if kind == "stablelm":
        writer.add_parallel_residual(c.use_parallel_residual)
    if kind in ("llama", "mixtral", "smollm3", "granite", "lfm2", "cohere2"):
        writer.add_vocab_size(c.vocab_size)


def _write_experts(writer: gguf.GGUFWriter, c: Any, kind: str) -> None:
    count = getattr(c, "num_local_experts", None) or getattr(c, "num_experts", None)
    if not count or kind not in ("mixtral", "qwen2_moe", "qwen3_moe", "lfm2_moe", "granitemoe", "olmoe", "gpt_oss"):
        return
    writer.add_expert_count(count)
    writer.add_expert_used_count(c.num_experts_per_tok)
    if kind in ("qwen2_moe", "qwen3_moe", "lfm2_moe"):
        writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    if kind == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)
    if kind == "lfm2_moe":
        writer.add_leading_dense_block_count(c.num_dense_layers)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _write_rope(writer: gguf.GGUFWriter, c: Any, case: Case) -> None:
    whole = c.rope_parameters
    rope = whole.get("full_attention", whole)
    kind = rope.get("rope_type", "default")
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    writer.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in whole:
        writer.add_rope_freq_base_swa(whole["sliding_attention"]["rope_theta"])
    if case.arch in (
        ARCH.LLAMA,
        ARCH.SMOLLM3,
        ARCH.GRANITE,
        ARCH.PHI3,
        ARCH.STABLELM,
        ARCH.NEMOTRON,
        ARCH.GLM4,
        ARCH.PHI2,
    ):
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if rope.get("beta_fast") is not None:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if case.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(c.original_max_position_embeddings)
    if kind == "longrope":
        scale = c.max_position_embeddings / c.original_max_position_embeddings
        writer.add_rope_scaling_attn_factors(
            float(np.sqrt(1 + np.log(scale) / np.log(c.original_max_position_embeddings)))
        )
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, head))


def _llama3_factors(rope: Mapping[str, Any], head: int) -> np.ndarray:
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, head, 2) / head)
    length = rope["original_max_position_embeddings"]
    found = []
    for wave in 2 * np.pi / frequencies:
        if wave < length / rope["high_freq_factor"]:
            found.append(1.0)
        elif wave > length / rope["low_freq_factor"]:
            found.append(rope["factor"])
        else:
            smooth = (length / wave - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(found, np.float32)


def byte_alphabet() -> list[str]:
    """GPT-2's character of every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(hidden)) for byte in range(256)]


def write_tokens(writer: gguf.GGUFWriter, vocabulary: int = VOCABULARY) -> None:
    """Bytes, two control tokens and what fills the embedding up."""
    tokens = [*byte_alphabet(), "<s>", "<|im_end|>"]
    kinds = [1] * 256 + [3, 3] + [5] * (vocabulary - 258)
    tokens += [f"[PAD{number}]" for number in range(258, vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ā Ā"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")


def write_file(
    path: Path,
    model: Any,
    case: Case,
    kind: Type | Callable[[str, np.ndarray], Type] = Type.F32,
    *,
    change: Callable[[gguf.GGUFWriter], None] | None = None,
    split: int = 0,
    tensors: Any = None,
) -> Path:
    """The file of a network, its matrices stored as `kind`, in files of `split` tensors if that is not 0."""
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[case.arch], split_max_tensors=split)
    write_keys(writer, model, case)
    write_tokens(writer, model.config.vocab_size)
    for key, value in case.extra.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, values in tensors or stored_tensors(model, case):
        wanted = kind if isinstance(kind, Type) else kind(name, values)
        fits = values.ndim > 1 and values.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 and "_norm" not in name
        if not fits or wanted == Type.F32:
            writer.add_tensor(name, np.ascontiguousarray(values))
        else:
            writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), wanted), raw_dtype=wanted)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
