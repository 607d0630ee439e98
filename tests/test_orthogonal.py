"""Muon: its update is orthogonal, as large as one of AdamW, and it learns what a matrix is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gulliver.core.errors import ConfigError
from gulliver.learning.optim import OptimizerConfig, build_optimizer
from gulliver.learning.orthogonal import matched_scale, orthogonalized


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (24, 24), (5, 16, 8), (1, 8)])
def test_the_update_is_orthogonal(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalized(matrix)
    small = found @ found.mT if shape[-2] <= shape[-1] else found.mT @ found
    torch.testing.assert_close(small, torch.eye(small.shape[-1]).expand_as(small), atol=1e-2, rtol=0)


def test_it_is_the_polar_factor() -> None:
    """The nearest orthogonal matrix, U VT of the singular value decomposition."""
    matrix = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(orthogonalized(matrix), u @ v, atol=2e-2, rtol=0)
    assert torch.equal(orthogonalized(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_an_update_is_as_large_as_one_of_adamw() -> None:
    matrix = torch.randn(96, 32, generator=torch.Generator().manual_seed(2))
    size = float((matched_scale(96, 32) * orthogonalized(matrix)).square().mean().sqrt())
    assert size == pytest.approx(0.2, rel=1e-2)


def test_one_step_is_the_one_in_the_docstring() -> None:
    gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    matrix, start = nn.Parameter(torch.ones(6, 4)), torch.ones(6, 4)
    config = OptimizerConfig("muon", learning_rate=0.1, weight_decay=0.5, momentum=0.9)
    updater = build_optimizer([{"params": [matrix], "orthogonal": True}], config)
    updater.step({matrix: gradient.clone()})
    ahead = gradient + 0.9 * gradient
    expected = start - 0.1 * (0.5 * start + matched_scale(6, 4) * orthogonalized(ahead))
    torch.testing.assert_close(matrix.detach(), expected)


def test_a_kernel_is_one_matrix_and_what_is_not_orthogonal_is_left_to_adamw() -> None:
    kernel, vector = nn.Parameter(torch.zeros(8, 2, 3, 3)), nn.Parameter(torch.zeros(3))
    groups = [{"params": [kernel], "orthogonal": True}, {"params": [vector]}]
    updater = build_optimizer(groups, OptimizerConfig("muon", learning_rate=1.0, momentum=0.95))
    assert [(group["rule"], group["momentum"]) for group in updater.param_groups] == [("muon", 0.95), ("adamw", 0.9)]
    generator = torch.Generator().manual_seed(4)
    gradients = {one: torch.randn(one.shape, generator=generator) for one in (kernel, vector)}
    signs = gradients[vector].sign()
    updater.step(gradients)
    flat = kernel.detach().flatten(1) / matched_scale(8, 18)
    torch.testing.assert_close(flat @ flat.T, torch.eye(8), atol=1e-2, rtol=0)
    torch.testing.assert_close(vector.detach(), -signs)
    with pytest.raises(ConfigError, match="a vector cannot be made orthogonal"):
        build_optimizer([{"params": [vector], "orthogonal": True}], OptimizerConfig("muon"))
