"""How byte-level tokenizers cut text before they merge: llama.cpp's names for it (tokenizer.ggml.pre), and the rules.

A GGUF file names its pre-tokenizer instead of describing it; llama.cpp holds the regular expressions (llama-vocab.cpp,
which cites each model's own tokenizer.json; those originals are the ones here). Rules run in order, each on the pieces
that the one before it left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gulliver.core.errors import ArtifactError
from gulliver.tasks.language.gguf.header import Header, Texts

Rules = tuple[tuple[str, Any], ...]
"""("Split", regex) and ("Digits", each alone), and at last ("ByteLevel", whether GPT-2's own regex cuts)."""

_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
QWEN2 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_QWEN35 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_ENDS}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HEAD = r"[^\r\n\p{L}\p{N}]?"
TEKKEN = rf"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"
_GPT4O = (
    rf"{_HEAD}{_UPPER}*{_LOWER}+{_SHORT}?|{_HEAD}{_UPPER}+{_LOWER}*{_SHORT}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"
)
_SEED = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_ENDS}"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_ENDS}"
)
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"


def _cut(*patterns: str) -> Rules:
    return (*(("Split", pattern) for pattern in patterns), ("ByteLevel", False))


_PLAIN: Rules = (("ByteLevel", True),)
_DIGITS: Rules = (("Digits", True), ("ByteLevel", True))
PRE_TOKENIZERS: Mapping[tuple[Rules, bool], str] = {
    (_PLAIN, False): "gpt-2",
    (_DIGITS, False): "smollm",
    (_cut(QWEN2), False): "qwen2",
    (_cut(LLAMA3), True): "llama-bpe",
    (_cut(LLAMA3), False): "smaug-bpe",
    (_cut(TEKKEN), True): "tekken",
    (_cut(_QWEN35), False): "qwen35",
    (_cut(_GPT4O), False): "gpt-4o",
    (_cut(_SEED), False): "seed-coder",
    (_cut(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3), False): "deepseek-v3",
    (_cut("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"), False): "deepseek-coder",
    (_cut(_BAILING), False): "bailingmoe",
    (
        (("Split", r"[\p{P}\$\+<=>\^~\|]+"), ("Split", r"\p{N}+"), ("Split", "[0-9][0-9][0-9]"), *_PLAIN),
        False,
    ): "default",
}
"""(rules in order, whether a whole word of the vocabulary is taken without merging) -> llama.cpp's name."""

SAME: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (
        "phi-2",
        "gigachat",
        "a.x-4.0",
        "mellum",
        "exaone4",
        "mpt",
        "olmo",
        "jais",
        "trillion",
        "granite-docling",
    ),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "qwen2": ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "smaug-bpe": ("dbrx", "chatglm-bpe", "glm4"),
    "gpt-4o": ("llama4", "kanana2", "talkie", "minimax-m2"),
    "deepseek-v3": ("hunyuan-dense", "joyai-llm"),
    "bailingmoe": ("bailingmoe2", "llada-moe"),
}
"""Name -> other names of the same rules."""
RULES: Mapping[str, tuple[Rules, bool]] = {
    other: rules for rules, name in PRE_TOKENIZERS.items() for other in (name, *SAME.get(name, ()))
}
"""Name in a file -> (rules in order, whether a whole word is taken without merging)."""
BEGINS = ("llama-bpe", *SAME["llama-bpe"], "tekken")
"""Where <s> is put before every text unless the file says otherwise."""
COMPOSED = ("qwen2", "qwen35", "deepseek-r1-qwen")
"""Whose models compose characters first (NFC), which llama.cpp leaves out."""
KINDS = ("gpt2", "llama")
"""Kinds of tokenizers that are read: byte-level BPE, and SentencePiece's."""


def pre_of(header: Header) -> str:
    """The name of a file's pre-tokenizer."""
    return str(header.metadata.get("tokenizer.ggml.pre", "default"))


def check_tokenizer(header: Header) -> None:
    """ArtifactError for a tokenizer that is not read, or does not fit the embedding."""
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind not in KINDS:
        told = f"{header.path}: the tokenizer is of the kind {str(kind)[:40]!r}; {' and '.join(KINDS)} are read"
        raise ArtifactError(f"{told}: use the original model")
    name = pre_of(header)
    if kind == "gpt2" and name not in RULES:
        raise ArtifactError(f"{header.path}: the pre-tokenizer {name[:40]!r} is not known here; use the original model")
    for key in ("tokens", "merges") if kind == "gpt2" else ("tokens",):
        if not isinstance(header.metadata.get(f"tokenizer.ggml.{key}"), Texts):
            raise ArtifactError(f"{header.path} does not list tokenizer.ggml.{key}; the file is damaged or too old")
    count, rows = len(header.metadata["tokenizer.ggml.tokens"]), header.tensors["token_embd.weight"].shape[0]
    if count > rows:
        raise ArtifactError(f"{header.path} names {count} tokens, its embedding has {rows} rows; the file is damaged")
    for key in ("token_type", *(("scores",) if kind == "llama" else ())):
        given = header.metadata.get(f"tokenizer.ggml.{key}")
        if (key == "scores" or given is not None) and not (isinstance(given, list) and len(given) == count):
            raise ArtifactError(f"{header.path}: tokenizer.ggml.{key} is not a list of {count} numbers; it is damaged")
