"""Standard pieces of work for any decoder: reading a prompt, writing on, several sequences at once; and what they read.

Greedy choice of the next token is part of the work, as it is of every answer; text is not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gulliver.nets.files import stored_tensors
from gulliver.runtime.decoder import Decoder, StepBatch

PROMPT_TOKENS = 512
START_TOKENS = 64
"""Tokens in the cache when one sequence is continued."""
NEW_TOKENS, REFERENCE_NEW_TOKENS = 64, 24
"""How many it is continued by; fewer on the reference backend, which is slower."""
STREAM_START_TOKENS, STREAM_NEW_TOKENS = 16, 32
"""The same where several sequences are continued together."""
CACHE_TOKENS = 2048
MAX_STREAMS = 16


class Rows:
    """`count` sequences side by side in a decoder's cache from a block on, each with room for `tokens`."""

    def __init__(self, decoder: Decoder, count: int, tokens: int, first_block: int = 0) -> None:
        self.decoder, self.count = decoder, count
        each = -(-tokens // decoder.block_tokens)
        self.next_block = first_block + count * each
        self._blocks = np.arange(first_block, self.next_block, dtype=np.int32).reshape(count, each)

    def read(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """Every sequence becomes `tokens` [length]; the likeliest next token of each, [count]."""
        answers = []
        for row in range(self.count):
            logits = np.empty((0, 0), np.float32)
            for start in range(0, len(tokens), self.decoder.max_rows):
                part = np.ascontiguousarray(tokens[start : start + self.decoder.max_rows])
                at = np.arange(len(part), dtype=np.int32)
                last = start + len(part) == len(tokens)
                wanted = at[-1:] if last else at[:0]
                blocks = self._blocks[row : row + 1]
                logits = self.decoder.step(StepBatch(part, start + at, np.zeros_like(at), blocks, wanted))
            answers.append(int(logits[0].argmax()))
        return np.array(answers, np.int32)

    def write(self, tokens: NDArray[np.int32], position: int, steps: int) -> int:
        """Continue every sequence from `position` by `steps` tokens, `tokens` [count] first; how many it was in all."""
        rows = np.arange(self.count, dtype=np.int32)
        for step in range(steps):
            positions = np.full(self.count, position + step, np.int32)
            tokens = (
                self.decoder.step(StepBatch(tokens, positions, rows, self._blocks, rows)).argmax(1).astype(np.int32)
            )
        return self.count * steps


def workloads(decoder: Decoder, streams: tuple[int, ...] = ()) -> dict[str, Callable[[], int]]:
    """Name -> a function that does the work once and returns how many tokens it was.

    "prefill_tokens_per_s" and "decode_tokens_per_s" for one sequence; the number itself ("4") for so many `streams`.
    """
    most = REFERENCE_NEW_TOKENS if decoder.backend == "reference" else NEW_TOKENS
    new = max(1, min(most, decoder.positions // 2))
    length = max(1, min(PROMPT_TOKENS, decoder.positions - new))
    start = min(START_TOKENS, length)
    low, high = decoder.vocabulary // 50, max(decoder.vocabulary // 50 + 1, decoder.vocabulary * 4 // 5)  # no controls
    tokens = np.random.default_rng(0).integers(low, high, length, dtype=np.int32)
    one = Rows(decoder, 1, length + new)

    def prefill() -> int:
        one.read(tokens)
        return length

    begun = tokens[:STREAM_START_TOKENS]
    later = max(1, min(STREAM_NEW_TOKENS, decoder.positions - len(begun)))
    many = {count: Rows(decoder, count, len(begun) + later, one.next_block) for count in streams}
    return {
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": _continued(one, tokens[:start], new),
        **{str(count): _continued(rows, begun, later) for count, rows in many.items()},
    }


def _continued(rows: Rows, tokens: NDArray[np.int32], new: int) -> Callable[[], int]:
    """Writes `new` tokens after `tokens`, which are read when this is first called.

    Later calls overwrite what came; the beginning stays, since nothing else is written into these blocks.
    """
    first: list[NDArray[np.int32]] = []

    def work() -> int:
        if not first:
            first.append(rows.read(tokens))
        return rows.write(first[0], len(tokens), new)

    return work


def bytes_per_token(folder: Path) -> int:
    """Bytes of weights that one step reads: all but an embedding that is not the head as well."""
    sizes = {name: tensor.length for name, tensor in stored_tensors(folder).items()}
    own_head = any(name.startswith("lm_head.") for name in sizes)
    return sum(size for name, size in sizes.items() if not (own_head and name.startswith("model.embed_tokens.")))
