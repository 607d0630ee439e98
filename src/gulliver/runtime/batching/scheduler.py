"""Which rows the next step computes.

Every sequence that is being continued gets one row (and a few more for its draft when the step is small). Prompts get
the remaining rows: the oldest gets half of them and cannot starve, the shortest come next, so that a long prompt stalls
no other request. Cache blocks are taken as sequences grow. When all are taken, the youngest sequence gives its blocks
back and waits to be computed again; the oldest is never preempted, and alone it always fits, so every request ends.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from gulliver.runtime.batching.cache import BlockPool, Key
from gulliver.runtime.batching.sequence import Sequence
from gulliver.runtime.decoder import Decoder, StepBatch

ECHO_ROWS = 64  # most rows of a step for a prompt whose logprobs are asked for, since each returns all its logits
MARGIN_BLOCKS = 2  # free blocks that each running sequence should find when another is let in


@dataclass
class Chunk:
    """The rows of one sequence in a step: `count` tokens from position `first`, of which the last are a draft."""

    sequence: Sequence
    first: int
    count: int
    draft: list[int]
    wanted: int  # rows, the last ones, whose logits are needed


class Scheduler:
    """The running sequences and the cache's blocks. Not for several threads."""

    def __init__(self, decoder: Decoder, slots: int, prompt_rows: int, lookup_rows: int, kept_tokens: int) -> None:
        """`kept_tokens`: of published blocks that are not in use; 0: sequences share nothing."""
        self.block_tokens = decoder.block_tokens
        self.context = min(decoder.positions, decoder.cache_blocks * decoder.block_tokens)
        self.pool = BlockPool(decoder.cache_blocks, kept_tokens // decoder.block_tokens)
        self.running: list[Sequence] = []  # in order of arrival
        self.preempted = 0
        self._shares = kept_tokens > 0
        self._max_rows = decoder.max_rows
        self._prompt_rows = prompt_rows
        self._lookup_rows = lookup_rows
        self._free_slots = list(range(slots))
        self._table = np.zeros((slots, self._blocks_for(self.context)), np.int32)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def prepare(self, sequence: Sequence) -> None:
        """Compute the keys of the prompt's blocks: what any thread may do, to spare the engine's."""
        if self._shares and sequence.prompt_length > self.block_tokens:
            sequence.key(sequence.prompt_length // self.block_tokens - 1, self.block_tokens)

    # ---- coming and going ----
    def admit(self, waiting: deque[Sequence]) -> None:
        """Let sequences in from the front of `waiting` while a slot and room for their tokens are free."""
        while waiting and self._free_slots:
            sequence = waiting[0]
            if self.running:
                promised = sum(self._lacking(other) for other in self.running)
                needed = self._lacking(sequence) + MARGIN_BLOCKS * len(self.running)
                if needed > self.pool.free - promised:
                    return
            sequence.slot = self._free_slots.pop()
            self.running.append(sequence)  # before it leaves the queue: other threads ask whether anything is left
            waiting.popleft()

    def _lacking(self, sequence: Sequence) -> int:
        return self._blocks_for(len(sequence.tokens) + 1) - len(sequence.blocks)

    def leave(self, sequence: Sequence) -> None:
        """Take a sequence out; what it has published stays to be found."""
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        self._free_slots.append(sequence.slot)
        sequence.blocks, sequence.slot = [], -1
        sequence.computed = sequence.published = 0

    def _preempt_youngest(self, waiting: deque[Sequence]) -> None:
        sequence = self.running[-1]
        waiting.appendleft(sequence)
        self.leave(sequence)
        sequence.restarted = True
        self.preempted += 1

    # ---- a step ----
    def plan(self, waiting: deque[Sequence]) -> list[Chunk]:
        """The next step, never empty while anything runs. Sequences that must make room go back to `waiting`."""
        while self.running:
            parts = self._continuations(waiting)
            prompts = [sequence for sequence in self.running if sequence.missing > 1]
            if prompts:
                budget = self._max_rows - len(parts)
                parts += self._prompts(prompts, min(budget, self._prompt_rows) if parts else budget)
            else:
                self._add_drafts(parts)
            if parts:
                return parts
            assert len(self.running) > 1, "a lone sequence finds no room in the cache"
            self._preempt_youngest(waiting)
        return []

    def _continuations(self, waiting: deque[Sequence]) -> list[Chunk]:
        parts: list[Chunk] = []
        for sequence in list(self.running):
            if sequence.missing != 1 or sequence.slot < 0:
                continue
            while sequence.slot >= 0 and not self._room(sequence, sequence.computed + 1):
                self._preempt_youngest(waiting)
            if sequence.slot >= 0:
                parts.append(Chunk(sequence, sequence.computed, 1, [], 1))
        return parts

    def _room(self, sequence: Sequence, tokens: int) -> bool:
        """Take blocks until `tokens` tokens of the sequence have a place; False when there are too few."""
        while len(sequence.blocks) * self.block_tokens < tokens:
            block = self.pool.take()
            if block is None:
                return False
            self._append(sequence, block)
        return True

    def _append(self, sequence: Sequence, block: int) -> None:
        self._table[sequence.slot, len(sequence.blocks)] = block
        sequence.blocks.append(block)

    def _add_drafts(self, parts: list[Chunk]) -> None:
        spare = (self._lookup_rows - len(parts)) // len(parts) if parts else 0
        if spare < 1:
            return
        for part in parts:
            sequence = part.sequence
            draft = sequence.lookup.draft(sequence.tokens, min(spare, sequence.limit - len(sequence.tokens) - 1))
            if draft and not self._room(sequence, part.first + 1 + len(draft)):
                draft = draft[: len(sequence.blocks) * self.block_tokens - part.first - 1]
            part.draft = draft
            part.count = part.wanted = 1 + len(draft)

    def _prompts(self, prompts: list[Sequence], budget: int) -> list[Chunk]:
        """Parts of at most `budget` rows for sequences with more than one token missing."""
        if self._shares:
            for sequence in prompts:
                self._adopt(sequence)
        oldest = prompts[0]
        others = sorted(prompts[1:], key=lambda sequence: sequence.missing)
        given = dict.fromkeys(prompts, 0)
        claimed: set[Key] = set()
        left = budget
        half = max(left // 2, min(self.block_tokens, left)) if others else left
        for sequence, share in [(oldest, half), *((other, budget) for other in others), (oldest, budget)]:
            rows = self._chunk(sequence, given[sequence], min(share, left), claimed)
            given[sequence] += rows
            left -= rows
        parts: list[Chunk] = []
        for sequence in prompts:
            if rows := given[sequence]:
                last = sequence.computed + rows == len(sequence.tokens)
                parts.append(Chunk(sequence, sequence.computed, rows, [], rows if sequence.echo else int(last)))
        return parts

    def _chunk(self, sequence: Sequence, before: int, share: int, claimed: set[Key]) -> int:
        """How many rows after the `before` it has already a prompt gets of a share, with blocks taken for them.

        It ends with its prompt or with a block. None when another prompt computes the same block in this step: the
        block is taken over in the next.
        """
        start = sequence.computed + before
        if sequence.echo:
            share = min(share, ECHO_ROWS - before)
        size, stop = self.block_tokens, min(start + share, len(sequence.tokens))
        if stop < len(sequence.tokens) and stop - stop % size > start:
            stop -= stop % size
        shared = self._shares and not sequence.echo and start // size < (len(sequence.tokens) - 1) // size
        if stop <= start or (shared and not before and sequence.key(start // size, size) in claimed):
            return 0
        if not self._room(sequence, stop):
            stop = len(sequence.blocks) * size
        if shared:
            claimed.update(sequence.key(index, size) for index in range(start // size, stop // size))
        return max(stop - start, 0)

    def _adopt(self, sequence: Sequence) -> None:
        """Take over published blocks that hold the tokens that come next; one token at least is left to compute."""
        size = self.block_tokens
        if sequence.echo or sequence.computed % size:
            return
        while sequence.computed + size < len(sequence.tokens):
            index = sequence.computed // size
            block = self.pool.adopt(sequence.key(index, size))
            if block is None:
                return
            assert len(sequence.blocks) == index
            self._append(sequence, block)
            sequence.computed += size
            sequence.published = index + 1
            if not sequence.restarted:
                sequence.cached += size

    def publish(self, sequence: Sequence) -> None:
        """Let others find the blocks that are full now."""
        if not self._shares:
            return
        full = sequence.computed // self.block_tokens
        while sequence.published < full:
            index = sequence.published
            self.pool.publish(sequence.blocks[index], sequence.key(index, self.block_tokens))
            sequence.published += 1

    def batch(self, parts: list[Chunk]) -> StepBatch:
        """The parts as a decoder takes them: tokens and positions int32 [rows], block numbers [sequences, blocks]."""
        tokens: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        wanted: list[int] = []
        for place, part in enumerate(parts):
            stop = part.first + part.count
            tokens += part.sequence.tokens[part.first : stop]
            tokens += part.draft
            positions += range(part.first, stop)
            places += [place] * part.count
            wanted += range(len(tokens) - part.wanted, len(tokens))
        most = max(len(part.sequence.blocks) for part in parts)
        blocks = self._table[[part.sequence.slot for part in parts], :most]
        rows = [np.array(column, np.int32) for column in (tokens, positions, places)]
        return StepBatch(*rows, blocks=blocks, wanted=np.array(wanted, np.int32))
