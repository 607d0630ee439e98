"""Text as tokens: the token stream of a split, and windows of it.

The stream of a split is the tokenizer applied to the split's texts joined in order; a text that does not end in a
newline is followed by a blank line. For a single text it is exactly the tokenizer applied to that text.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gulliver.core.errors import ConfigError, DataError
from gulliver.core.store.artifact import Artifact, open_artifact
from gulliver.tasks.base import Batch
from gulliver.tasks.order import Order
from gulliver.tasks.text.files import dataset_texts
from gulliver.tasks.text.tokenizer import load_tokenizer, tokens_of


def joined(texts: list[str]) -> str:
    """The texts as one, with a blank line after each that does not end its last line."""
    ended = [text if text.endswith("\n") else text + "\n\n" for text in texts[:-1]]
    return "".join([*ended, *texts[-1:]])


def token_stream(dataset: Artifact, split: str, folder: Path) -> Tensor:
    """All tokens of a split, int64 [n], kept in memory for the next call."""
    return _stream(str(dataset.path), dataset.id, split, load_tokenizer(folder))


@lru_cache(maxsize=4)
def _stream(path: str, dataset_id: str, split: str, tokenizer: Any) -> Tensor:
    texts = list(dataset_texts(open_artifact(path), split))
    if not texts:
        return torch.empty(0, dtype=torch.int64)
    return tokens_of(tokenizer, joined(texts))


def window_batches(stream: Tensor, tokens: int, order: Order) -> Iterator[Batch]:
    """Random windows {"tokens": int64 [batch, tokens]}: a new offset each epoch, then every window once."""
    if tokens < 2:
        raise ConfigError(f"tokens is {tokens}; a window needs at least 2")
    if len(stream) < tokens:
        raise DataError(f"the split has {len(stream)} tokens, a window needs {tokens}; give more text or fewer tokens")
    slack = min(tokens - 1, len(stream) - tokens)
    count = (len(stream) - slack) // tokens
    for places in order.batches(count):
        starts = [_offset(order.seed, epoch, slack) + item * tokens for epoch, item in places]
        yield {"tokens": torch.stack([stream[start : start + tokens] for start in starts])}


@lru_cache(maxsize=64)
def _offset(seed: int, epoch: int, slack: int) -> int:
    return int(np.random.default_rng([seed, epoch, 2]).integers(0, slack + 1))
