"""Cache blocks: which are in use, by how many sequences, and which hold a prefix that may be asked for again.

A full block whose tokens are certain is *published* under a key, the hash of its tokens and of the key of the block
before it, that of the first beginning with its owner's name; so a key identifies all tokens from the sequence's
beginning, and whose they are. A sequence of the same owner whose tokens begin alike takes the block over instead of
computing it. A published block that is not in use is kept until its room is needed or too many
are kept; the least recently used is dropped first. A cache takes memory when a block is first written. So blocks that
were written before are dealt out before fresh ones; and once as many were written as may be kept, kept blocks are
reused first: memory follows the most that running sequences ever needed at once. Keys are cryptographic (BLAKE2b,
16 bytes), so that different tokens never share a key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

Key = bytes
START: Key = b""  # the key before the first block of who has no name


def first_key(owner: str) -> Key:
    """The key before the first block. What one owner has published is found by no other."""
    return blake2b(owner.encode(), digest_size=16).digest() if owner else START


def next_key(before: Key, tokens: Sequence[int]) -> Key:
    """The key of a full block with these tokens, after the block with the key `before`."""
    return blake2b(before + np.array(tokens, np.int32).tobytes(), digest_size=16).digest()


class BlockPool:
    """The blocks 0 to `count` - 1 of one decoder. Not for several threads."""

    def __init__(self, count: int, kept: int) -> None:
        """`kept`: most published blocks without a user."""
        self.count = count
        self._kept = kept
        self._empty: list[int] = []  # written before, not published
        self._written = 0  # blocks from this one on are fresh
        self._users = [0] * count
        self._keys: list[Key | None] = [None] * count
        self._published: dict[Key, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # published and without a user, oldest first

    @property
    def free(self) -> int:
        """Blocks that `take` can give."""
        return len(self._empty) + len(self._unused) + self.count - self._written

    @property
    def used(self) -> int:
        """Blocks that some sequence uses."""
        return self.count - self.free

    def take(self) -> int | None:
        """A block for one user to write to, or None when every block is in use."""
        fresh = self._written < self.count
        if self._empty:
            block = self._empty.pop()
        elif self._unused and not (fresh and self._written < self._kept):
            block, _ = self._unused.popitem(last=False)
            self._withdraw(block)
        elif fresh:
            block = self._written
            self._written += 1
        else:
            return None
        self._users[block] = 1
        return block

    def adopt(self, key: Key) -> int | None:
        """The block published under `key` with one user more, or None when there is none."""
        block = self._published.get(key)
        if block is None:
            return None
        if self._users[block] == 0:
            del self._unused[block]
        self._users[block] += 1
        return block

    def publish(self, block: int, key: Key) -> None:
        """From now on `block`, full and never written again, is found by `key`; the first to publish a key keeps it."""
        if key not in self._published and self._keys[block] is None:
            self._published[key] = block
            self._keys[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """One user less for each of a sequence's blocks, given in order of position.

        The last is forgotten first, since more prompts share a beginning than what follows it.
        """
        for block in reversed(blocks):
            self._users[block] -= 1
            assert self._users[block] >= 0, f"block {block} was released more often than taken"
            if self._users[block] == 0:
                if self._keys[block] is None:
                    self._empty.append(block)
                else:
                    self._unused[block] = None
        while len(self._unused) > self._kept:
            block, _ = self._unused.popitem(last=False)
            self._withdraw(block)
            self._empty.append(block)

    def forget(self) -> None:
        """Withdraw all published blocks, since their contents are in doubt; users keep theirs."""
        for block in list(self._published.values()):
            self._withdraw(block)
        self._empty.extend(self._unused)
        self._unused.clear()

    def _withdraw(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None
        del self._published[key]
        self._keys[block] = None
