"""What a causal model gives on batches of tokens, a chunk of positions at a time.

A network that came without weights is run a block at a time, its weights read from its folder, packed or plain, just
before: memory holds one block, what enters it for all batches, and the output head. One that cannot be run so (its
layers form no chain) is loaded whole. What enters the head can be kept in a file for the next measurement.

Products are in bfloat16 under autocast where the CPU multiplies it, else in float32. A network that itself mixes types
under autocast (sums of a type that it does not choose) has those of its blocks in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gulliver.core.errors import FOREIGN, ConfigError
from gulliver.core.store.files import hash_file, temporary_name
from gulliver.nets.linear_kl import chunk_rows
from gulliver.nets.precision import attempts, products_in
from gulliver.nets.weights import unfilled
from gulliver.runtime.network import load_network
from gulliver.runtime.streamed import filled, narrow_weights
from gulliver.tasks.base import Block
from gulliver.tasks.language.network import logits_of, vocabulary_of
from gulliver.tasks.text.streaming import Stream

DIGITS = 32
"""Of the hash in the name of a file that is kept."""


class Outputs:
    """A causal network's outputs on `batches` of tokens, [rows, tokens] each.

    `kept`: the beginning of the name of a file in which what enters the head lies between measurements; the rest of its
    name is the hash of its bytes. Written when it is not there, or damaged.
    """

    def __init__(self, network: nn.Module, batches: Sequence[Tensor], kept: Path | None = None) -> None:
        self.network, self.batches, self.kept = network, batches, kept
        self.found: Path | None = None
        self.folder = Path(str(getattr(network, "source_folder", "")))
        self.blocks: list[Block] = []
        self.mixes_types = False
        """Whether a part had to run in float32."""
        try:
            self.blocks = Stream(network, [{"tokens": tokens} for tokens in batches]).blocks()
        except ConfigError:
            self._run_whole()
        self.attempts = attempts()
        self.narrow = narrow_weights(network) if self.attempts[0] else set[str]()
        self.entering: list[Tensor] = []

    def _run_whole(self) -> None:
        """The network cannot be run block by block: all its weights are needed at once."""
        self.blocks, self.mixes_types = [], False
        if unfilled(self.network):
            self.network = load_network(self.folder, empty=False)

    def run_layers(self, advance: Callable[[float], None]) -> None:
        """Run all but the head, unless what it left is kept; `advance` gets the share of the layers that are done."""
        self.found = self._undamaged()
        if not self.blocks or self.found is not None:
            advance(1.0)
            return
        passing: list[Any] = [{"tokens": tokens} for tokens in self.batches]
        layers = self.blocks[:-1]
        try:
            for done, block in enumerate(layers):
                left = list(range(len(passing)))
                for half in self.attempts if left else ():
                    narrow = self.narrow if half else ()
                    try:
                        with filled(self.network, self.folder, block.prefixes, narrow), products_in(half):
                            while left:
                                passing[left[0]] = block.forward(passing[left[0]], left[0]).float()
                                left.pop(0)
                        break
                    except FOREIGN:  # some networks mix types that do not go together
                        self.mixes_types = True
                        if not half:
                            raise
                advance((done + 1) / len(layers))
        except FOREIGN:  # a layer reads what is none of its own
            self._run_whole()
            advance(1.0)
            return
        if self.kept is None:
            self.entering = passing
            return
        temporary = temporary_name(self.kept)
        save_file({str(number): x.contiguous() for number, x in enumerate(passing)}, str(temporary))
        self.found = self.kept.with_name(f"{self.kept.name}-{hash_file(temporary)[:DIGITS]}")
        temporary.rename(self.found)

    def _undamaged(self) -> Path | None:
        """The file of an earlier measurement; one whose bytes are not those that were written is deleted."""
        for file in sorted(self.kept.parent.glob(f"{self.kept.name}-*")) if self.kept is not None else ():
            if file.name.endswith(f"-{hash_file(file)[:DIGITS]}"):
                return file
            file.unlink(missing_ok=True)
        return None

    @contextmanager
    def ready(self) -> Iterator[None]:
        """While the block runs, the weights of the head are in memory and `log_probabilities` may be called.

        After `run_layers`.
        """
        if not self.blocks:
            yield
            return
        with filled(self.network, self.folder, self.blocks[-1].prefixes, self.narrow):
            yield

    def log_probabilities(self, number: int, rows: Tensor, positions: Tensor) -> Iterator[tuple[int, Tensor]]:
        """What follows `positions` [k] of `rows` [k] of batch `number`: (first of k, float32 [some of k, vocab])."""
        vocabulary = vocabulary_of(self.network)
        step = chunk_rows(vocabulary)
        whole = self._entering(number) if self.blocks else self._logits(number)
        for start in range(0, len(rows), step):
            part = whole[rows[start : start + step], positions[start : start + step]][None]
            with products_in(self.attempts[0]):
                logits = self.blocks[-1].forward(part, number) if self.blocks else part
            yield start, torch.log_softmax(logits[0], -1, dtype=torch.float32)

    def _logits(self, number: int) -> Tensor:
        """Logits of a network that is run whole for batch `number`, [rows, tokens, vocab]."""
        for half in (False,) if self.mixes_types else self.attempts:
            try:
                with products_in(half):
                    return logits_of(self.network, self.batches[number])
            except FOREIGN:
                self.mixes_types = True
                if not half:
                    raise
        raise AssertionError("the last try returns or raises")

    def _entering(self, number: int) -> Tensor:
        """What enters the head for batch `number`, float32 [rows, tokens, width]."""
        if self.found is None:
            return self.entering[number]
        with safe_open(self.found, framework="pt") as opened:
            return opened.get_tensor(str(number))
