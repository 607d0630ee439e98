"""What a GGUF file's metadata says, as the config of the network that transformers runs; no library is needed.

The rules are those of llama.cpp's converter and of its loader (src/models), which fills in what a file leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gulliver.core.errors import ArtifactError
from gulliver.core.foreign import foreign
from gulliver.core.names import did_you_mean
from gulliver.tasks.language.gguf.header import Header, TensorInfo, Texts, read_header
from gulliver.tasks.language.gguf.keys import Metadata, refuse_parts
from gulliver.tasks.language.gguf.pre_tokenizers import check_tokenizer

ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
FACTORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)
"""Divisors of the rotary frequencies, float32 [rotated pairs]: constant, or for long and for short texts."""
MAX_LAYERS = 10_000


@dataclass(frozen=True)
class Reading:
    """How the files of one architecture are read.

    `model_type` and `network` are transformers' names. `permuted`: rows of q and k lie
    for llama.cpp's own rotary embedding. `norm_offset` is in every stored norm, and comes off. `options` are what the
    architecture always has; `numbers` a key -> the config's name for it; `finish` adds what takes more than a name.
    """

    model_type: str
    network: str
    permuted: bool = False
    norm_offset: float = 0.0
    partial: bool = False
    epsilon: tuple[str, str] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
    options: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    finish: Callable[[Metadata, dict[str, Any]], None] | None = None


LAYER_NORM = ("attention.layer_norm_epsilon", "layer_norm_eps")
FULL, SLIDING = "full_attention", "sliding_attention"
_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_LOCAL_EXPERTS = {**_EXPERTS, "expert_count": "num_local_experts"}
_MOE = {**_EXPERTS, "expert_feed_forward_length": "moe_intermediate_size"}
_GRANITE = {
    **{"attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier"},
    **{"residual_scale": "residual_multiplier", "logit_scale": "logits_scaling"},
}


def _has(meta: Metadata, name: str) -> bool:
    return name in meta.header.tensors


def _llama(meta: Metadata, options: dict[str, Any]) -> None:
    options["attention_bias"] = _has(meta, "blk.0.attn_q.bias")
    options["mlp_bias"] = _has(meta, "blk.0.ffn_up.bias")
    window, experts = meta.whole("attention.sliding_window", 0, 0), meta.whole("expert_count", 0, 0)
    if experts or window:
        kind = "Mixtral" if experts else "Mistral"
        options |= {
            "architectures": [f"{kind}ForCausalLM"],
            "model_type": kind.lower(),
            "sliding_window": window or None,
        }
        if options.pop("attention_bias") or options.pop("mlp_bias"):
            raise ArtifactError(f"{meta.header.path}: a {kind} with biases has no place in transformers")
    if experts:
        options |= {"num_local_experts": experts, "num_experts_per_tok": meta.whole("expert_used_count")}


def _windows(meta: Metadata, options: dict[str, Any], pattern: int, last_full: bool = True) -> None:
    """Which layers see a window: a list of truths, or every `pattern`-th layer does not."""
    layers = options["num_hidden_layers"]
    given = meta.value("attention.sliding_window_pattern", pattern)
    if isinstance(given, list):
        if len(given) != layers or not set(given) <= {True, False}:
            raise meta.wrong("attention.sliding_window_pattern", given, f"{layers} truths or one number")
        sliding = [bool(one) for one in given]
    else:
        period = meta.whole("attention.sliding_window_pattern", pattern, 1)
        sliding = [period > 1 and (layer + 1) % period != 0 for layer in range(layers)]
        if not last_full:
            sliding = [period > 1 and layer % period != 0 for layer in range(layers)]
    window = meta.whole("attention.sliding_window", 0, 0)
    options["sliding_window"] = window or None
    options["layer_types"] = [SLIDING if one and window else FULL for one in sliding]


def _gemma2(meta: Metadata, options: dict[str, Any]) -> None:
    wide = 46 if meta.architecture == "gemma2" else 62  # the one Gemma of each kind whose attention is scaled otherwise
    alone = options["hidden_size"] // options["num_attention_heads"]
    options["query_pre_attn_scalar"] = alone if options["num_hidden_layers"] == wide else options["head_dim"]
    cap = 0 if meta.architecture == "gemma3" else 30.0
    options["final_logit_softcapping"] = meta.number("final_logit_softcapping", cap) or None
    options["attn_logit_softcapping"] = meta.number("attn_logit_softcapping", 50.0 if cap else 0) or None
    _windows(meta, options, 2 if cap else 6)
    if not cap:
        local = {"rope_type": "default", "rope_theta": meta.number("rope.freq_base_swa", 10000.0, 1e-6)}
        options["rope_parameters"] = {FULL: options["rope_parameters"], SLIDING: local}


def _granite(meta: Metadata, options: dict[str, Any]) -> None:
    options["attention_bias"] = _has(meta, "blk.0.attn_q.bias")
    if not options.get("attention_multiplier"):
        options["attention_multiplier"] = options["head_dim"] ** -0.5
    for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        options[name] = options.get(name) or 1.0
    own = options.pop("head_dim")
    if own * options["num_attention_heads"] != options["hidden_size"]:
        raise meta.wrong("attention.key_length", own, "the width divided by the heads")


def _smollm3(meta: Metadata, options: dict[str, Any]) -> None:
    layers = options["num_hidden_layers"]
    options |= {"no_rope_layer_interval": 4, "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(layers)]}
    options |= {"use_sliding_window": False, "attention_bias": _has(meta, "blk.0.attn_q.bias")}
    options["layer_types"] = [FULL] * layers


def _lfm2(meta: Metadata, options: dict[str, Any]) -> None:
    layers, given = options["num_hidden_layers"], options.pop("num_key_value_heads")
    each = given if isinstance(given, list) else [given] * layers
    heads = sorted({one for one in each if one})
    if len(each) != layers or len(heads) != 1:
        raise meta.wrong("attention.head_count_kv", given, f"{layers} numbers: one for attention, 0 for convolutions")
    options |= {"num_key_value_heads": heads[0], "layer_types": [FULL if one else "conv" for one in each]}
    options["conv_bias"] = any(name.endswith("shortconv.conv.bias") for name in meta.header.tensors)
    if meta.architecture == "lfm2":
        options["block_auto_adjust_ff_dim"] = False
    else:
        options["use_expert_bias"] = any("exp_probs_b" in name for name in meta.header.tensors)
        if meta.whole("expert_gating_func", 2, 0) != 2:
            raise meta.wrong("expert_gating_func", meta.value("expert_gating_func"), "2, the sigmoid")


def _phi3(meta: Metadata, options: dict[str, Any]) -> None:
    options["sliding_window"] = meta.whole("attention.sliding_window", 0, 0) or None
    trained = meta.whole("rope.scaling.original_context_length", options["max_position_embeddings"])
    options["original_max_position_embeddings"] = trained


def _qwen2moe(meta: Metadata, options: dict[str, Any]) -> None:
    shared = meta.header.tensors.get("blk.0.ffn_up_shexp.weight")
    stated = meta.whole("expert_shared_feed_forward_length", None)
    options["shared_expert_intermediate_size"] = stated or (shared.shape[0] if shared else 0)
    if "moe_intermediate_size" not in options:
        options["moe_intermediate_size"] = meta.header.tensors["blk.0.ffn_up_exps.weight"].shape[1]


def _cohere(meta: Metadata, options: dict[str, Any]) -> None:
    if meta.architecture == "cohere2":
        _windows(meta, options, 4)
    else:
        options["use_qk_norm"] = _has(meta, "blk.0.attn_q_norm.weight")
    options["attention_bias"] = _has(meta, "blk.0.attn_q.bias")


def _stablelm(meta: Metadata, options: dict[str, Any]) -> None:
    options["use_parallel_residual"] = meta.truth("use_parallel_residual", False)
    options["use_qkv_bias"] = _has(meta, "blk.0.attn_q.bias")
    if _has(meta, "blk.0.attn_q_norm.weight"):
        raise ArtifactError(f"{meta.header.path}: norms of single heads in a StableLM are not read from GGUF")


def _exaone4(meta: Metadata, options: dict[str, Any]) -> None:
    _windows(meta, options, 4)
    options["sliding_window_pattern"] = 4 if options["sliding_window"] else None


def _gpt_oss(meta: Metadata, options: dict[str, Any]) -> None:
    _windows(meta, options, 2)
    options["rope_parameters"]["truncate"] = False
    if meta.whole("expert_gating_func", 0, 0) not in (0, 3):
        raise meta.wrong("expert_gating_func", meta.value("expert_gating_func"), "3, softmax over the chosen ones")


def _olmo2(meta: Metadata, options: dict[str, Any]) -> None:
    if meta.whole("attention.sliding_window", 0, 0):
        _windows(meta, options, 4)
        options |= {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3"}


def _olmo(meta: Metadata, options: dict[str, Any]) -> None:
    options["clip_qkv"] = meta.number("attention.clamp_kqv", 0) or None


def _biases(meta: Metadata, options: dict[str, Any]) -> None:
    options["attention_bias"] = _has(meta, "blk.0.attn_q.bias")
    options["attention_out_bias"] = _has(meta, "blk.0.attn_output.bias")
    options["mlp_bias"] = _has(meta, "blk.0.ffn_up.bias")


READ: Mapping[str, Reading] = {
    "llama": Reading("llama", "LlamaForCausalLM", permuted=True, finish=_llama),
    "mistral": Reading("mistral", "MistralForCausalLM", permuted=True, options={"sliding_window": None}, finish=_llama),
    "qwen2": Reading("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Reading("qwen3", "Qwen3ForCausalLM"),
    "qwen2moe": Reading(
        "qwen2_moe", "Qwen2MoeForCausalLM", numbers=_MOE, finish=_qwen2moe, options={"norm_topk_prob": False}
    ),
    "qwen3moe": Reading("qwen3_moe", "Qwen3MoeForCausalLM", numbers=_MOE, options={"norm_topk_prob": True}),
    "gemma": Reading("gemma", "GemmaForCausalLM", norm_offset=1.0, options={"hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2": Reading("gemma2", "Gemma2ForCausalLM", norm_offset=1.0, finish=_gemma2),
    "gemma3": Reading("gemma3_text", "Gemma3ForCausalLM", norm_offset=1.0, finish=_gemma2),
    "phi3": Reading("phi3", "Phi3ForCausalLM", partial=True, finish=_phi3),
    "smollm3": Reading("smollm3", "SmolLM3ForCausalLM", permuted=True, finish=_smollm3),
    "lfm2": Reading(
        "lfm2",
        "Lfm2ForCausalLM",
        epsilon=("attention.layer_norm_rms_epsilon", "norm_eps"),
        numbers={"shortconv.l_cache": "conv_L_cache"},
        finish=_lfm2,
    ),
    "lfm2moe": Reading(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        epsilon=("attention.layer_norm_rms_epsilon", "norm_eps"),
        finish=_lfm2,
        numbers={**_MOE, "shortconv.l_cache": "conv_L_cache", "leading_dense_block_count": "num_dense_layers"},
        options={"norm_topk_prob": True},
    ),
    "granite": Reading("granite", "GraniteForCausalLM", permuted=True, numbers=_GRANITE, finish=_granite),
    "granitemoe": Reading(
        "granitemoe", "GraniteMoeForCausalLM", permuted=True, numbers={**_GRANITE, **_LOCAL_EXPERTS}, finish=_granite
    ),
    "olmo": Reading(
        "olmo", "OlmoForCausalLM", permuted=True, epsilon=("attention.layer_norm_epsilon", ""), finish=_olmo
    ),
    "olmo2": Reading("olmo2", "Olmo2ForCausalLM", finish=_olmo2),
    "olmoe": Reading("olmoe", "OlmoeForCausalLM", numbers=_EXPERTS, options={"norm_topk_prob": False}),
    "stablelm": Reading("stablelm", "StableLmForCausalLM", partial=True, epsilon=LAYER_NORM, finish=_stablelm),
    "starcoder2": Reading(
        "starcoder2",
        "Starcoder2ForCausalLM",
        epsilon=("attention.layer_norm_epsilon", "norm_epsilon"),
        options={"sliding_window": None, "use_bias": True},
    ),
    "command-r": Reading(
        "cohere", "CohereForCausalLM", epsilon=LAYER_NORM, numbers={"logit_scale": "logit_scale"}, finish=_cohere
    ),
    "cohere2": Reading(
        "cohere2", "Cohere2ForCausalLM", epsilon=LAYER_NORM, numbers={"logit_scale": "logit_scale"}, finish=_cohere
    ),
    "exaone4": Reading("exaone4", "Exaone4ForCausalLM", finish=_exaone4),
    "ernie4_5": Reading("ernie4_5", "Ernie4_5ForCausalLM", options={"use_bias": False}),
    "arcee": Reading("arcee", "ArceeForCausalLM", permuted=True),
    "seed_oss": Reading("seed_oss", "SeedOssForCausalLM", finish=_biases),
    "hunyuan-dense": Reading("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM"),
    "gpt-oss": Reading("gpt_oss", "GptOssForCausalLM", numbers=_LOCAL_EXPERTS, finish=_gpt_oss),
    "nemotron": Reading(
        "nemotron",
        "NemotronForCausalLM",
        norm_offset=1.0,
        partial=True,
        epsilon=("attention.layer_norm_epsilon", "norm_eps"),
    ),
    "glm4": Reading("glm4", "Glm4ForCausalLM", partial=True, finish=_biases),
    "phi2": Reading("phi", "PhiForCausalLM", partial=True, epsilon=LAYER_NORM),
}
"""Name of an architecture in files -> how it is read."""


def reading_of(header: Header) -> tuple[str, Reading]:
    """The architecture that a file names, and its row. ArtifactError when it is not read."""
    refuse_parts(header)
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ArtifactError(f"{header.path} does not say general.architecture; the file is damaged or too old")
    if name not in READ:
        raise ArtifactError(f"{header.path}: the GGUF architecture {name[:60]!r} is not read{did_you_mean(name, READ)}")
    return name, READ[name]


def config_of(header: Header) -> dict[str, Any]:
    """The options of transformers' config for a file, `model_type` among them, without those of its tokenizer.

    ArtifactError for an architecture that is not read, a key that is missing, wrong or has no meaning here.
    """
    name, row = reading_of(header)
    tensors = header.tensors
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise ArtifactError(f"{header.path} holds no token_embd.weight; it is not a language model's file")
    meta = Metadata(header, name)
    heads, width = meta.whole("attention.head_count"), meta.whole("embedding_length")
    options: dict[str, Any] = {
        "model_type": row.model_type,
        "architectures": [row.network],
        "hidden_size": width,
        "intermediate_size": meta.whole("feed_forward_length"),
        "num_hidden_layers": meta.whole("block_count", least=1, most=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(meta, heads),
        "head_dim": _head_dim(meta, width // heads),
        "max_position_embeddings": meta.whole("context_length"),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    epsilon = meta.number(row.epsilon[0])
    options |= {row.epsilon[1]: epsilon} if row.epsilon[1] else {}
    options["rope_parameters"] = _rope(meta, options, row)
    options |= row.options
    for key, known in row.numbers.items():
        if (found := meta.value(key, None)) is not None:
            options[known] = meta.number(key) if isinstance(found, float) else meta.whole(key, least=0)
    if row.finish is not None:
        row.finish(meta, options)
    if row.partial:  # which heads of these networks are as wide as the hidden size says
        options["partial_rotary_factor"] = options["rope_parameters"].get("partial_rotary_factor", 1.0)
    meta.refuse_left()
    return options


def _kv_heads(meta: Metadata, heads: int) -> Any:
    given = meta.value("attention.head_count_kv", heads)
    if meta.architecture in ("lfm2", "lfm2moe") and isinstance(given, list):
        return given
    found = meta.whole("attention.head_count_kv", heads)
    if heads % found:
        raise meta.wrong("attention.head_count_kv", found, f"a divisor of the {heads} heads")
    return found


def _head_dim(meta: Metadata, usual: int) -> int:
    key = meta.whole("attention.key_length", usual)
    if meta.whole("attention.value_length", key) != key:
        raise meta.wrong("attention.value_length", meta.value("attention.value_length"), f"{key}, as the keys have")
    for kind in ("key", "value"):
        if meta.whole(f"attention.{kind}_length_swa", key) != key:
            raise meta.wrong(f"attention.{kind}_length_swa", meta.value(f"attention.{kind}_length_swa"), str(key))
    return key


def _rope(meta: Metadata, options: Mapping[str, Any], row: Reading) -> dict[str, Any]:
    """The rotary embedding of all layers, or of those without a window; FACTORS are filled in when they are read."""
    tensors, context = meta.header.tensors, options["max_position_embeddings"]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": meta.number("rope.freq_base", 10000.0, 1e-6)}
    rotated = meta.whole("rope.dimension_count", options["head_dim"])
    meta.whole("rope.dimension_count_swa", rotated)
    if rotated != options["head_dim"]:
        if not row.partial:
            raise meta.wrong("rope.dimension_count", rotated, f"{options['head_dim']}, all of a head")
        rope["partial_rotary_factor"] = rotated / options["head_dim"]
    sections = meta.value("rope.dimension_sections", [])
    if isinstance(sections, Texts) or any(sections):
        raise meta.wrong("rope.dimension_sections", sections, "left out: positions are one number here")
    kind = meta.value("rope.scaling.type", "none")
    trained = meta.whole("rope.scaling.original_context_length", None)
    factor = meta.number("rope.scaling.factor", None, 1e-6)
    attention = meta.number("rope.scaling.attn_factor", 1.0)
    if ROPE_FACTORS in tensors and LONG_FACTORS not in tensors and kind == "none":
        rope |= {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0}
        return rope | {"original_max_position_embeddings": trained or context}
    if LONG_FACTORS in tensors and SHORT_FACTORS in tensors and kind in ("none", "longrope"):
        rope |= {"rope_type": "longrope", "factor": context / (trained or context), "attention_factor": attention}
        return rope | {"original_max_position_embeddings": trained or context}
    if any(name in tensors for name in FACTORS) or kind not in ("none", "linear", "yarn") or attention not in (0, 1):
        told = f"its rotary embedding is of type {str(kind)[:40]!r} with " + ", ".join(
            name for name in (*FACTORS, "no factors") if name in tensors or name == "no factors"
        )
        raise ArtifactError(f"{meta.header.path}: {told}, which is not known here")
    if kind != "none" and factor not in (None, 0.0, 1.0):
        rope |= {"rope_type": kind, "factor": factor}
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = trained or context
        for key in ("beta_fast", "beta_slow"):
            if (found := meta.number(f"rope.scaling.yarn_{key}", None)) is not None:
                rope[key] = found
    return rope


def rope_factor_tensors(header: Header) -> dict[str, TensorInfo]:
    """The tensors of FACTORS that a file has."""
    found = {name: header.tensors[name] for name in FACTORS if name in header.tensors}
    for name, tensor in found.items():
        if math.prod(tensor.shape) > 65_536:  # rotated pairs of a head, many times over
            raise ArtifactError(f"{header.path}: {name} has shape {list(tensor.shape)}; the file is damaged")
    return found


def checked(path: Path) -> tuple[Header, dict[str, Any]]:
    """Header and config of a file that can be read. ArtifactError, within milliseconds, for any other."""
    with foreign(f"{path} is not a readable GGUF file", remedy="; download it again"):
        header = read_header(path)
        options = config_of(header)
        check_tokenizer(header)
    return header, options


def files_of(path: Path) -> tuple[Path, ...]:
    """All files of the model that `path` is of, in order. ArtifactError when it cannot be read."""
    return checked(path)[0].files
