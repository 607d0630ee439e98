"""Scores of encoders: how near each text's vector is to the parent's, beside that of unrelated texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from gulliver.core.errors import DataError
from gulliver.core.evidence.evidence import Evidence, measured, paired_interval
from gulliver.core.records import EXAMPLES
from gulliver.core.store.artifact import Artifact
from gulliver.tasks.encoder.pooling import encode
from gulliver.tasks.encoder.text import encode_texts, passages


def score_encoder(
    model: nn.Module, dataset: Artifact, parent: nn.Module | None, folder: Path, texts: int
) -> list[Evidence]:
    """Cosine of each text's embedding to the parent's; without a parent, only the spread of its own embeddings."""
    found = passages(dataset, "eval")[:texts]
    if len(found) < 2:
        raise DataError(f"the eval split has {len(found)} lines of text to embed; at least two are needed")
    ours = _embeddings(model, found, folder)
    theirs = ours if parent is None else _embeddings(parent, found, folder)
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


def _embeddings(model: nn.Module, texts: list[str], folder: Path) -> Tensor:
    with torch.no_grad():
        batches = (encode_texts(texts[start : start + 16], folder, 512) for start in range(0, len(texts), 16))
        return torch.cat([encode(model, batch) for batch in batches])
