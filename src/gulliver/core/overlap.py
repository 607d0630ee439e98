"""What two parts of data share, to refuse a measurement on what a model was calibrated or trained on.

What a unit is (a paragraph, a picture, a user's history) is the family's affair: `Task.units`. A unit's fingerprint is
the first 16 hex digits of the SHA-256 of its UTF-8 bytes; one unit in both parts is too much.

Text is compared besides by its letters alone, so that case, blanks, line breaks, quotes and marks make no difference:

- lines: the share of a part's letters in lines (cut into sentences) that are in the other part too;
- runs: the share of a part's different runs of RUN letters (WIDE_RUN of a script that writes words as signs) that
  occur in the other. Where one word in ten is another, an eighth of the runs is left. Text that shares much with
  itself (a toy grammar, forms) shares as much with any part of it, so the limit grows with what it shares with itself.

Of a long text the lowest hashes stand for all: a run is in the sample of one text exactly if it is in that of another
and below both bounds (Broder, On the Resemblance and Containment of Documents, 1997).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gulliver.core.evidence.intervals import wilson_interval

Hashes = NDArray[np.uint64]

MAX_SHARED = 0.5
"""Most of the eval part, by letters, that may be lines of the train part. Measured on a tenth that was held out

(docs/log.md): encyclopedia 0.4 %, code 7 %, dialogues one turn a line 19 %; texts of lines that repeat 97-100 %.
"""
RUN, WIDE_RUN = 32, 8
"""Letters of a run; signs of a run in Chinese, Japanese and Korean."""
MAX_RUNS, OWN_FACTOR, MOST_RUNS = 0.05, 1.5, 0.98
"""Most runs that may be shared, in other text; times as many as a text shares with itself; and in any text.

Measured (docs/log.md): honest parts share 0 to 4 %, and 14 % where a text has 18 % in common with itself; copies with
one word in ten changed 13 % and more.
"""
FULL = 2**63 - 1
KEPT, KEPT_WHOLE = 2**14, 2**22
"""Hashes that a sample keeps: in a record, and where two parts are compared at once."""
_WIDE_FROM = 0x2E80
_BLOCK, _EVERY = 64, 10  # every tenth block of letters stands for a part that was held out
_CHUNK = 2**20
_BASE, _SPREAD = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9


class Shared(NamedTuple):
    """`share` of one part's letters is in lines that are in the other too, such as `longest`."""

    share: float
    longest: str


@dataclass(frozen=True)
class Sample:
    """All hashes of a text below `bound`, sorted, uint64 [n]."""

    bound: int
    hashes: Hashes

    def below(self, bound: int) -> Hashes:
        """Those below another bound too."""
        return self.hashes[: int(np.searchsorted(self.hashes, np.uint64(min(bound, self.bound))))]


@dataclass(frozen=True)
class Seen:
    """What is remembered of a text: samples of its lines and runs, and the share of its runs that it has elsewhere.

    `own` is the upper end of that share's interval, measured on every tenth block of letters.
    """

    lines: Sample
    runs: Sample
    own: float

    @property
    def run_limit(self) -> float:
        """The share of another text's runs that may be runs of this one."""
        return min(MOST_RUNS, max(MAX_RUNS, OWN_FACTOR * self.own))

    def is_text_of(self, share: float, least: float) -> bool:
        """Whether a text of which so many runs are runs of this one is the same: beyond the limit even at the lower

        end of the interval, or as good as all of it.
        """
        return least > self.run_limit or share > MOST_RUNS


