"""Passages of text as an encoder reads them: the same token ids, cuts and masks in training, measuring and serving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from gulliver.core.errors import DataError
from gulliver.core.store.artifact import Artifact, open_artifact
from gulliver.runtime.text.tokenizer import Text
from gulliver.tasks.base import Batch
from gulliver.tasks.encoder.pooling import cut, read_pooling
from gulliver.tasks.order import Order
from gulliver.tasks.text.files import dataset_texts

MIN_PASSAGE_CHARACTERS = 20


def passages(dataset: Artifact, split: str) -> list[str]:
    """The lines of a split's texts that are long enough to mean something."""
    found = (line.strip() for text in dataset_texts(open_artifact(dataset.path), split) for line in text.splitlines())
    return [line for line in found if len(line) >= MIN_PASSAGE_CHARACTERS]


def encode_texts(texts: Sequence[str], folder: Path, tokens: int) -> Batch:
    """Texts as `padded` gives them, cut to the model's own limit and to `tokens`."""
    side = _text(str(folder), (folder / "tokenizer.json").stat().st_mtime_ns)
    longest = min(tokens, read_pooling(folder).longest)
    return padded([cut(side.encode(text), longest) for text in texts])


def padded(rows: Sequence[Sequence[int]]) -> Batch:
    """{"tokens", "mask"}, int64 [batch, longest]: rows filled up with zeros, which the mask leaves out."""
    tokens = [torch.tensor(row, dtype=torch.int64) for row in rows]
    marks = [torch.ones_like(row) for row in tokens]
    return {"tokens": pad_sequence(tokens, batch_first=True), "mask": pad_sequence(marks, batch_first=True)}


@lru_cache(maxsize=4)
def _text(folder: str, stamp: int) -> Text:
    return Text(Path(folder))


def passage_batches(texts: list[str], folder: Path, tokens: int, order: Order) -> Iterator[Batch]:
    """Batches of padded passages; every passage once per epoch."""
    if not texts:
        raise DataError(f"the split has no line of {MIN_PASSAGE_CHARACTERS} characters or more; give more text")
    for places in order.batches(len(texts)):
        yield encode_texts([texts[item] for _, item in places], folder, tokens)
