"""What may be asked of the outputs of causal language models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


def final_hidden(model: nn.Module, tokens: Tensor) -> Tensor:
    """What the output head of a causal model reads, [batch, tokens, width]."""
    base: Callable[..., Any] = model.base_model  # type: ignore[assignment]
    return base(input_ids=tokens, use_cache=False).last_hidden_state


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits of a causal model, [batch, tokens, vocab]."""
    return model(input_ids=tokens, use_cache=False).logits


def vocabulary_of(model: nn.Module) -> int:
    """How many tokens a causal model knows, as the config of its text part says where it has several."""
    return int(model.config.get_text_config(decoder=True).vocab_size)  # type: ignore[union-attr, operator]


def positions_of(model: nn.Module) -> int:
    """How many tokens a causal model reads at once; a large number where its config names no limit (none, 0 or -1)."""
    found = getattr(model.config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else 2**31


def head_weight(model: nn.Module) -> Tensor:
    """The output head's matrix, [vocab, width]; a leaf or whatever the module's `weight` gives."""
    return model.get_output_embeddings().weight  # type: ignore[operator]


_PLAIN_HEAD: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def has_plain_head(model: nn.Module) -> bool:
    """Whether logits are exactly `hidden @ head.T`: no bias, scaling or soft cap. Asked of the network itself, once."""
    if model in _PLAIN_HEAD:
        return _PLAIN_HEAD[model]
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or model.base_model is model:
        return False
    tokens = torch.arange(4).remainder(vocabulary_of(model))[None]
    training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        expected = torch.nn.functional.linear(final_hidden(model, tokens), head.weight)
        _PLAIN_HEAD[model] = torch.equal(expected, logits_of(model, tokens))
    model.train(training)
    return _PLAIN_HEAD[model]
