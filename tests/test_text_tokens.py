"""The tokens of a long text, made piece by piece, are those of the whole text."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
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


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("PIECE", 2_000), ("OVERLAP", 400), ("MARGIN", 40)):
        monkeypatch.setattr(tokenizer_file, name, count)


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
    small(monkeypatch)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core())
    assert tokens_of(tokenizer, text).tolist() == tokenizer(text)["input_ids"]
    assert tokenizer_file._parts(tokenizer, text) is not None or len(set(text)) == 1  # prose is not tokenized at once


def letters(vocabulary: str, **unknown: str) -> tokenizers.Tokenizer:
    names = [*unknown.values(), *vocabulary]
    return tokenizers.Tokenizer(models.BPE(vocab={name: at for at, name in enumerate(names)}, merges=[], **unknown))


def around(core: tokenizers.Tokenizer, template: str) -> tokenizers.Tokenizer:
    core.add_special_tokens(["<s>"])
    special = [("<s>", core.token_to_id("<s>"))]
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return core


def words() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return core


@pytest.mark.parametrize(
    ("core", "text"),
    [
        (words(), "the " * 1500 + "\n" * 3000),  # pieces without a token
        (words(), "\n" * 5000),
        (letters("ACGT"), "ACGT" * 1500),  # no token for what is not in the text
        (around(letters("ACGT"), "<s> $A"), "ACGT" * 1500),
        (around(letters("ACGT"), "$A <s>"), "ACGT" * 1500),
        (around(letters("ACGT", unk_token="<s>"), "<s> $A <s>"), "xACGT" * 1500),
        (around(letters("ACGT"), "<s> $A"), "<s>" + "ACGT<s>" * 900),  # spelled out in the text
    ],
)
def test_what_is_around_a_text_and_empty_pieces(
    core: tokenizers.Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokens_of(tokenizer, text).tolist() == tokenizer(text)["input_ids"]


def test_truncation_and_padding_of_the_file_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    core = byte_level()
    core.enable_truncation(500)
    core.enable_padding(length=512)
    text = prose(1500)
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level())(text)["input_ids"]
    assert tokens_of(transformers.PreTrainedTokenizerFast(tokenizer_object=core), text).tolist() == whole


def test_pieces_that_agree_only_for_a_while_are_not_joined() -> None:
    """Digits in threes: a run of single ones agrees wherever it is cut, and what follows does not."""
    old = np.arange(60, dtype=np.int32), np.arange(60)
    new = np.where(np.arange(60) < 45, old[0], 0), old[1]
    assert tokenizer_file._seam(old, new, 20, 40) == (20, 20)
    assert tokenizer_file._seam(old, new, 20, 50) is None


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
