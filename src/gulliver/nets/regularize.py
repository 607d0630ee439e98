"""What keeps a network from learning its data by heart, put into any network while it is in training mode.

dropout           each number that a dropout layer or an attention sees is zero with probability p, the rest is
                  divided by 1 - p (2012, arXiv 1207.0580)
stochastic depth  layer l of L, x -> x + f(x), is left out for an example with probability p l / L, else f(x) is
                  divided by one minus that (Deep networks with stochastic depth, 2016, arXiv 1603.09382)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

ATTENTION = "attention_dropout"
"""What attentions of transformers call their probability, where it is a number and no layer."""


def set_dropout(model: nn.Module, share: float) -> int:
    """Drop this share (0 to below 1) wherever the network can; returns in how many places that is."""
    places = 0
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p, places = share, places + 1
        if isinstance(getattr(module, ATTENTION, None), (int, float)):
            setattr(module, ATTENTION, share)
            places += 1
    return places


def drop_layers(layers: Sequence[nn.Module], share: float) -> int:
    """Leave out residual layers [batch, …] -> [batch, …], the last one with probability `share`; returns how many."""
    for number, layer in enumerate(layers, 1):
        layer.forward = _dropping(layer, layer.forward, share * number / len(layers))
    return len(layers)


def _dropping(layer: nn.Module, forward: Callable[..., Any], share: float) -> Callable[..., Any]:
    def dropped(x: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(x, *args, **kwargs)
        if not layer.training:
            return found
        after = found[0] if isinstance(found, tuple) else found
        kept = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= share
        mixed = x + (after - x) * (kept.to(x.dtype) / (1 - share))
        return (mixed, *found[1:]) if isinstance(found, tuple) else mixed

    return dropped
