"""KL divergence between two language models' outputs without ever holding the logits.

With final hidden states h [n, d], head W [v, d] and those of the parent h', W', let z = W h and z' = W' h' and

    KL_i = sum_k p'_ik (log p'_ik - log p_ik),   p = softmax(z), p' = softmax(z')
    dKL_i / dz_i = p_i - p'_i,   dh_i = W^T (p_i - p'_i),   dW = sum_i g_i (p_i - p'_i) h_i^T

Rows are taken in chunks; the gradients are computed beside the loss, for an upstream gradient g of ones, so that the
backward pass is a multiplication. When g differs between rows, dW is computed again with the right g (rare: a mean
over rows has equal g). Products run in `dtype`, softmax in float32.
The fused idea: "Cut Your Losses in Large-Vocabulary Language Models" (2024, arXiv 2411.09009).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 48 * 2**20
"""Size of one float32 chunk of logits; about four such live at once."""


def linear_kl(
    hidden: Tensor, weight: Tensor, parent_hidden: Tensor, parent_weight: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """KL(parent || model) per row, float32 [n].

    `hidden` [n, d], `weight` [vocab, d], `parent_hidden` [n, e], `parent_weight` [vocab, e]. Differentiable in
    `hidden` and `weight` (a leaf or not); the parent's tensors get no gradient.
    """
    if weight.shape[0] != parent_weight.shape[0]:
        raise ValueError(f"the heads have {weight.shape[0]} and {parent_weight.shape[0]} rows: different vocabularies")
    assert hidden.shape[0] == parent_hidden.shape[0], (hidden.shape, parent_hidden.shape)
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearKL.apply(hidden, weight, parent_hidden.detach(), parent_weight.detach(), dtype)


def chunk_rows(vocabulary: int) -> int:
    """Rows of logits in one chunk."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, parent_hidden: Tensor, parent_weight: Tensor, dtype: torch.dtype
    ) -> Tensor:
        inputs = (hidden, weight, parent_hidden, parent_weight)
        wants = ctx.needs_input_grad
        losses, ctx.grad_hidden, ctx.grad_weight = _divergence(inputs, dtype, wants[0], wants[1], None)
        ctx.dtype = dtype
        ctx.save_for_backward(*inputs)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors[:2]
        grad_hidden, grad_weight = ctx.grad_hidden, ctx.grad_weight
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad[:, None]).to(hidden.dtype)
        if grad_weight is not None:
            if torch.equal(grad, grad[:1].expand_as(grad)):
                grad_weight = grad_weight * grad[0]
            else:
                _, _, grad_weight = _divergence(ctx.saved_tensors, ctx.dtype, False, True, grad)
            assert grad_weight is not None
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def _divergence(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    wants_hidden: bool,
    wants_weight: bool,
    row_grad: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses [n] and, where wanted, the float32 gradients of their sum weighted by `row_grad` (ones when None)."""
    hidden, weight, parent_hidden, parent_weight = (tensor.to(dtype) for tensor in inputs)
    n, vocabulary = hidden.shape[0], weight.shape[0]
    losses = torch.empty(n, dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if wants_hidden else None
    grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=hidden.device) if wants_weight else None
    rows = chunk_rows(vocabulary)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        parent_log = torch.log_softmax(parent_hidden[start:stop] @ parent_weight.T, -1, dtype=torch.float32)
        log = torch.log_softmax(hidden[start:stop] @ weight.T, -1, dtype=torch.float32)
        parent_p = parent_log.exp()
        losses[start:stop] = torch.linalg.vecdot(parent_p, parent_log.sub_(log))
        if grad_hidden is None and grad_weight is None:
            continue
        delta = log.exp_().sub_(parent_p)
        if row_grad is not None:
            delta *= row_grad[start:stop, None]
        delta = delta.to(dtype)
        if grad_hidden is not None:
            grad_hidden[start:stop] = delta @ weight
        if grad_weight is not None:
            grad_weight += delta.T @ hidden[start:stop]
    return losses, grad_hidden, grad_weight
