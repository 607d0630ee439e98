"""The reference decoder: any causal language model that transformers loads, slow and right.

Every sequence has a cache of its own, of the kind that the model makes, and is computed alone, in float32; see
`runtime.reference_cache` for when it is computed from the beginning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gulliver.core.errors import ConfigError
from gulliver.nets.kinds import is_causal
from gulliver.runtime.decoder import StepBatch
from gulliver.runtime.network import load_network, read_config
from gulliver.runtime.reference_cache import Reader, Remembered

BLOCK_TOKENS = 16
NO_LIMIT = 32768  # positions of a model whose config names no limit


@dataclass
class _Held:
    """What the cache holds of one sequence."""

    blocks: tuple[int, ...] = ()
    text: Remembered = field(default_factory=Remembered)


class ReferenceDecoder:
    """A decoder on torch and transformers; see `runtime.decoder.Decoder`."""

    shares_blocks = False
    block_tokens = BLOCK_TOKENS
    max_rows = 512
    backend = "reference"

    def __init__(
        self,
        folder: Path,
        *,
        model: Any = None,
        threads: int | None = None,
        cache_tokens: int | None = None,
        slots: int = 16,
        why: str = "because it was asked for",
    ) -> None:
        """`model`: the one in `folder` where it is loaded already. `threads` are set for the whole process.

        ConfigError for a model that writes no text.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        if model is None and is_causal(folder, read_config(folder).to_dict()):
            model = load_network(folder, empty=False)
        if model is None or model.get_output_embeddings() is None:
            raise ConfigError(f"{folder} has no language model head, so it writes no text; ask it for embeddings")
        config = model.config.get_text_config(decoder=True)
        self.vocabulary: int = model.get_output_embeddings().weight.shape[0]
        self.reader: Reader | None = Reader(model, self.vocabulary)
        positions = getattr(config, "max_position_embeddings", None) or NO_LIMIT
        self.positions: int = positions if positions > 0 else NO_LIMIT  # -1 says that there is none
        wanted = slots * self.positions if cache_tokens is None else cache_tokens
        self.cache_blocks = max(1, -(-wanted // BLOCK_TOKENS))
        self.why = f"transformers computes it in float32 {why}"
        self._held: dict[int, _Held] = {}  # by the first block

    def step(self, batch: StepBatch) -> NDArray[np.float32]:
        """Logits [answers, vocabulary]; see `Decoder.step`."""
        found: list[NDArray[np.float32]] = []
        assert self.reader is not None, "the decoder is closed"
        with torch.inference_mode():
            for place in range(len(batch.blocks)):
                rows = np.flatnonzero(batch.sequences == place)
                if not len(rows):
                    continue
                first = int(batch.positions[rows[0]])
                count = -(-(first + len(rows)) // BLOCK_TOKENS)
                held = self._sequence(tuple(batch.blocks[place, :count].tolist()), first)
                wanted = np.flatnonzero(np.isin(rows, batch.wanted))
                keep = len(rows) - int(wanted[0]) if len(wanted) else 1
                logits = self.reader.read(held.text, batch.tokens[rows].tolist(), keep)
                found.append(logits[wanted - (len(rows) - keep)].float().numpy())
        return np.concatenate(found) if found else np.empty((0, self.vocabulary), np.float32)

    def _sequence(self, blocks: tuple[int, ...], first: int) -> _Held:
        """The sequence that begins in blocks[0], cut to its first `first` tokens; others in these blocks have ended."""
        known = self._held.get(blocks[0])
        if first == 0 or known is None or known.blocks != blocks:
            mine, others = set(blocks), {start: held for start, held in self._held.items() if start != blocks[0]}
            for start in [start for start, held in others.items() if not mine.isdisjoint(held.blocks)]:
                del self._held[start]
        if first == 0:
            self._held[blocks[0]] = _Held()
        held = self._held[blocks[0]]
        count = len(held.text.tokens)
        assert count >= first, f"position {first} follows a sequence of {count} tokens"
        held.blocks = blocks
        assert self.reader is not None
        self.reader.shorten(held.text, first)
        return held

    def close(self) -> None:
        """Free the weights and the cache."""
        self._held.clear()
        self.reader = None
