"""What a GGUF file says beside its weights: architecture, rotary embedding, tokenizer, chat template.

Keys and values are those of llama.cpp's convert_hf_to_gguf.py, which its loader expects. A GGUF file names its
pre-tokenizer (`tokenizer.ggml.pre`) instead of describing it; llama.cpp holds the regular expressions. The name is
found here by comparing the rules of the model's own tokenizer with those, not by the hash of a sample, so that a
tokenizer trained by the user is known too, and one that llama.cpp would imitate badly is refused.

A SentencePiece tokenizer joins the neighbours whose union has the best score, where a byte-pair tokenizer joins the
pair with the lowest rank. The two agree when every way to split a token into two tokens is a pair, and the pairs of a
token stand together in rank: then score = -rank (what `_scores` checks).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from gulliver.core.errors import ConfigError
from gulliver.tasks.language.gguf.architectures import REMEDY, Architecture, no_place
from gulliver.tasks.language.gguf.pre_tokenizers import PRE_TOKENIZERS
from gulliver.tasks.text.tokenizer import load_tokenizer

GEMMA3_PATTERN = 6
"""llama.cpp takes every sixth layer of a Gemma 3 as global unless told otherwise."""


# ---- architecture -------------------------------------------------------------------------------------------------
def add_architecture(writer: gguf.GGUFWriter, network: Any, row: Architecture) -> int:
    """Write the network's sizes and its rotary embedding. Returns the context length that the file states.

    Where a layer sees a sliding window that llama.cpp does not have for the architecture, the context ends with it:
    up to there both compute the same. ConfigError for a rotary embedding that llama.cpp does not have.
    """
    config = network.config
    context, head_dim = config.max_position_embeddings, head_size(config)
    window: Any = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    sliding = [kind == "sliding_attention" for kind in kinds] if kinds else [bool(window)]
    if row.name == gguf.MODEL_ARCH.GEMMA3:
        if any(sliding):
            writer.add_sliding_window(window)
        if any(sliding) and sliding != [(layer + 1) % GEMMA3_PATTERN != 0 for layer in range(len(sliding))]:
            writer.add_sliding_window_pattern(sliding)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    elif any(sliding):
        context = min(context, window)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    _add_rope(writer, network, row)
    return context


def head_size(config: Any) -> int:
    """Columns of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_rope(writer: gguf.GGUFWriter, network: Any, row: Architecture) -> None:
    rope = network.config.rope_parameters
    if "full_attention" in rope:
        local = rope.get("sliding_attention", {})
        if local.get("rope_type", "default") != "default":
            raise no_place(f"the rotary embedding {local['rope_type']!r} in its local layers")
        if "rope_theta" in local:
            writer.add_rope_freq_base_swa(local["rope_theta"])
        rope = rope["full_attention"]
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise no_place("a rotary embedding of a part of each head")
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        odd = sorted(set(rope) & {"attention_factor", "mscale", "mscale_all_dim", "truncate"})
        if any(rope[key] is not None for key in odd):
            raise no_place(f"a rotary embedding of type 'yarn' with {odd[0]}")
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key in ("beta_fast", "beta_slow"):
            if rope.get(key) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{key}")(rope[key])
    if kind not in ("default", "linear", "yarn") and not (row.rope_factors and _constant_factors(rope, kind)):
        raise no_place(f"the rotary embedding {kind!r}")


def _constant_factors(rope: Mapping[str, Any], kind: str) -> bool:
    """Whether each rotary frequency is divided by one number whatever the text's length: Llama 3's, and ours for it."""
    if kind == "longrope":
        return rope["short_factor"] == rope["long_factor"] and rope.get("attention_factor") == 1.0
    return kind == "llama3"


def rope_factors(network: Any) -> np.ndarray | None:
    """Divisors of the rotary frequencies, float32 [head_dim / 2], where the network has them."""
    rope = network.config.rope_parameters
    if not _constant_factors(rope, rope.get("rope_type", "default")):
        return None
    head_dim = head_size(network.config)
    plain = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim))
    return (plain / network.model.rotary_emb.inv_freq).float().numpy()


