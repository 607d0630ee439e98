"""What a causal model answers to questions, beside its parent's answers and the simplest baseline; see questions.py.

A cloze is right when every token of the word is the likeliest one after the tokens before it; a choice when the right
one has a greater log-likelihood per byte of UTF-8 than every other. A tie and a NaN are wrong. Shares have Wilson's
interval, differences to the parent one that is paired by question.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gulliver.core.evidence.evidence import Evidence, measured
from gulliver.core.evidence.intervals import matched_interval, wilson_interval
from gulliver.tasks.language.outputs import Outputs
from gulliver.tasks.language.questions import Question, digest

BATCH = 16


@dataclass(frozen=True)
class AnswerTokens:
    """One answer as tokens: those from `first` on are the answer's; `question` and `answer` say whose."""

    question: int
    answer: int
    tokens: tuple[int, ...]
    first: int


class QuestionSheet:
    """Questions as batches of tokens, each [rows, tokens], padded at the end, where causal models do not look."""

    def __init__(self, questions: Sequence[Question], tokenizer: Any, positions: int) -> None:
        self.questions = list(questions)
        rows = sorted(self._answers(tokenizer, positions), key=lambda row: (len(row.tokens), row.question, row.answer))
        self.rows = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
        self.batches = [_padded(part) for part in self.rows]

    def _answers(self, tokenizer: Any, positions: int) -> list[AnswerTokens]:
        """All answers; questions of which one does not fit are left out."""
        begin = tokenizer("").get("input_ids", [])[:1]
        begin = begin if begin and begin[0] == tokenizer.bos_token_id else []
        kept, found = [], []
        for question in self.questions:
            rows = []
            for number, answer in enumerate(question.answers):
                context, whole = (_tokens(tokenizer, text) for text in (question.context, question.context + answer))
                pairs = enumerate(zip(context, whole, strict=False))
                first = next((at for at, (one, other) in pairs if one != other), len(context))
                cut = max(0, len(begin) + len(whole) - positions)
                if cut < first < len(whole):
                    tokens = (*begin, *whole[cut:])
                    rows.append(AnswerTokens(len(kept), number, tokens, len(begin) + first - cut))
            if len(rows) == len(question.answers) and rows[0].first > 0:
                kept.append(question)
                found += rows
        self.questions = kept
        return found

    def marks(self, outputs: Outputs, offset: int) -> list[bool]:
        """Whether each question is answered right; the sheet's batches are those of `outputs` from `offset` on."""
        likely = [[0.0] * len(question.answers) for question in self.questions]
        greedy = [True] * len(self.questions)
        for number, rows in enumerate(self.rows):
            wanted = [(place, at) for place, row in enumerate(rows) for at in range(row.first, len(row.tokens))]
            places = torch.tensor([place for place, _ in wanted])
            before = torch.tensor([at - 1 for _, at in wanted])
            for start, chunk in outputs.log_probabilities(offset + number, places, before):
                best = chunk.argmax(1).tolist()
                for one, (place, at) in enumerate(wanted[start : start + len(chunk)]):
                    row = rows[place]
                    likely[row.question][row.answer] += chunk[one, row.tokens[at]].item()
                    if best[one] != row.tokens[at]:
                        greedy[row.question] &= row.answer != 0
        return [
            greedy[number] and not math.isnan(likely[number][0])
            if question.kind == "cloze"
            else _first_is_best(question, likely[number])
            for number, question in enumerate(self.questions)
        ]

    def evidence(self, ours: list[bool], theirs: list[bool] | None, common: dict[str, Any]) -> list[Evidence]:
        """Share of right answers of each kind, its baseline, and how much less that is than the parent's."""
        found = []
        for kind in ("cloze", "choice"):
            asked = [number for number, question in enumerate(self.questions) if question.kind == kind]
            if not asked:
                continue
            detail = {"questions_sha256": digest([self.questions[number] for number in asked])}
            about: dict[str, Any] = {**common, "n": len(asked), "detail": {**common["detail"], **detail}}
            mine = [ours[number] for number in asked]
            found.append(measured(f"{kind}_accuracy", *wilson_interval(sum(mine), len(mine)), **about))
            found.append(measured(f"baseline_{kind}_accuracy", self._guessed(asked), **about))
            if theirs is not None:
                drop = matched_interval([theirs[number] for number in asked], mine)
                found.append(measured(f"{kind}_accuracy_drop", *drop, **about))
        return found

    def _guessed(self, asked: list[int]) -> float:
        """Of choices a blind guess; of cloze questions always the most frequent of their answers."""
        answers = [self.questions[number].answers for number in asked]
        if len(answers[0]) > 1:
            return 1 / len(answers[0])
        return Counter(one[0].strip().casefold() for one in answers).most_common(1)[0][1] / len(asked)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _first_is_best(question: Question, likely: list[float]) -> bool:
    sizes = [len(text.encode("utf-8", "surrogatepass")) for text in question.answers]
    scores = [value / size for value, size in zip(likely, sizes, strict=True)]
    return all(scores[0] > other for other in scores[1:])


def _padded(rows: list[AnswerTokens]) -> Tensor:
    longest = max(len(row.tokens) for row in rows)
    return torch.tensor([[*row.tokens, *(longest - len(row.tokens)) * [row.tokens[-1]]] for row in rows])
