"""A decoder without a model that checks every rule of the Batch contract, and what an engine needs beside it."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from gulliver.runtime.batching.engine import Piece
from gulliver.runtime.decoder import StepBatch
from gulliver.runtime.text.tokenizer import Text

VOCABULARY = 257
END = 256


def write_text_folder(folder: Path) -> Path:
    """A tokenizer whose token k < 256 is byte k, and whose token 256 ends a text; no network beside it."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    assert set(characters.values()) == set(alphabet)
    vocabulary = {character: byte for byte, character in characters.items()}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    core.add_special_tokens(["<|end|>"])
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return folder


def read_text(folder: Path) -> Text:
    """The text side of `write_text_folder`."""
    return Text(write_text_folder(folder))


class FakeDecoder:
    """Logits are a function of the tokens that stand in the cache, so a wrong block or position changes the answer.

    `rule(tokens) -> logits` may replace the built-in one: a hash of the first and the last `memory` tokens, whose
    answers fall into loops soon (which makes drafts come true) when `memory` is small.
    """

    def __init__(
        self,
        blocks: int = 64,
        positions: int = 512,
        max_rows: int = 128,
        shares: bool = True,
        rule: Callable[[list[int]], NDArray[np.float32]] | None = None,
        memory: int = 64,
        block_tokens: int = 16,
    ) -> None:
        self.vocabulary, self.positions, self.block_tokens = VOCABULARY, positions, block_tokens
        self.cache_blocks, self.max_rows, self.shares_blocks = blocks, max_rows, shares
        self.backend, self.why = "fake", "a test needs no model"
        self.cache = np.full((blocks, block_tokens), -1, np.int64)
        self.rule = rule or (lambda tokens: hashed([tokens[0], *tokens[-memory:]]))
        self.batches: list[StepBatch] = []
        self.fail_next: Exception | None = None
        self.gate: threading.Event | None = None  # a step waits for it
        self.delay_seconds = 0.0
        self.closed = False

    def step(self, batch: StepBatch) -> NDArray[np.float32]:
        if self.gate is not None:
            assert self.gate.wait(10), "the test forgot to open the gate"
        time.sleep(self.delay_seconds)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        self._check(batch)
        self.batches.append(batch)
        for token, position, sequence in zip(batch.tokens, batch.positions, batch.sequences, strict=True):
            self.cache[self._place(batch, sequence, position)] = token
        rows = [self._history(batch, int(row)) for row in batch.wanted]
        return np.array([self.rule(row) for row in rows], np.float32).reshape(len(rows), VOCABULARY)

    def _place(self, batch: StepBatch, sequence: int, position: int) -> tuple[int, int]:
        return int(batch.blocks[sequence, position // self.block_tokens]), int(position % self.block_tokens)

    def _history(self, batch: StepBatch, row: int) -> list[int]:
        sequence = batch.sequences[row]
        places = [self._place(batch, sequence, position) for position in range(batch.positions[row] + 1)]
        tokens = [int(self.cache[place]) for place in places]
        assert min(tokens) >= 0, "a block is read that was never written"
        return tokens

    def _check(self, batch: StepBatch) -> None:
        rows = len(batch.tokens)
        assert 1 <= rows <= self.max_rows
        for array in (batch.tokens, batch.positions, batch.sequences, batch.blocks, batch.wanted):
            assert array.dtype == np.int32 and array.flags.c_contiguous
        assert len(batch.positions) == len(batch.sequences) == rows
        assert batch.positions.min() >= 0 and batch.positions.max() < self.positions
        assert batch.tokens.min() >= 0 and batch.tokens.max() < self.vocabulary
        assert np.all(np.diff(batch.wanted) > 0) and np.all((batch.wanted >= 0) & (batch.wanted < rows))
        assert set(batch.sequences.tolist()) == set(range(len(batch.blocks)))
        same = np.diff(batch.sequences) == 0
        assert np.all(np.diff(batch.positions)[same] == 1), "positions of a sequence have a gap"
        assert np.count_nonzero(~same) + 1 == len(batch.blocks), "a sequence's rows do not stand together"
        written: dict[int, int] = {}
        for position, sequence in zip(batch.positions, batch.sequences, strict=True):
            block, _ = self._place(batch, sequence, position)
            assert 0 <= block < self.cache_blocks
            assert written.setdefault(block, sequence) == sequence, "two sequences write to one block"
        for block, writer in written.items():
            for sequence in range(len(batch.blocks)):
                if sequence == writer:
                    continue
                last = int(batch.positions[batch.sequences == sequence].max())
                used = batch.blocks[sequence, : last // self.block_tokens + 1]
                assert block not in used, "a block that one sequence writes is read by another"

    def close(self) -> None:
        self.closed = True


def hashed(tokens: list[int]) -> NDArray[np.float32]:
    """Logits that any change of the tokens changes; the end token is never likely."""
    seed = zlib.crc32(np.array(tokens, np.int32).tobytes())
    logits = np.random.default_rng(seed).standard_normal(VOCABULARY).astype(np.float32) * 2
    logits[END] = -20
    return logits


def greedy(rule: Callable[[list[int]], NDArray[np.float32]], prompt: list[int], count: int) -> list[int]:
    """The most likely continuation by a rule, the slow and obvious way."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(rule(tokens).argmax()))
    return tokens[len(prompt) :]


def ids(pieces: list[Piece]) -> list[int]:
    """The tokens of an answer."""
    return [choice.id for piece in pieces for choice in piece.tokens]


def answer(pieces: list[Piece]) -> str:
    """The text of an answer."""
    return "".join(piece.text for piece in pieces)


class Collected:
    """A `deliver` that keeps the pieces and says when the last has come."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.times: list[float] = []
        self.ended = threading.Event()
        self.first = threading.Event()

    def __call__(self, piece: Piece) -> None:
        assert not self.ended.is_set(), "a piece came after the last"
        self.pieces.append(piece)
        self.times.append(time.monotonic())
        self.first.set()
        if piece.finish is not None:
            self.ended.set()

    def wait(self) -> list[Piece]:
        assert self.ended.wait(10), "the request did not end"
        return self.pieces
