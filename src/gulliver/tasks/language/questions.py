"""Questions made of held-out text, in any language: the last word of a passage, and which of four continues it.

- cloze: a passage without its last word, to be written greedily;
- choice: a passage, how it goes on, and three continuations of other passages of the same text. The likeliest per byte
  of UTF-8 is chosen, so that chance is a quarter whatever the lengths.

The text is cut into as many equal stretches as there are questions; each asks about one place of its stretch, drawn
from the seed. A word is a run of letters; of a script without spaces between words (or a run of more than LONGEST
letters) two characters are one.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

import numpy as np

CONTEXT = 120
"""Characters of a passage, about."""
CONTINUATION = 60
"""Characters of a continuation, about."""
CHOICES = 4
LEAST = 8
"""Questions: of fewer no share is told."""
LONGEST = 24
CLOZE_SHARE = 0.6
_RUN = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


@dataclass(frozen=True)
class Question:
    """A passage and its answers, the right one first; one answer alone is to be written, of several one is chosen."""

    kind: Literal["cloze", "choice"]
    context: str
    answers: tuple[str, ...]


def make_questions(text: str, count: int, seed: int = 0) -> list[Question]:
    """At most `count` questions, fewer where the text is short, none where fewer than LEAST can be asked."""
    count = min(count, len(text) // (CONTEXT + CONTINUATION))
    generator = np.random.default_rng([seed, 0x9E57])
    stretch = len(text) / max(count, 1)
    places = [int(stretch * (number + generator.random() / 2)) for number in range(count)]
    kinds = generator.permutation(count) < round(CLOZE_SHARE * count)
    asked = [_cloze(text, place) for place, cloze in zip(places, kinds, strict=True) if cloze]
    passages = [_passage(text, place) for place, cloze in zip(places, kinds, strict=True) if not cloze]
    asked += _choices([passage for passage in passages if passage is not None], generator)
    found = list(dict.fromkeys(question for question in asked if question is not None))  # the same twice says no more
    return found if len(found) >= LEAST else []


def digest(questions: list[Question]) -> str:
    """SHA-256 of all questions and their answers, in hex."""
    found = hashlib.sha256()
    for question in questions:
        for part in (question.kind, question.context, *question.answers):
            found.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()


def _cloze(text: str, place: int) -> Question | None:
    part, words = _words(text, place)
    ends = [word for word in words[1:] if word[1] - word[0] > 1 and word[1] <= words[0][0] + CONTEXT]
    if not ends:
        return None
    context = part[words[0][0] : ends[-1][0]].rstrip()
    return Question("cloze", context, (part[words[0][0] + len(context) : ends[-1][1]],)) if context else None


def _passage(text: str, place: int) -> tuple[str, str] | None:
    """(passage, its continuation with the space before it)."""
    part, words = _words(text, place)
    later = [word for word in words if word[0] >= words[0][0] + CONTEXT]
    ends = [word[1] for word in later if word[1] <= later[0][0] + CONTINUATION]
    if not ends:
        return None
    context = part[words[0][0] : later[0][0]].rstrip()
    return context, part[words[0][0] + len(context) : ends[-1]]


def _choices(passages: list[tuple[str, str]], generator: np.random.Generator) -> list[Question]:
    """Each passage beside its own continuation and CHOICES - 1 of others, all different."""
    found = []
    for context, own in passages:
        space = own[: len(own) - len(own.lstrip())]
        others = [passages[place][1].strip() for place in generator.permutation(len(passages))]
        different = list(dict.fromkeys(other for other in others if other.casefold() != own.strip().casefold()))
        if len(different) >= CHOICES - 1:
            answers = (own, *(space + other for other in different[: CHOICES - 1]))
            found.append(Question("choice", context, answers))
    return found


def _words(text: str, place: int) -> tuple[str, list[tuple[int, int]]]:
    """A part of the text from `place` on, and (start, end) of its words, those that it cuts left out."""
    part = text[place : place + 2 * (CONTEXT + CONTINUATION)]
    words: list[tuple[int, int]] = []
    for run in _RUN.finditer(part):
        start, end = run.span()
        if end - start > LONGEST or unicodedata.east_asian_width(part[start]) in "WF":
            words += [(at, min(at + 2, end)) for at in range(start, end, 2)]
        else:
            words.append((start, end))
    return part, words[1:-1] or [(0, 0)]
