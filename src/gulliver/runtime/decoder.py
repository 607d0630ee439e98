"""What runs a decoder one step at a time: tokens of several sequences in, logits out.

A key/value cache is cut into blocks of `block_tokens` tokens. The caller of `step` names the blocks of each sequence in
order of position, so that two sequences with the same beginning can share blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class StepBatch:
    """The tokens of one step. Rows of one sequence are neighbours, positions ascending without a gap."""

    tokens: NDArray[np.int32]  # [rows]
    positions: NDArray[np.int32]  # [rows], from 0
    sequences: NDArray[np.int32]  # [rows]: the row of `blocks` that holds the token's sequence
    blocks: NDArray[np.int32]  # [sequences, most blocks of one]: numbers of cache blocks in order of position
    wanted: NDArray[np.int32]  # [answers]: rows whose logits are returned, ascending


class Decoder(Protocol):
    """A model that answers `step`; threads that call it wait for each other."""

    vocabulary: int  # columns of the logits
    positions: int  # longest sequence it can hold, in tokens
    block_tokens: int
    cache_blocks: int  # blocks there are, numbered from 0
    max_rows: int  # most rows of one step
    shares_blocks: bool  # False: a block belongs to the sequence that wrote it, whose first block names it
    backend: str  # what runs: "avx512-vnni", "avx2", …, or "reference"
    why: str  # why this backend and not another, as one sentence

    def step(self, batch: StepBatch) -> NDArray[np.float32]:
        """Logits [answers, vocabulary] of the wanted rows, until the next step.

        Keys and values of all rows are written to the cache first, over those of the same or later positions.
        """
        ...

    def close(self) -> None:
        """Free the weights and the cache."""
        ...
