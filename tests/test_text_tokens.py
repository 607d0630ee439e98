"""The tokens of a long text, made piece by piece, are those of the whole text."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from gulliver.tasks.text import tokenizer as tokenizer_file
from gulliver.tasks.text.tokenizer import tokens_of

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dogs",
    "while",
    "naïve",
    "Zürich",
    "東京",
    "машина",
    "한국어",
    "🙂",
    "don't",
    "12345",
    "x_y==z",
]


def prose(words: int, seed: int = 0) -> str:
    chosen = random.Random(seed)
    return "".join(
        chosen.choice(WORDS) + chosen.choice([" ", " ", "  ", "\n", "\n\n", ", ", "\t"]) for _ in range(words)
    )


def byte_level() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([prose(3000)], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    return core


def one_word_with_a_prefix() -> tokenizers.Tokenizer:
    """As SentencePiece's: no split before the merges, a mark before the text, tokens around it."""
    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    core.train_from_iterator([prose(3000)], trainers.BpeTrainer(vocab_size=600, special_tokens=special))
    around = [("<s>", 1), ("</s>", 2)]
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    return core


def lower_case_unigrams() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.Unigram())
    core.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase(), normalizers.StripAccents()])
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>")
    core.train_from_iterator([prose(3000)], trainer)
    return core


@pytest.mark.parametrize("core", [byte_level, one_word_with_a_prefix, lower_case_unigrams])
@pytest.mark.parametrize("text", [prose(4000, seed=1), "a" * 9_000, " " * 9_000, "e\u0301" * 4_000, "ab\r\n" * 2_000])
def test_pieces_give_the_tokens_of_the_whole(
    core: Callable[[], tokenizers.Tokenizer], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_file, "PIECE", 2_000)
    monkeypatch.setattr(tokenizer_file, "OVERLAP", 400)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core())
    assert tokens_of(tokenizer, text).tolist() == tokenizer(text)["input_ids"]


def test_a_long_text_is_not_tokenized_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level())
    text, longest = prose(60_000), 0

    class Watched:
        def encode(self, text: str, **options: Any) -> Any:
            nonlocal longest
            longest = max(longest, len(text))
            return tokenizer.backend_tokenizer.encode(text, **options)

    pieces = tokenizer_file._pieces(Watched(), text)  # type: ignore[arg-type]
    assert pieces is not None and len(pieces) == 1 + (len(text) - 1 - tokenizer_file.OVERLAP) // tokenizer_file.PIECE
    assert longest == tokenizer_file.PIECE + tokenizer_file.OVERLAP < len(text) / 3
    assert sum(map(len, pieces)) == len(tokenizer(text)["input_ids"])