# ---- units ----------------------------------------------------------------------------------------------------------
def fingerprint(unit: str) -> str:
    """First 16 hex digits of the SHA-256 of the unit's UTF-8 bytes."""
    return hashlib.sha256(unit.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def fingerprints(units: Iterable[str]) -> list[str]:
    """Sorted fingerprints of all `units`, each once."""
    return sorted({fingerprint(unit) for unit in units})


def first_overlap(units: Iterable[str], known: Iterable[str]) -> str | None:
    """The first of `units` whose fingerprint is among `known`; None when there is none."""
    seen = frozenset(known)
    return next((unit for unit in units if fingerprint(unit) in seen), None)


def excerpt(unit: str, characters: int = 80) -> str:
    """The start of a unit, on one line, for an error message."""
    line = " ".join(unit.split())
    return line if len(line) <= characters else line[: characters - 1] + "…"


# ---- letters --------------------------------------------------------------------------------------------------------
def letters(phrase: str) -> str:
    """The letters and figures of a phrase whose case and width are folded already; blanks and marks are left out."""
    return "".join(filter(str.isalnum, phrase))


def gram_hashes(codes: NDArray[np.integer], length: int) -> Hashes:
    """A hash of 63 bits of every run of `length` of the numbers [n], uint64 [n - length + 1]; none where n is less.

    sum_k c_(i+k) B^(length-1-k) modulo 2^64, c spread over all bits, built by doubling.
    """
    if len(codes) < length:
        return np.empty(0, np.uint64)
    with np.errstate(over="ignore"):
        power = codes.astype(np.uint64) * np.uint64(_SPREAD)
        power ^= power >> np.uint64(29)
        base, size, whole, taken, left = np.uint64(_BASE), 1, None, 0, length
        while left:
            if left & 1:
                count = len(codes) - taken - size + 1
                whole = power.copy() if whole is None else whole[:count] * base + power[taken : taken + count]
                taken += size
            left >>= 1
            if left:
                power = power[: len(power) - size] * base + power[size:]
                base, size = base * base, 2 * size
        assert whole is not None
        whole ^= whole >> np.uint64(31)
        whole *= np.uint64(_SPREAD)
        return whole >> np.uint64(1)


def _runs(codes: NDArray[np.uint32]) -> tuple[Hashes, NDArray[np.int64]]:
    """Hashes of the runs in letters [n], and the places where they begin; of a wide sign shorter ones."""
    long, short = gram_hashes(codes, RUN), gram_hashes(codes, WIDE_RUN)
    wide = codes[: len(short)] >= _WIDE_FROM
    places = [np.flatnonzero(~wide[: len(long)]), np.flatnonzero(wide)]
    return np.concatenate([long[places[0]], short[places[1]]]), np.concatenate(places)


def _line_hash(line: str) -> int:
    return int.from_bytes(hashlib.blake2b(line.encode("utf-8", "surrogatepass"), digest_size=8).digest()) >> 1


# ---- samples --------------------------------------------------------------------------------------------------------
@dataclass
class _Lowest:
    """The lowest `most` of the hashes that were added."""

    most: int
    bound: int = FULL
    parts: list[Hashes] = field(default_factory=list)

    def add(self, hashes: Hashes) -> None:
        self.parts.append(hashes[hashes < np.uint64(self.bound)])
        if sum(map(len, self.parts)) > 2 * self.most + _CHUNK:
            self.sample()

    def sample(self) -> Sample:
        whole = np.unique(np.concatenate([np.empty(0, np.uint64), *self.parts]))
        if len(whole) > self.most:
            self.bound, whole = int(whole[self.most]), whole[: self.most]
        self.parts = [whole]
        return Sample(self.bound, whole)


def remember(phrases: Iterable[str], most: int = KEPT) -> Seen:
    """What is remembered of a text that comes as its phrases, in order."""
    lines, parts = _Lowest(most), (_Lowest(most), _Lowest(most))
    for start, codes in _letters_of(_noted(phrases, lines)):
        hashes, places = _runs(codes)
        held = (start + places) // _BLOCK % _EVERY == _EVERY - 1
        parts[0].add(hashes[~held])
        parts[1].add(hashes[held])
    rest, tenth = parts[0].sample(), parts[1].sample()
    whole = _Lowest(most, min(rest.bound, tenth.bound))
    for part in (rest, tenth):
        whole.add(part.hashes)
    return Seen(lines.sample(), whole.sample(), _share(tenth, rest)[2])


def _noted(phrases: Iterable[str], lines: _Lowest) -> Iterator[str]:
    """The letters of each phrase, which is added to the lines."""
    waiting: list[int] = []
    for phrase in phrases:
        line = letters(phrase)
        if line:
            waiting.append(_line_hash(line))
            yield line
        if len(waiting) >= _CHUNK:
            lines.add(np.array(waiting, np.uint64))
            waiting.clear()
    lines.add(np.array(waiting, np.uint64))


def _letters_of(lines: Iterable[str]) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    """(place of the first, letters [n]) of pieces of a text, each of which goes on with what a run may still need."""
    start, size, waiting = 0, 0, list[str]()
    for line in lines:
        waiting.append(line)
        size += len(line)
        if size >= _CHUNK:
            whole = "".join(waiting)
            yield start, _codes(whole)
            waiting, start, size = [whole[1 - RUN :]], start + len(whole) - RUN + 1, RUN - 1
    yield start, _codes("".join(waiting))


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


# ---- what is shared -------------------------------------------------------------------------------------------------
def shared_runs(text: Seen, seen: Seen) -> tuple[float, float]:
    """(share of a text's different runs that are runs of the other, the lower end of its interval)."""
    return _share(text.runs, seen.runs)[:2]


def shared_lines(phrases: Iterable[str], seen: Seen) -> Shared:
    """How much of a text, by letters, is in lines of the other, such as the longest of them.

    Where those are a sample, the lower end of the share's interval.
    """
    found: dict[str, tuple[int, str]] = {}
    for phrase in phrases:
        line = letters(phrase)
        found[line] = found.get(line, (0, phrase))[0] + len(line), phrase
    hashes = np.array([_line_hash(line) for line in found], np.uint64)
    judged = hashes < np.uint64(seen.lines.bound)
    known = np.isin(hashes, seen.lines.hashes) & judged
    sizes = np.array([size for size, _ in found.values()])
    total, count = int(sizes[judged].sum()), int(judged.sum())
    share = float(sizes[known].sum()) / max(total, 1)
    if seen.lines.bound < FULL:
        share = _interval(share, count)[0]
    both = [phrase for (_, phrase), here in zip(found.values(), known, strict=True) if here]
    return Shared(share, max(both, key=lambda phrase: (len(phrase), phrase), default=""))


def _share(ours: Sample, theirs: Sample) -> tuple[float, float, float]:
    """(share, low, high) of our hashes that are theirs too; runs that overlap are one observation."""
    bound = min(ours.bound, theirs.bound)
    mine = ours.below(bound)
    if not len(mine):
        return 0.0, 0.0, 0.0
    share = float(np.isin(mine, theirs.below(bound)).mean())
    return share, *_interval(share, math.ceil(len(mine) * min(1.0, FULL / bound / RUN)))


def _interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share of `count` observations."""
    if not count:
        return 0.0, 0.0
    return wilson_interval(round(share * count), count)[1:]
