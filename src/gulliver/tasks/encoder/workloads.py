"""The standard piece of work for measuring an encoder's speed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

TEXTS, TEXT_TOKENS = 16, 64


def encoder_workloads(model: nn.Module) -> dict[str, Callable[[], int]]:
    """Embedding texts of one length, a batch at a time."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    tokens = torch.randint(vocabulary, (TEXTS, TEXT_TOKENS), generator=generator)
    mask = torch.ones_like(tokens)

    def embed() -> int:
        with torch.no_grad():
            model(input_ids=tokens, attention_mask=mask)
        return TEXTS

    return {"examples_per_s": embed}
