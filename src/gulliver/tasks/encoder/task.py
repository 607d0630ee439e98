"""The encoder family: networks that turn a text into one vector, any that transformers can load.

Token ids, cuts and masks of passages are the same in training, measuring and serving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence

from gulliver.core.errors import ConfigError, DataError
from gulliver.core.evidence.evidence import Evidence, measured, paired_interval
from gulliver.core.overlap import letters
from gulliver.core.records import EXAMPLES
from gulliver.core.store.artifact import Artifact, open_artifact
from gulliver.runtime.network import load_network
from gulliver.runtime.text.tokenizer import Text
from gulliver.tasks.base import Advance, Batch
from gulliver.tasks.encoder.pooling import Pooling, cut, encode, read_pooling
from gulliver.tasks.order import Order
from gulliver.tasks.text.files import dataset_texts
from gulliver.tasks.text.network import fresh_network
from gulliver.tasks.text.task import TextTask

MIN_PASSAGE_CHARACTERS = 20
TEXTS, TEXT_TOKENS = 16, 64
"""What the standard piece of work reads in a batch."""


class EncoderTask(TextTask):
    """Text in, a vector out. A loaded network bears `pooling`, the rule by which it is measured and served."""

    name: ClassVar[str] = "encoder"

    def _batches(self, dataset: Artifact, split: str, order: Order, folder: Path, options: Any) -> Iterator[Batch]:
        """Batches of padded passages; every passage once per epoch."""
        texts = passages(dataset, split)
        if not texts:
            raise DataError(f"the split has no line of {MIN_PASSAGE_CHARACTERS} characters or more; give more text")
        for places in order.batches(len(texts)):
            yield encode_texts([texts[item] for _, item in places], folder, options.tokens)

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
        return 1 - cosine_similarity(encode(model, batch), target, dim=-1)

    def _score(
        self,
        model: nn.Module,
        dataset: Artifact,
        parent: nn.Module | None,
        folder: Path,
        options: Any,
        share: float,
        kept: Path | None,
        advance: Advance,
    ) -> list[Evidence]:
        """Cosine of each text's vector to the parent's; without a parent, only the spread of its own vectors.

        `share` of the `texts` is scored; at least two.
        """
        found = different(passages(dataset, "eval"))[: max(2, round(share * options.texts))]
        if len(found) < 2:
            raise DataError(f"the eval split has {len(found)} different lines of text to embed; two are needed")
        ours = embeddings(model, found, folder)
        theirs = ours if parent is None else embeddings(parent, found, folder)
        unrelated = cosine_similarity(theirs, theirs.roll(len(found) // 2 or 1, 0)).tolist()
        detail = {"texts": len(found), "precision": "float32"}
        common: dict[str, Any] = {"n": len(found), "data_hash": dataset.files[EXAMPLES].sha256, "detail": detail}
        evidence = [measured("baseline_cosine_similarity", *paired_interval(unrelated), **common)]
        if parent is None:
            return evidence
        cosine = cosine_similarity(ours, theirs).clamp(-1, 1).tolist()
        above = [near - base for near, base in zip(cosine, unrelated, strict=True)]
        mean, low, high = paired_interval(cosine)
        return [
            *evidence,
            measured("cosine_similarity", mean, low, high, **common),
            measured("quality_loss", 1 - mean, 1 - high, 1 - low, **common),
            measured("cosine_similarity_vs_baseline", *paired_interval(above), **common),
        ]

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
    model = load_network(folder, empty, transformers.AutoModel)
    model.pooling = read_pooling(folder)  # type: ignore[assignment]
    return model


def embeddings(model: nn.Module, texts: list[str], folder: Path) -> Tensor:
    """Vectors float32 [texts, width]."""
    with torch.no_grad():
        batches = (encode_texts(texts[start : start + 16], folder, 512) for start in range(0, len(texts), 16))
        return torch.cat([encode(model, batch) for batch in batches])


def passages(dataset: Artifact, split: str) -> list[str]:
    """The lines of a split's texts that are long enough to mean something."""
    found = (line.strip() for text in dataset_texts(open_artifact(dataset.path), split) for line in text.splitlines())
    return [line for line in found if len(line) >= MIN_PASSAGE_CHARACTERS]


def different(lines: Sequence[str]) -> list[str]:
    """Each line once, whatever its case, blanks and marks: a repeated text adds no observation."""
    found: dict[str, str] = {}
    for line in lines:
        found.setdefault(letters(line.casefold()) or line, line)
    return list(found.values())


def encode_texts(texts: Sequence[str], folder: Path, tokens: int) -> Batch:
    """Texts as `padded` gives them, int64 [batch, longest], cut to the model's own limit and to `tokens`."""
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
