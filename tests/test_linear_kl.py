"""Divergence without logits: equals the plain formula, and so do its gradients."""

from __future__ import annotations

import pytest
import torch

from gulliver.nets import linear_kl as module
from gulliver.nets.linear_kl import linear_kl

ROWS, WIDTH, PARENT_WIDTH, VOCABULARY = 37, 12, 20, 101


def plain(hidden, weight, parent_hidden, parent_weight):
    target = torch.log_softmax(parent_hidden @ parent_weight.T, -1)
    ours = torch.log_softmax(hidden @ weight.T, -1)
    return (target.exp() * (target - ours)).sum(-1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "chunk_rows", lambda vocabulary: 8)


@pytest.fixture
def inputs():
    random = torch.Generator().manual_seed(0)
    shapes = ((ROWS, WIDTH), (VOCABULARY, WIDTH), (ROWS, PARENT_WIDTH), (VOCABULARY, PARENT_WIDTH))
    return [torch.randn(shape, generator=random) for shape in shapes]


@pytest.mark.parametrize("upstream", ["equal", "different"])
def test_values_and_gradients_equal_the_plain_formula(inputs, upstream):
    grad = torch.full((ROWS,), 0.3) if upstream == "equal" else torch.linspace(-1, 2, ROWS)
    found = []
    for function in (plain, lambda *tensors: linear_kl(*tensors, dtype=torch.float32)):
        hidden, weight = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
        losses = function(hidden, weight, *inputs[2:])
        losses.backward(grad)
        found.append((losses.detach(), hidden.grad, weight.grad))
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_head_may_be_made_from_a_learned_tensor(inputs):
    """As when distilling: the weight is a function of learned scales, not a leaf."""
    found = []
    for function in (plain, lambda *tensors: linear_kl(*tensors, dtype=torch.float32)):
        scale = torch.ones(VOCABULARY, 1, requires_grad=True)
        function(inputs[0], inputs[1] * scale, *inputs[2:]).mean().backward()
        found.append(scale.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_frozen_inputs_get_no_gradient_and_bfloat16_is_close(inputs):
    hidden = inputs[0].clone().requires_grad_()
    losses = linear_kl(hidden, *inputs[1:])
    losses.mean().backward()
    exact = inputs[0].clone().requires_grad_()
    reference = plain(exact, *inputs[1:])
    reference.mean().backward()
    assert losses.dtype == torch.float32 and hidden.grad.dtype == torch.float32
    torch.testing.assert_close(losses, reference, rtol=0.05, atol=0.05)
    assert torch.nn.functional.cosine_similarity(hidden.grad.flatten(), exact.grad.flatten(), 0) > 0.999
    with torch.no_grad():
        torch.testing.assert_close(linear_kl(*inputs), losses.detach())


def test_equal_models_do_not_diverge(inputs):
    hidden, weight = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_()
    losses = linear_kl(hidden, weight, inputs[0], inputs[1])
    losses.sum().backward()
    assert losses.abs().max() < 1e-6
    assert hidden.grad.abs().max() < 1e-6 and weight.grad.abs().max() < 1e-6


def test_different_vocabularies_are_refused(inputs):
    with pytest.raises(ValueError, match="different vocabularies"):
        linear_kl(inputs[0], inputs[1][:-1], *inputs[2:])


def test_a_chunk_of_logits_is_bounded():
    assert module.CHUNK_BYTES >= 4 * 49152 * 16