# ---- tokenizer ----------------------------------------------------------------------------------------------------
UNMARKED = re.compile(r"<\|(.*\|)?>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
"""Tokens that some models do not mark as special though they control; llama.cpp's converter has the same list."""

NO_MERGE = "Ā Ā"
"""Takes the place of merges where there are none, because a GGUF list cannot be empty: zero bytes, never joined."""


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: Any) -> str:
    """Write the tokenizer and the chat template of the model in `folder`, whose network has `config`.

    Returns the name of what llama.cpp will do. ConfigError for a tokenizer that llama.cpp cannot imitate.
    """
    tokenizer, vocabulary = load_tokenizer(folder), config.vocab_size
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None:
        raise ConfigError(f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json, which GGUF needs{REMEDY}")
    raw = json.loads(core.to_str())
    model = raw["model"]
    if model["type"] != "BPE" or any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise _no_tokenizer(f"it is of type {model['type']}, and only plain byte-pair merges are cut alike")
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        name = "llama"
        writer.add_tokenizer_model(name)
        writer.add_add_space_prefix(_spaces(raw))
        writer.add_token_scores(_scores(model["vocab"], pairs, raw["added_tokens"], vocabulary))
    else:
        name = _pre_tokenizer(raw, bool(pairs))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_merges([" ".join(pair) for pair in pairs] or [NO_MERGE])
    tokens, kinds = _tokens(model, raw["added_tokens"], vocabulary)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _add_special(writer, tokenizer, config)
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = [{"name": key, "template": text} for key, text in template.items()]
    if template:
        writer.add_chat_template(template)
    return name


def _no_tokenizer(reason: str) -> ConfigError:
    return ConfigError(f"llama.cpp cannot imitate this model's tokenizer: {reason}{REMEDY}")


def _pre_tokenizer(raw: Mapping[str, Any], has_merges: bool) -> str:
    """llama.cpp's name for the rules that cut text before merging."""
    normalizer = raw["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":  # llama.cpp leaves NFC out; most text is NFC already
        raise _no_tokenizer(f"it changes text first ({normalizer['type']})")
    rules = []
    for part in _flat(raw["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            rules.append(("ByteLevel", part["use_regex"]))
        elif part["type"] == "Digits":
            rules.append(("Digits", part["individual_digits"]))
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            rules.append(("Split", part["pattern"].get("Regex")))
        else:
            raise _no_tokenizer(f"it cuts text by a rule of type {part['type']} that llama.cpp lacks")
    if not has_merges and [name for name, _ in rules] == ["ByteLevel"]:
        return "gpt-2"  # where every byte stays a token, no cut makes a difference
    found = PRE_TOKENIZERS.get((tuple(rules), bool(raw["model"].get("ignore_merges"))))
    if found is None:
        raise _no_tokenizer(f"it cuts text by {rules}; known are {', '.join(PRE_TOKENIZERS.values())}")
    return found


def _flat(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The rules of a tokenizer's part in order, sequences opened."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [inner for outer in part[key] for inner in _flat(outer, key)]
    return [part]


def _spaces(raw: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text; ConfigError when text is changed in a way SentencePiece does not."""
    before = False
    for part in [*_flat(raw["normalizer"], "normalizers"), *_flat(raw["pre_tokenizer"], "pretokenizers")]:
        kind, space = part["type"], part.get("pattern", {}).get("String") == " "
        if kind == "Prepend" and part["prepend"] == "▁":
            before = True
        elif kind == "Metaspace" and part["replacement"] == "▁" and not part.get("split", True):
            before = before or part["prepend_scheme"] != "never"
        elif not (kind == "Replace" and space and part["content"] == "▁") and not (kind == "Split" and space):
            raise _no_tokenizer(f"it changes or cuts text by a rule of type {kind}")
    return before


def _scores(
    ids: Mapping[str, int], pairs: list[tuple[str, ...]], added: Iterable[Mapping[str, Any]], vocabulary: int
) -> list[float]:
    """A score per token with which SentencePiece's joining equals the ranked pairs; ConfigError when there is none."""
    apart = {token["content"] for token in added}  # found in the text before anything is joined
    runs = [token for token, _ in groupby(left + right for left, right in pairs) if token not in apart]
    known = set(ids) - apart
    given = set(pairs)
    scattered = len(set(runs)) != len(runs)
    missing = (
        token
        for token in runs
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known and (token[:cut], token[cut:]) not in given
    )
    if scattered or next(missing, None) is not None:
        raise _no_tokenizer("its merges are not those of a SentencePiece model, which GGUF's scores stand for")
    lowest = -float(len(runs))
    scores = [lowest] * vocabulary
    for rank, token in enumerate(runs):
        if ids[token] < vocabulary:
            scores[ids[token]] = -float(rank)
    return scores


def _tokens(
    model: Mapping[str, Any], added: Iterable[Mapping[str, Any]], vocabulary: int
) -> tuple[list[str], list[gguf.TokenType]]:
    """Text and type of every embedding's token; numbers that no token has are unused."""
    kind = gguf.TokenType
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    kinds = [kind.UNUSED] * vocabulary
    for token, number in model["vocab"].items():
        if number < vocabulary and kinds[number] != kind.BYTE:  # Gemma's tab has its byte's number, too
            byte = model.get("byte_fallback") and re.fullmatch("<0x..>", token, re.DOTALL)
            tokens[number], kinds[number] = token, kind.BYTE if byte else kind.NORMAL
            if token == model.get("unk_token"):
                kinds[number] = kind.UNKNOWN
    for token in added:
        number, text = token["id"], token["content"]
        if number >= vocabulary or kinds[number] == kind.UNKNOWN:
            continue
        if token["special"] or UNMARKED.fullmatch(text):
            tokens[number], kinds[number] = text, kind.CONTROL
        else:
            tokens[number], kinds[number] = text.replace("▁", " "), kind.USER_DEFINED
    return tokens, kinds


def _add_special(writer: gguf.GGUFWriter, tokenizer: Any, config: Any) -> None:
    """The special tokens, and which of them the tokenizer puts around every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((at for at in range(len(full)) if full[at : at + len(plain)] == plain), 0)
    before, after = full[:start], full[start + len(plain) :]
    if len(before) > 1 or len(after) > 1:
        raise _no_tokenizer(f"it puts {len(before)} tokens before and {len(after)} behind every text")
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    end = ends[0] if tokenizer.eos_token_id is None and ends else tokenizer.eos_token_id
    numbers = {
        "bos": before[0] if before else tokenizer.bos_token_id,
        "eos": after[0] if after else end,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    for role, number in numbers.items():
        if number is not None and number < config.vocab_size:
            getattr(writer, f"add_{role}_token_id")(number)
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
