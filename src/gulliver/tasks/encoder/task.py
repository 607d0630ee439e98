"""The encoder family: networks that turn a text into one vector, any that transformers can load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from gulliver.core.errors import ConfigError
from gulliver.core.evidence.evidence import Evidence
from gulliver.core.store.artifact import Artifact
from gulliver.runtime.network import load_network
from gulliver.tasks.base import Batch
from gulliver.tasks.encoder.pooling import Pooling, encode, read_pooling
from gulliver.tasks.encoder.score import score_encoder
from gulliver.tasks.encoder.text import passage_batches, passages
from gulliver.tasks.order import Order
from gulliver.tasks.text.network import fresh_network
from gulliver.tasks.text.task import TextTask

TEXTS, TEXT_TOKENS = 16, 64
"""What the standard piece of work reads in a batch."""


class EncoderTask(TextTask):
    """Text in, a vector out. A loaded network bears `pooling`, the rule by which it is measured and served."""

    name: ClassVar[str] = "encoder"

    def _batches(self, dataset: Artifact, split: str, order: Order, folder: Path, options: Any) -> Iterator[Batch]:
        return passage_batches(passages(dataset, split), folder, options.tokens, order)

    def _build(self, size: int) -> nn.Module:
        """A fresh BERT that reads bytes: `size` layers + 1, width 32 · (size + 1)."""
        model = fresh_network(transformers.BertModel, size, max_position_embeddings=512)
        model.pooling = Pooling("mean", True, 512)  # type: ignore[assignment]
        return model

    def _load(self, folder: Path, empty: bool) -> nn.Module:
        return load_encoder(folder, empty)

    def _loss(self, model: nn.Module, batch: Batch, parent: nn.Module | None) -> Tensor:
        """One minus the cosine to the parent's vector. ConfigError without a parent: it has no loss of its own."""
        if parent is None:
            raise ConfigError("an encoder has no loss of its own; give a parent to be close to")
        with torch.no_grad():
            target = encode(parent, batch)
        return 1 - torch.nn.functional.cosine_similarity(encode(model, batch), target, dim=-1)

    def _score(
        self, model: nn.Module, dataset: Artifact, parent: nn.Module | None, folder: Path, options: Any, share: float
    ) -> list[Evidence]:
        """`share` of the `texts` is scored; at least two."""
        return score_encoder(model, dataset, parent, folder, max(2, round(share * options.texts)))

    def _workloads(self, model: nn.Module, folder: Path) -> dict[str, Callable[[], int]]:
        """Embedding texts of one length, a batch at a time."""
        vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        tokens = torch.randint(vocabulary, (TEXTS, TEXT_TOKENS), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(tokens)

        def embed() -> int:
            with torch.no_grad():
                model(input_ids=tokens, attention_mask=mask)
            return TEXTS

        return {"examples_per_s": embed}


def load_encoder(folder: Path, empty: bool = False) -> nn.Module:
    """The network of a folder with its pooling as `pooling`; without weights when `empty`."""
    model = load_network(folder, empty)
    model.pooling = read_pooling(folder)  # type: ignore[assignment]
    return model
