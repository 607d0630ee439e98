"""The tokenizer beside a model's weights, through transformers; and the one that a fresh network reads bytes by."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gulliver.core.foreign import foreign
from gulliver.nets.files import check_tokenizer_files
from gulliver.nets.quiet import quiet

END_OF_TEXT = "<|end|>"
BYTE_VOCABULARY = 257
"""A fresh network reads bytes; id 256 ends a text."""
PIECE, OVERLAP, MARGIN = 100_000, 2_000, 200
"""Characters of a long text that are tokenized at once, how many of them the next piece has too, and how many at the
end of a piece may have other tokens than in the whole text."""
TRIES = 16
"""Tokens in the middle of an overlap at which pieces may be joined."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder. ArtifactError when there is none."""
    stamp = max((file.stat().st_mtime_ns for file in folder.glob("*token*")), default=0)
    return _tokenizer(str(folder), stamp)


@lru_cache(maxsize=4)
def _tokenizer(folder: str, stamp: int) -> Any:
    check_tokenizer_files(Path(folder))
    with foreign(f"{folder} has no usable tokenizer"), quiet():
        found = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        found("a")  # some settings are looked at only now
        return found


def tokens_of(tokenizer: Any, text: str) -> Tensor:
    """All tokens of a text, int64 [n]: what `tokenizer(text)` gives.

    A long text is tokenized in pieces, since the whole at once takes over a hundred bytes for each character. Two
    pieces are joined where the tokens of both are the same from there on, for hundreds of characters; where they
    nowhere are, the whole is tokenized at once.
    """
    with foreign("the model's tokenizer fails"):
        parts = _parts(tokenizer, text) if tokenizer.is_fast and len(text) > PIECE + OVERLAP else None
        if parts is None:
            return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
        return torch.cat([torch.from_numpy(part).long() for part in parts])


def _parts(tokenizer: Any, text: str) -> list[np.ndarray] | None:
    """What is in a row the tokens of a text, int32 [n] each: around it and of its pieces. None where none are found."""
    tokenizer("a")  # so that neither truncation nor padding is left on in what it is built upon
    core: tokenizers.Tokenizer = tokenizer.backend_tokenizer
    some, bare = core.encode(text[:MARGIN]), core.encode(text[:MARGIN], add_special_tokens=False).ids
    before = next((place for place, special in enumerate(some.special_tokens_mask) if not special), 0)
    if not bare or some.ids[before : before + len(bare)] != bare:
        return None  # what is put around a text cannot be told
    pieces = _pieces(core, text)
    around = [np.array(ids, np.int32) for ids in (some.ids[:before], some.ids[before + len(bare) :])]
    return None if pieces is None else [around[0], *pieces, around[1]]


def _pieces(core: tokenizers.Tokenizer, text: str) -> list[np.ndarray] | None:
    """The tokens of a text, int32 [n] of each piece; None when two pieces have no place where they can be joined."""
    found: list[np.ndarray] = []
    ids, places = np.empty(0, np.int32), np.empty(0, np.int64)
    for start in range(0, len(text) - OVERLAP, PIECE):
        encoding = core.encode(text[start : start + PIECE + OVERLAP], add_special_tokens=False)
        new = np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2)[:, 0] + start
        if start:
            seam = _seam((ids, places), new, start + OVERLAP // 2, start + OVERLAP - MARGIN)
            if seam is None:
                return None
            found.append(ids[: seam[0]])
            new = new[0][seam[1] :], new[1][seam[1] :]
        ids, places = new
    return [*found, ids]


def _seam(
    old: tuple[np.ndarray, np.ndarray], new: tuple[np.ndarray, np.ndarray], middle: int, end: int
) -> tuple[int, int] | None:
    """The index in each of two pieces, (ids int32 [n], places int64 [n]), from which on tokens are the same.

    It is at the place `middle` or soon after; the same are those before the place `end`.
    """
    first, last = np.searchsorted(old[1], [middle, end]).tolist()
    for mine in range(first, min(first + TRIES, last)):
        run = slice(mine, last)
        for other in map(int, np.flatnonzero(new[1] == old[1][mine])):
            same = slice(other, other + last - mine)
            if all(np.array_equal(one[run], two[same]) for one, two in zip(old, new, strict=True)):
                return mine, other
    return None


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose token k < 256 is byte k, and whose token 256 ends a text."""
    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=alphabet | {END_OF_TEXT: BYTE_VOCABULARY - 1}, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END_OF_TEXT).save_pretrained(folder)
