"""What can only be removed together in a transformer: neurons of its feed-forward parts, and groups of heads.

A neuron is a row of each matrix that reads the hidden state and a column of the one that writes it back. A head that
others share (grouped queries) is removed with all the query heads that read its keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from gulliver.tasks.base import Coupling
from gulliver.tasks.text.streaming import largest_list

NEURONS = (
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ("intermediate.dense", "output.dense"),
    ("ffn.lin1", "ffn.lin2"),
)
"""(modules that read, and last the one that writes) inside a layer, by architecture."""
HEADS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
)
"""(queries, keys, values, output) inside a layer, by architecture."""


def transformer_couplings(model: nn.Module) -> list[Coupling]:
    """The couplings of every layer whose modules bear names of the tables above; none for other architectures."""
    name, layers = largest_list(model)
    return [found for index, layer in enumerate(layers) for found in _of_layer(model, f"{name}.{index}.", layer)]


def _of_layer(model: nn.Module, prefix: str, layer: nn.Module) -> Iterator[Coupling]:
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    for kind, table in (("neurons", NEURONS), ("heads", HEADS)):
        for *readers, writer in table:
            if {*readers, writer} <= set(linears):
                width = linears[writer].in_features
                units = width if kind == "neurons" else _key_heads(model)
                members = [member for name in readers for member in _rows(prefix, name, linears[name], units)]
                members.append((f"{prefix}{writer}.weight", 1, width // units))
                yield Coupling(f"{prefix}{kind}", units, tuple(members))


def _rows(prefix: str, name: str, module: nn.Linear, units: int) -> list[tuple[str, int, int]]:
    """The rows of a matrix and of its bias, where it has one."""
    size = module.out_features // units
    bias = [(f"{prefix}{name}.bias", 0, size)] if module.bias is not None else []
    return [(f"{prefix}{name}.weight", 0, size), *bias]


def _key_heads(model: nn.Module) -> int:
    config = model.config
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "n_heads", 1)
    return int(getattr(config, "num_key_value_heads", None) or heads)  # type: ignore[arg-type]
