"""The parameters of any network, told apart by their names alone: blocks, depth, and groups with rates of their own.

A block is a numbered layer ("model.layers.3") or, for parameters that are in none, the module that owns them
("model.embed_tokens"). The edges of a network are what is in no numbered layer, the first and the last block, and
every embedding: what muon leaves to adamw, as it does vectors.

    rate of a parameter = learning_rate * layer_decay ^ (depth of the last block - its own) * edge or vector rate

with depth 0 for all before the first layer (Universal language model fine-tuning, 2018, arXiv 1801.06146).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gulliver.core.errors import ConfigError
from gulliver.learning.optim import OptimizerConfig

LAYER = re.compile(r"(?:[^.]+\.)*?\d+(?=\.)")


@dataclass(frozen=True)
class Rates:
    """Factors on the learning rate; see the head of this module. Each is 0 or more."""

    layer_decay: float = 1.0
    edge: float = 1.0
    vector: float = 1.0


def layer_of(name: str) -> str | None:
    """ "model.layers.3.mlp.up.weight" -> "model.layers.3"; None for a parameter that is in no numbered layer."""
    found = LAYER.match(name)
    return None if found is None else found[0]


def block_of(name: str) -> str:
    """The block of the parameter called `name`."""
    return layer_of(name) or name.rpartition(".")[0] or name


def blocks_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """The trainable parameters, of any shape, by block, in the network's order."""
    blocks: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            blocks.setdefault(block_of(name), []).append(parameter)
    return blocks


def depths(names: Iterable[str]) -> dict[str, int]:
    """The depth of each block in order: 0 before the first numbered layer, then one more for each, the rest last."""
    blocks = list(dict.fromkeys(names))
    layers = [block for block in blocks if layer_of(f"{block}.")]
    if not layers:
        return {block: depth for depth, block in enumerate(blocks)}
    first, place = blocks.index(layers[0]), {layer: depth for depth, layer in enumerate(layers, 1)}
    return {block: place.get(block, 0 if index < first else len(layers) + 1) for index, block in enumerate(blocks)}


def parameter_groups(model: nn.Module, optimizer: OptimizerConfig, rates: Rates = Rates()) -> list[dict[str, Any]]:
    """Trainable parameters in groups of equal rate, decay and rule, for `build_optimizer`.

    Matrices and convolutions decay, vectors (biases, norms) do not.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    depth = depths(map(block_of, trainable))
    deepest, blocks = max(depth.values(), default=0), list(depth)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[float, float, bool], list[Tensor]] = {}
    for name, parameter in trainable.items():
        block, vector = block_of(name), parameter.dim() < 2
        edge = layer_of(name) is None or block in (blocks[0], blocks[-1]) or id(parameter) in tables
        rate = optimizer.learning_rate * rates.layer_decay ** (deepest - depth[block])
        rate *= rates.vector if vector else rates.edge if edge else 1.0
        key = rate, 0.0 if vector else optimizer.weight_decay, not (vector or edge)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": tensors, "learning_rate": rate, "weight_decay": decay, "orthogonal": inner}
        for (rate, decay, inner), tensors in groups.items()
    ]


def block_norms(blocks: dict[str, list[Tensor]], values: dict[Tensor, Tensor]) -> list[float]:
    """The length of each block's `values` (any shape, by parameter) together; 0 for a block that has none."""
    norms = []
    for parameters in blocks.values():
        own = [values[parameter] for parameter in parameters if parameter in values]
        norms.append(float(torch.nn.utils.get_total_norm(own)) if own else 0.0)
    return norms


def recompute_layers(model: nn.Module) -> int:
    """From now on numbered layers keep only their input for the backward pass, and are computed again in it.

    Results are the same, bit for bit, dropout included; memory for activations falls to about one layer's, time rises
    by a third (Training deep nets with sublinear memory cost, 2016, arXiv 1604.06174). Returns how many layers there
    are. ConfigError for a network without any.
    """
    names = dict.fromkeys(filter(None, (layer_of(name) for name, _ in model.named_parameters())))
    if not names:
        raise ConfigError(f"recompute: {type(model).__name__} has no numbered layers to compute again; leave it out")
    for name in names:
        layer = model.get_submodule(name)
        layer.forward = _recomputed(layer.forward)
    return len(names)


def _recomputed(forward: Any) -> Any:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
