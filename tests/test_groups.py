"""Blocks, depths and groups of parameters by their names; layers that are computed again."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from gulliver.core.errors import ConfigError
from gulliver.learning.groups import (
    Rates,
    block_norms,
    block_of,
    blocks_of,
    depths,
    parameter_groups,
    recompute_layers,
)
from gulliver.learning.optim import OptimizerConfig
from gulliver.tasks import get_task

LLAMA = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]
CONFIG = OptimizerConfig("muon", learning_rate=0.1, weight_decay=0.01)


def _noted(kept: list[int], one: torch.Tensor) -> torch.Tensor:
    kept.append(one.numel())
    return one


def named(model: nn.Module, rates: Rates = Rates()) -> dict[str, dict[str, Any]]:  # noqa: B008
    """Parameter -> its group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, CONFIG, rates)
    return {names[id(tensor)]: group for group in groups for tensor in group["params"]}


def test_a_block_is_a_numbered_layer_or_the_owner() -> None:
    assert block_of("model.layers.3.mlp.experts.7.up.weight") == "model.layers.3"
    assert block_of("model.embed_tokens.weight") == "model.embed_tokens" and block_of("0.weight") == "0"
    assert block_of("scale") == "scale"
    assert list(blocks_of(get_task("language").build(1))) == LLAMA


def test_depths_count_layers_and_hold_all_parameters() -> None:
    assert depths(LLAMA) == {"model.embed_tokens": 0, "model.layers.0": 1, "model.layers.1": 2, "model.norm": 3}
    assert depths(["stem.conv", "stem.norm", "in.0", "in.1", "head.a", "head.b"]) == {
        "stem.conv": 0, "stem.norm": 0, "in.0": 1, "in.1": 2, "head.a": 3, "head.b": 3,
    }  # fmt: skip
    assert depths(["table", "hidden", "head"]) == {"table": 0, "hidden": 1, "head": 2}


@pytest.mark.parametrize("family", ["language", "vision", "encoder"])
def test_every_parameter_is_in_one_group_and_muon_has_hidden_matrices_alone(family: str) -> None:
    model = get_task(family).build(1)
    found = named(model)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert found[name]["weight_decay"] == (0.01 if parameter.dim() >= 2 else 0.0)
        inner = parameter.dim() >= 2 and any(part.isdigit() for part in name.split("."))
        assert found[name]["orthogonal"] == inner, name


def test_the_first_and_last_of_a_plain_sequence_are_its_edges() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    assert [name for name, group in named(model).items() if group["orthogonal"]] == ["1.weight"]


def test_rates_fall_by_layer_and_by_kind() -> None:
    found = named(get_task("language").build(1), Rates(layer_decay=0.5, edge=0.2, vector=3.0))
    rates = {name: group["learning_rate"] for name, group in found.items()}
    assert rates["model.embed_tokens.weight"] == pytest.approx(0.1 * 0.5**3 * 0.2)
    assert rates["model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.1 * 0.5**2)
    assert rates["model.layers.1.input_layernorm.weight"] == pytest.approx(0.1 * 0.5 * 3)
    assert rates["model.norm.weight"] == pytest.approx(0.1 * 3)


def test_norms_are_those_of_each_block() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, bias=False))
    blocks = blocks_of(model)
    values = {tensor: tensor.detach() for tensor in model.parameters()}
    expected = [float(torch.cat([one.detach().flatten() for one in own]).norm()) for own in blocks.values()]
    assert block_norms(blocks, values) == pytest.approx(expected)
    assert block_norms(blocks, {}) == [0.0, 0.0]


@pytest.mark.parametrize("family", ["language", "vision"])
def test_layers_that_are_computed_again_give_the_same_gradients_and_keep_less(family: str) -> None:
    task, found = get_task(family), []
    for again in (False, True):
        model = task.build(1, seed=1).train()
        if family == "language":
            task.regularize(model, dropout=0.2, stochastic_depth=0.3, label_smoothing=0.0)
        layers = recompute_layers(model) if again else 0
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 200, (4, 48), generator=generator)
        images = {"image": torch.rand(4, 1, 8, 8, generator=generator), "label": torch.arange(4)}
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(_noted, kept), lambda one: one):
            torch.manual_seed(5)
            loss = task.loss(model, {"tokens": tokens} if family == "language" else images).sum()
        loss.backward()
        found.append((sum(kept), [parameter.grad for parameter in model.parameters()], layers))
    (much, plain, _), (little, same, layers) = found
    assert little < 0.7 * much and layers == (2 if family == "language" else 3)
    assert all(torch.equal(one, other) for one, other in zip(plain, same, strict=True))


def test_a_network_without_layers_has_nothing_to_compute_again() -> None:
    with pytest.raises(ConfigError, match="recompute: Linear has no numbered layers"):
        recompute_layers(nn.Linear(2, 2))
