"""Outputs of causal networks in bfloat16 and in float32, of those too that mix types which do not go together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from language_samples import write_causal

from gulliver.nets import precision
from gulliver.runtime.network import load_network
from gulliver.tasks.language.network import logits_of
from gulliver.tasks.language.outputs import Outputs

BATCHES = torch.arange(48).remainder(250).view(2, 1, 24)


def sums_of_experts(mlp: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A layer that adds products to zeros of its input's type, as some mixtures of experts do."""
    plain = mlp.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return torch.zeros_like(rows).index_add_(0, torch.arange(len(rows)), plain(rows)).view(x.shape)

    return forward


def log_probabilities(outputs: Outputs) -> torch.Tensor:
    outputs.run_layers(lambda share: None)
    rows, positions = torch.zeros(24, dtype=torch.int64), torch.arange(24)
    with outputs.ready():
        return torch.stack([next(outputs.log_probabilities(number, rows, positions))[1] for number in range(2)])


@pytest.mark.parametrize("whole", [True, False])
def test_a_network_that_mixes_types_runs_in_float32_where_it_must(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    folder = write_causal(tmp_path / "model")
    network: Any = load_network(folder, empty=not whole)
    network.model.layers[1].mlp.forward = sums_of_experts(network.model.layers[1].mlp)
    with torch.no_grad():
        outputs = Outputs(network, list(BATCHES))
        assert len(outputs.blocks) > 2
        if whole:
            outputs.blocks = []
        found = log_probabilities(outputs)
    assert outputs.mixes_types
    with torch.no_grad():
        right = load_network(folder, empty=False)
        expected = torch.stack([torch.log_softmax(logits_of(right, batch), -1)[0] for batch in BATCHES])
    torch.testing.assert_close(found, expected[:, : found.shape[1]], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("has", [True, False])
def test_products_are_in_bfloat16_where_the_cpu_multiplies_it(
    has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: has)
    folder, seen = write_causal(tmp_path / "model"), set()
    network = load_network(folder, empty=True)
    with torch.no_grad():
        outputs = Outputs(network, list(BATCHES))
        for module in network.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
        found = log_probabilities(outputs)
        right = load_network(folder, empty=False)
        expected = torch.stack([torch.log_softmax(logits_of(right, batch), -1)[0] for batch in BATCHES])
    assert seen == {torch.bfloat16 if has else torch.float32} and not outputs.mixes_types
    close = {"rtol": 0.02, "atol": 0.02} if has else {}
    torch.testing.assert_close(found, expected[:, : found.shape[1]], **close)
