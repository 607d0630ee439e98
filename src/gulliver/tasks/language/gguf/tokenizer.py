"""A GGUF file's tokenizer and chat template as the files of a Hugging Face layout folder.

Two kinds are read. "gpt2" is byte-level BPE: tokens, merges in order of rank, and a pre-tokenizer by name. "llama" is
SentencePiece's BPE: the neighbours whose union has the best score are joined first. As ranked merges that is every way
to split a token into two tokens, in the order of the token's score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from gulliver.core.errors import ArtifactError
from gulliver.tasks.language.gguf.header import Header
from gulliver.tasks.language.gguf.pre_tokenizers import BEGINS, COMPOSED, RULES, pre_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
"""Role of a special token -> how its key spells it (the third is spelled wrong everywhere)."""
ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<|return|>", "<|call|>")
"""Texts of control tokens that end an answer, whether or not the file says so; llama.cpp has such a list, too."""
MAX_SPLIT_CHARACTERS = 2**28
"""Of all ways to split all tokens; 262,144 tokens of ten characters have a tenth of it."""
PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")
"""Control tokens of Phi 3 that do not take the spaces behind them."""


def write_tokenizer(header: Header, folder: Path) -> dict[str, int | list[int] | None]:
    """Write tokenizer.json, tokenizer_config.json and the chat template. Returns the config's ids of special tokens."""
    meta = header.metadata
    tokens = meta["tokenizer.ggml.tokens"].read()
    kinds = meta.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    ids = {role: _id(meta, key, len(tokens)) for role, key in ROLES.items()}
    core = (
        _byte_level(header, tokens, kinds) if meta["tokenizer.ggml.model"] == "gpt2" else _pieces(meta, tokens, kinds)
    )
    phi3 = "phi-3" in str(meta.get("general.name", "")).lower()
    special, ordinary = [], []
    for text, kind in zip(tokens, kinds, strict=True):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED) and text:
            spaces = phi3 and kind == CONTROL and text not in PHI3_PLAIN
            token = tokenizers.AddedToken(text, special=kind != USER_DEFINED, normalized=False, rstrip=spaces)
            (ordinary if kind == USER_DEFINED else special).append(token)
    core.add_special_tokens(special)
    core.add_tokens(ordinary)
    _surround(header, core, tokens, ids)
    core.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings["model_max_length"] = meta.get(f"{meta['general.architecture']}.context_length")
    settings |= {f"{role}_token": tokens[number] for role, number in ids.items() if number is not None}
    settings |= _write_templates(meta, folder)
    _write_json(folder / "tokenizer_config.json", settings)
    _write_ends(meta, tokens, kinds, ids, folder)
    return {f"{role}_token_id": ids[role] for role in ("bos", "eos", "pad")}


def _id(meta: Mapping[str, Any], key: str, count: int) -> int | None:
    found = meta.get(f"tokenizer.ggml.{key}_token_id")
    return found if type(found) is int and 0 <= found < count else None


def _vocabulary(tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, int]:
    """Text -> number of every token but those that only fill the embedding up; the first of equal texts."""
    found: dict[str, int] = {}
    for number, (text, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if not (kind == UNUSED and text == f"[PAD{number}]"):
            found.setdefault(text, number)
    return found


def _byte_level(header: Header, tokens: Sequence[str], kinds: Sequence[int]) -> Any:
    """The tokenizer of byte-level BPE."""
    rules, whole = RULES[pre_of(header)]
    vocabulary = _vocabulary(tokens, kinds)
    pairs = []
    for merge in header.metadata["tokenizer.ggml.merges"].read():
        left, _, right = merge[1:].partition(" ")
        pair = (merge[:1] + left, right)
        if pair[0] in vocabulary and pair[1] in vocabulary and "".join(pair) in vocabulary:
            pairs.append(pair)
    core = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=whole))
    if pre_of(header) in COMPOSED:
        core.normalizer = normalizers.NFC()
    steps: list[Any] = []
    for name, value in rules:
        if name == "Split":
            steps.append(pre_tokenizers.Split(tokenizers.Regex(value), "isolated"))
        elif name == "Digits":
            steps.append(pre_tokenizers.Digits(individual_digits=value))
        else:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=value))
    core.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    return core


def _pieces(meta: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> Any:
    """The tokenizer of SentencePiece's BPE."""
    vocabulary, scores = _vocabulary(tokens, kinds), meta["tokenizer.ggml.scores"]
    apart = {text for text, kind in zip(tokens, kinds, strict=True) if kind not in (NORMAL, UNUSED)}
    known = {text: number for text, number in vocabulary.items() if text not in apart}
    if sum(len(text) ** 2 for text in known) > MAX_SPLIT_CHARACTERS:
        raise ArtifactError("its tokens are too long: their ways to be split are more than any vocabulary's")
    ranked = sorted(known, key=lambda text: (-scores[known[text]], known[text]))
    pairs = []
    for text in ranked:
        splits = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        found = [pair for pair in splits if pair[0] in known and pair[1] in known]
        pairs += sorted(found, key=lambda pair: (known[pair[0]], known[pair[1]]))
    unknown = next((text for text, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    bytes_ = any(kind == BYTE for kind in kinds)
    core = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=bytes_))
    spaces, before = normalizers.Replace(" ", "▁"), meta.get("tokenizer.ggml.add_space_prefix", True)
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if before else spaces
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if before else steps)
    return core


def _surround(header: Header, core: Any, tokens: Sequence[str], ids: Mapping[str, int | None]) -> None:
    """What is put around every text."""
    meta = header.metadata
    pieces = meta["tokenizer.ggml.model"] == "llama"
    begins = meta.get("tokenizer.ggml.add_bos_token", pieces or pre_of(header) in BEGINS) and ids["bos"] is not None
    ends = meta.get("tokenizer.ggml.add_eos_token", False) and ids["eos"] is not None
    around = {role: tokens[ids[role]] for role, there in (("bos", begins), ("eos", ends)) if there}  # type: ignore[index]
    if around:
        single = [part for part in (around.get("bos"), "$A", around.get("eos")) if part]
        named = [(around[role], ids[role]) for role in around]
        core.post_processor = processors.TemplateProcessing(single=single, pair=[*single, "$B:1"], special_tokens=named)


def _write_templates(meta: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write the chat template; returns what belongs into tokenizer_config.json: all of them where there are several."""
    start = "tokenizer.chat_template"
    named = {key.removeprefix(f"{start}."): value for key, value in meta.items() if key.startswith(f"{start}.")}
    plain = meta.get(start)
    templates = {name: text for name, text in (("default", plain), *named.items()) if isinstance(text, str) and text}
    if set(templates) == {"default"}:
        (folder / "chat_template.jinja").write_text(templates["default"], encoding="utf-8")
        return {}
    return (
        {"chat_template": [{"name": name, "template": text} for name, text in templates.items()]} if templates else {}
    )


def _write_ends(
    meta: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int], ids: Mapping[str, int | None], folder: Path
) -> None:
    """generation_config.json with every token that ends an answer, where that is more than the end of a text."""
    ends = [ids["eos"], _id(meta, "eot", len(tokens)), _id(meta, "eom", len(tokens))]
    texts = set(ENDS_OF_TURN)
    ends += [number for number, text in enumerate(tokens) if text in texts and kinds[number] in (CONTROL, USER_DEFINED)]
    found = sorted({number for number in ends if number is not None})
    if found and found != [ids["eos"]]:
        _write_json(folder / "generation_config.json", {"eos_token_id": found})


def _write_json(path: Path, body: Any) -> None:
    path.write_text(json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
