"""Scores of language models: perplexity, answers to questions, and their paired comparison with the parent's.

With L_w the mean negative log-likelihood per token of window w, perplexity is exp(mean_w L_w) (all windows are
equally long). Against a parent with L'_w the ratio is exp(mean_w (L_w - L'_w)) and its interval the exponential of
Student's interval for that mean of paired differences, which is far narrower than the intervals of the two alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gulliver.core.errors import DataError
from gulliver.core.evidence.evidence import Evidence, measured, paired_interval
from gulliver.core.overlap import gram_hashes
from gulliver.core.records import EXAMPLES
from gulliver.core.store.artifact import Artifact
from gulliver.nets.precision import has_bfloat16
from gulliver.tasks.base import Advance
from gulliver.tasks.language.network import positions_of, vocabulary_of
from gulliver.tasks.language.outputs import Outputs
from gulliver.tasks.language.question_scores import QuestionSheet
from gulliver.tasks.language.questions import make_questions
from gulliver.tasks.language.text import joined, token_stream
from gulliver.tasks.text.files import dataset_texts
from gulliver.tasks.text.tokenizer import load_tokenizer

FEWEST_WINDOWS, FEWEST_TOKENS = 8, 64
"""Where a text is too short for so many windows they are shorter, but of so many tokens at least."""
RUN_TOKENS, MOST_REPEATED = 64, 0.5
"""A window repeats others when more than this share of its runs of so many tokens are theirs."""
LAYERS = 0.6
"""Share of the time that the layers take, about; the heads take the rest."""


@dataclass(frozen=True)
class Window:
    """What one window of `context` tokens gave: means over its scored tokens."""

    nll: float
    parent_nll: float = math.nan
    kl: float = math.nan
    agreement: float = math.nan


def score_causal(
    model: nn.Module,
    dataset: Artifact,
    parent: nn.Module | None,
    folder: Path,
    windows: int,
    context: int,
    questions: int,
    kept: Path | None = None,
    advance: Advance = lambda share: None,
) -> list[Evidence]:
    """Evidence on the first `windows` windows of `context` tokens of the eval split and on its questions; `Task.score`.

    Windows that repeat others are left out, since they add no observation. A model that reads fewer tokens at
    once, and a shorter text, get shorter windows; the evidence says which. DataError where no two windows are left.
    """
    if parent is not None and vocabulary_of(parent) != vocabulary_of(model):
        raise DataError("model and parent have different vocabularies; they cannot be compared token by token")
    stream = token_stream(dataset, "eval", folder)
    context = window_length(len(stream), windows, min(context, positions_of(model)))
    rows, repeats = distinct_windows(stream, context, windows)
    count = len(rows)
    if count < 2:
        raise DataError(
            f"the eval split repeats one window of {context} tokens {repeats + 1} times, which is one observation; "
            "give more text"
        )
    sheet = _sheet(dataset, folder, questions, positions_of(model))
    kind = "bfloat16" if has_bfloat16() else "float32"
    layers, batches = LAYERS if parent is None else LAYERS / 2, [*rows[:, None], *sheet.batches]
    name = f"{_digest(batches)}-{kind}"
    with torch.no_grad():
        # the parent's layers run first, then the model's, then both heads side by side
        theirs = None if parent is None else Outputs(parent, batches, kept and kept / name)
        if theirs is not None:
            theirs.run_layers(lambda share: advance(layers * share))
        ours = Outputs(model, batches)
        ours.run_layers(lambda share: advance(LAYERS - layers * (1 - share)))
        found = []
        with ours.ready(), nullcontext() if theirs is None else theirs.ready():
            for number in range(count):
                found.append(_window(ours, theirs, number))
                advance(LAYERS + (1 - LAYERS) * (number + 1) / count)
            marks = sheet.marks(ours, count), None if theirs is None else sheet.marks(theirs, count)
    precision = f"products in {kind}"
    precision += ", float32 where the network mixes types" if ours.mixes_types else ""
    detail = {"windows": count, "context": context, "precision": precision}
    detail |= {"repeats": repeats} if repeats else {}
    common: dict[str, Any] = {"n": count, "data_hash": dataset.files[EXAMPLES].sha256, "detail": detail}
    evidence = [measured("perplexity", *_exp(window.nll for window in found), **common)]
    evidence += _against_unigrams(found, rows, token_stream(dataset, "train", folder), model, common)
    evidence += _against_parent(found, common) if parent is not None else []
    return evidence + sheet.evidence(*marks, common)


def window_length(tokens: int, windows: int, context: int) -> int:
    """How long windows of a text of so many tokens are, at most `context`. DataError when there are no two."""
    length = min(context, max(FEWEST_TOKENS, tokens // min(windows, FEWEST_WINDOWS)))
    if tokens < 2 * length:
        raise DataError(f"the eval split has {tokens} tokens, too few for two windows of {length}; give more text")
    return length


def distinct_windows(stream: Tensor, context: int, windows: int) -> tuple[Tensor, int]:
    """The first `windows` windows of a stream int64 [tokens] that repeat none before, int64 [n, context]; and how many

    that do were left out on the way: those of which most runs of tokens, wherever they begin, occurred already.
    """
    kept: list[Tensor] = []
    seen, repeats = np.empty(0, np.uint64), 0
    for row in stream[: len(stream) // context * context].view(-1, context):
        runs = np.unique(gram_hashes(row.numpy(), min(RUN_TOKENS, context)))
        if np.isin(runs, seen).mean() > MOST_REPEATED:
            repeats += 1
            continue
        kept.append(row)
        if len(kept) == windows:
            break
        seen = np.concatenate([seen, runs])
    return torch.stack(kept), repeats


def _digest(batches: Sequence[Tensor]) -> str:
    """Of token ids, int64 [rows, tokens] each, in hex."""
    found = hashlib.sha256()
    for tokens in batches:
        found.update(f"{tuple(tokens.shape)}".encode() + tokens.numpy().tobytes())
    return found.hexdigest()[:32]


def _sheet(dataset: Artifact, folder: Path, count: int, positions: int) -> QuestionSheet:
    """`count` questions of the eval split's text, in a model's tokens."""
    text = joined(list(dataset_texts(dataset, "eval")))
    return QuestionSheet(make_questions(text, count), load_tokenizer(folder), positions)


def _against_parent(found: list[Window], common: dict[str, Any]) -> list[Evidence]:
    ratio, low, high = _exp(window.nll - window.parent_nll for window in found)
    return [
        measured("perplexity_ratio", ratio, low, high, **common),
        measured("kl_divergence", *paired_interval(window.kl for window in found), **common),
        measured("top1_agreement", *paired_interval(window.agreement for window in found), **common),
        measured("quality_loss", ratio - 1, low - 1, high - 1, **common),
    ]


def _against_unigrams(
    found: list[Window], rows: Tensor, train: Tensor, model: nn.Module, common: dict[str, Any]
) -> list[Evidence]:
    """Unigram distribution of the train split, one added to every count: the simplest model of the same tokens."""
    vocabulary = vocabulary_of(model)
    counts = torch.bincount(train, minlength=vocabulary).double() + 1
    nll = -(counts / counts.sum()).log()
    baseline = nll[rows[:, 1:]].mean(1).tolist()
    differences = (window.nll - base for window, base in zip(found, baseline, strict=True))
    return [
        measured("baseline_perplexity", *_exp(baseline), **common),
        measured("perplexity_vs_baseline", *_exp(differences), **common),
    ]


def _exp(logarithms: Iterable[float]) -> tuple[float, float, float]:
    """Exponentials of the mean of logarithms and of the ends of its interval."""
    mean, low, high = (math.exp(min(number, 700.0)) for number in paired_interval(logarithms))
    return mean, low, high


# ---- windows ------------------------------------------------------------------------------------------------------
def _window(ours: Outputs, theirs: Outputs | None, number: int) -> Window:
    """Score one window, a chunk of positions at a time."""
    targets = ours.batches[number][0, 1:]
    places = torch.zeros(len(targets), dtype=torch.int64), torch.arange(len(targets))
    nll = parent_nll = kl = same = 0.0
    references = None if theirs is None else theirs.log_probabilities(number, *places)
    for start, mine in ours.log_probabilities(number, *places):
        target = targets[start : start + len(mine), None]
        nll -= mine.gather(1, target).sum().item()
        if references is None:
            continue
        parent_start, reference = next(references)
        assert parent_start == start and reference.shape == mine.shape, "model and parent have different vocabularies"
        parent_nll -= reference.gather(1, target).sum().item()
        same += (mine.argmax(1) == reference.argmax(1)).sum().item()
        kl += torch.linalg.vecdot(reference.exp(), reference - mine).sum().item()
    scored = len(targets)
    if theirs is None:
        return Window(nll / scored)
    return Window(nll / scored, parent_nll / scored, kl / scored, same / scored)
