"""The gradient of a step: Σ gradients / Σ trained positions, in however many parts; the hook that sees each part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_loop import each, simple
from torch import Tensor, nn

from gulliver.core.errors import DataError
from gulliver.learning.optim import OptimizerConfig

LENGTHS = (5, 2, 9, 1, 3, 3, 7, 4)
"""Positions of each example; the rest of its row is padding."""
WIDTH = 12
DATA = torch.randn(len(LENGTHS), WIDTH, 3, generator=torch.Generator().manual_seed(0))
RATE = OptimizerConfig("sgd", learning_rate=0.1)


def trained(parts: int, width: int = WIDTH, **dials: Any) -> tuple[Tensor, list[float]]:
    """Weights and losses after five steps on the ragged rows, in `parts` micro-batches padded to `width`."""
    weight = nn.Parameter(torch.linspace(-1, 1, 3))
    counts, rows = torch.tensor(LENGTHS), DATA.clone()
    rows[torch.arange(WIDTH) >= counts[:, None]] = 1e3  # what padding holds has no part in anything
    chunks = list(zip(rows[:, :width].chunk(parts), counts.chunk(parts), strict=True))

    def loss(index: int) -> tuple[Tensor, Tensor]:
        x, count = chunks[index % parts]
        real = torch.arange(x.shape[1]) < count[:, None]
        squares = torch.where(real, (x @ weight - 1.0).square(), 0.0)
        return squares.sum(1) / count, count

    result = simple([weight], loss, **{"steps": 5, "accumulate": parts, "optimizer": RATE} | dials)
    return weight.detach(), result.losses


@pytest.mark.parametrize(("parts", "width"), [(4, WIDTH), (8, WIDTH), (2, 9), (1, 9)])
def test_parts_and_padding_change_nothing(parts: int, width: int) -> None:
    (expected, losses), (found, ours) = trained(1), trained(parts, width)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert ours == pytest.approx(losses, abs=1e-6)
    squares = [
        (row[:count] @ torch.linspace(-1, 1, 3) - 1.0).square() for row, count in zip(DATA, LENGTHS, strict=True)
    ]
    assert losses[0] == pytest.approx(float(torch.cat(squares).mean()), abs=1e-6), (
        "a mean of all positions, not of means"
    )


def test_the_hook_sees_each_part_alone_and_what_it_changes_is_added() -> None:
    seen: list[tuple[int, Tensor]] = []

    def look(index: int, gradients: dict[Tensor, Tensor]) -> None:
        seen.append((index, *(gradient.clone() for gradient in gradients.values())))

    plain, watched = trained(4), trained(4, gradient_hook=look)
    torch.testing.assert_close(watched[0], plain[0], atol=1e-6, rtol=0)
    assert [index for index, _ in seen] == list(range(20))
    counts = torch.tensor(LENGTHS).chunk(4)
    weight = torch.linspace(-1, 1, 3).requires_grad_()
    for part in range(4):
        rows = [DATA[2 * part + at, : int(count)] for at, count in enumerate(counts[part])]
        total = sum(((row @ weight - 1.0).square().sum() for row in rows), torch.zeros(()))
        (expected,) = torch.autograd.grad(total, weight)
        torch.testing.assert_close(seen[part][1], expected, rtol=1e-5, atol=1e-5)

    def none_but_the_first(index: int, gradients: dict[Tensor, Tensor]) -> None:
        for gradient in gradients.values():
            gradient.mul_(float(index % 4 == 0))

    alone, _ = trained(4, steps=1, gradient_hook=none_but_the_first)
    expected = torch.linspace(-1, 1, 3) - 0.1 * seen[0][1] / sum(LENGTHS)
    torch.testing.assert_close(alone, expected)


def test_an_example_without_positions_counts_nothing_and_a_step_of_them_is_refused() -> None:
    weight = nn.Parameter(torch.ones(1))

    def loss(index: int) -> tuple[Tensor, Tensor]:
        values = torch.stack([weight.sum() * 2, weight.sum() * 100, torch.tensor(float("nan"))])
        return values, torch.tensor([3, 0, 0])

    result = simple([weight], loss)
    assert result.losses == [2.0] and weight.item() == pytest.approx(-1.0)
    with pytest.raises(DataError, match="no position is trained at step 0"):
        simple([weight], lambda index: (loss(index)[0], torch.zeros(3, dtype=torch.int64)))


def test_parts_of_narrow_weights_are_added_in_float32() -> None:
    """In bfloat16, 64 parts of 1 after one of 256 would be lost: 256 + 1 is 256 there."""
    weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    seen = []

    def loss(index: int) -> tuple[Tensor, Tensor]:
        return each((weight.sum().float() * (256.0 if index == 0 else 1.0))[None])

    simple([weight], loss, accumulate=65, optimizer=OptimizerConfig("sgd", learning_rate=1.0, momentum=0.0))
    seen.append(float(weight.detach().float().mean()))
    assert seen == [pytest.approx(-(256 + 64) / 65, rel=2**-8)]
