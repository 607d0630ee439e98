"""Scores of language models: perplexity, and its paired comparison with the parent.

With L_w the mean negative log-likelihood per token of window w, perplexity is exp(mean_w L_w) (all windows are
equally long). Against a parent with L'_w the ratio is exp(mean_w (L_w - L'_w)) and its interval the exponential of
Student's interval for that mean of paired differences, which is far narrower than the intervals of the two alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gulliver.core.errors import DataError
from gulliver.core.evidence.evidence import Evidence, measured, paired_interval
from gulliver.core.records import EXAMPLES
from gulliver.core.store.artifact import Artifact
from gulliver.nets.linear_kl import chunk_rows
from gulliver.tasks.language.network import final_hidden, has_plain_head, head_weight, logits_of
from gulliver.tasks.language.text import token_stream

CACHE_BYTES = 128 * 2**20
"""A parent's final hidden states are kept for the next score when they are smaller than this."""


@dataclass(frozen=True)
class Window:
    """What one window of `context` tokens gave: means over its scored tokens."""

    nll: float
    parent_nll: float = math.nan
    kl: float = math.nan
    agreement: float = math.nan


def score_causal(
    model: nn.Module, dataset: Artifact, parent: nn.Module | None, folder: Path, windows: int, context: int
) -> list[Evidence]:
    """Evidence on the first `windows` windows of `context` tokens of the eval split; see `Task.score`.

    A model that reads fewer tokens at once gets windows of that length; the evidence says which.
    """
    if parent is not None and parent.config.vocab_size != model.config.vocab_size:  # type: ignore[union-attr]
        raise DataError("model and parent have different vocabularies; they cannot be compared token by token")
    stream = token_stream(dataset, "eval", folder)
    context = min(context, int(getattr(model.config, "max_position_embeddings", context)))  # type: ignore[arg-type]
    count = min(windows, len(stream) // context)
    if count < 2:
        told = f"the eval split has {len(stream)} tokens, too few for two windows of {context}"
        raise DataError(f"{told}; give more text or a smaller context")
    rows = stream[: count * context].view(count, context)
    outputs = None if parent is None else _Parent(parent, (dataset.id, count, context))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = [_window(model, row, outputs, number) for number, row in enumerate(rows)]
    detail = {"windows": count, "context": context, "precision": "bfloat16 autocast"}
    common: dict[str, Any] = {"n": count, "data_hash": dataset.files[EXAMPLES].sha256, "detail": detail}
    evidence = [measured("perplexity", *_exp(window.nll for window in found), **common)]
    evidence += _against_unigrams(found, rows, token_stream(dataset, "train", folder), model, common)
    return evidence + (_against_parent(found, common) if parent is not None else [])


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
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
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
_KEPT: WeakKeyDictionary[nn.Module, tuple[Any, dict[int, Tensor]]] = WeakKeyDictionary()


class _Parent:
    """The parent's outputs by window; its final hidden states are kept for the next score of the same windows."""

    def __init__(self, network: nn.Module, key: Any) -> None:
        self.network = network
        version = tuple((id(parameter), parameter._version) for parameter in network.parameters())
        if _KEPT.get(network, (None,))[0] != (key, version):
            _KEPT[network] = ((key, version), {})
        self.hidden = _KEPT[network][1]

    def final_hidden(self, row: Tensor, number: int) -> Tensor:
        """[context, width] of window `number`."""
        if number in self.hidden:
            return self.hidden[number]
        hidden = final_hidden(self.network, row[None])[0].to(torch.bfloat16)
        if hidden.numel() * 2 + sum(tensor.numel() * 2 for tensor in self.hidden.values()) <= CACHE_BYTES:
            self.hidden[number] = hidden
        return hidden


def _window(model: nn.Module, row: Tensor, parent: _Parent | None, number: int) -> Window:
    """Score one window, a chunk of positions at a time."""
    targets = row[1:]
    nll = parent_nll = kl = same = 0.0
    theirs = None if parent is None else _log_probabilities(parent.network, row, parent, number)
    for start, ours in _log_probabilities(model, row, None, number):
        target = targets[start : start + len(ours), None]
        nll -= ours.gather(1, target).sum().item()
        if theirs is None:
            continue
        parent_start, reference = next(theirs)
        assert parent_start == start and reference.shape == ours.shape, "model and parent have different vocabularies"
        parent_nll -= reference.gather(1, target).sum().item()
        same += (ours.argmax(1) == reference.argmax(1)).sum().item()
        kl += torch.linalg.vecdot(reference.exp(), reference - ours).sum().item()
    scored = len(targets)
    if parent is None:
        return Window(nll / scored)
    return Window(nll / scored, parent_nll / scored, kl / scored, same / scored)


def _log_probabilities(
    model: nn.Module, row: Tensor, parent: _Parent | None, number: int
) -> Iterator[tuple[int, Tensor]]:
    """(first position, float32 [positions, vocab]) chunks over all positions but the last, which predicts nothing."""
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    step = chunk_rows(vocabulary)
    if not has_plain_head(model):
        logits = logits_of(model, row[None])[0, :-1]
        for start in range(0, len(logits), step):
            yield start, torch.log_softmax(logits[start : start + step].float(), -1)
        return
    hidden = final_hidden(model, row[None])[0] if parent is None else parent.final_hidden(row, number)
    weight = head_weight(model)
    for start in range(0, len(hidden) - 1, step):
        part = hidden[start : min(start + step, len(hidden) - 1)]
        yield start, torch.log_softmax(torch.nn.functional.linear(part, weight), -1, dtype=torch.float32)
