"""Packed weights as something that trains: the same values before the first step, gradients of the stated surrogate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gulliver.compress.gptq import quantize_matrix
from gulliver.learning.latent import LatentTensor
from gulliver.runtime.formats import Format
from gulliver.runtime.packed import PackedTensor

ROWS = 24
CASES = ["c2g32", "c3g64", "c4g128", "c6g32", "u2g32", "u4g64", "u8g128", "u3g32"]


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(weight: Tensor, *names: str, gptq: bool = True) -> PackedTensor:
    """The weight in these formats, its rows dealt out in turn where there are several."""
    matrix = weight.flatten(1)
    x = sample(400, matrix.shape[1], seed=7) @ sample(matrix.shape[1], matrix.shape[1], seed=8)
    moment = x.T @ x / len(x)
    if len(names) == 1:
        part = quantize_matrix(matrix, Format.parse(names[0]), moment, gptq=gptq)
        return PackedTensor(tuple(weight.shape), [part])
    row_part = (torch.arange(len(matrix)) % len(names)).to(torch.uint8)
    parts = [
        quantize_matrix(matrix[row_part == index], Format.parse(name), moment, gptq=gptq)
        for index, name in enumerate(names)
    ]
    return PackedTensor(tuple(weight.shape), parts, row_part)


def check_same(weight: Tensor, tensor: PackedTensor) -> LatentTensor:
    latent = LatentTensor(tensor, weight)
    value = latent.value().detach()
    assert value.shape == weight.shape
    assert torch.equal(value, tensor.dequantize())
    return latent


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("columns", [128, 70])
def test_before_training_it_is_the_packed_weight(name: str, columns: int) -> None:
    weight = sample(ROWS, columns)
    tensor = packed(weight, name)
    latent = check_same(weight, tensor)
    # GPTQ chose other codes than the nearest, so the latent must have been moved
    assert not torch.equal(latent.parts[0].latent.detach(), weight)
    moved = (latent.parts[0].latent.detach() - weight).abs() > 0
    assert moved.float().mean() < 0.9  # and weights whose code is the nearest stay where the parent has them


def test_rows_of_several_formats_and_a_convolution() -> None:
    check_same(sample(30, 96), packed(sample(30, 96), "c3g32", "u4g64", "c6g128"))
    kernel = sample(20, 6, 3, 3)
    check_same(kernel, packed(kernel, "c4g32"))
    check_same(kernel, packed(kernel, "u4g32", "c2g32"))


def test_a_row_of_zeros_stays_nearly_nothing() -> None:
    weight = sample(ROWS, 64)
    weight[3] = 0
    latent = LatentTensor(packed(weight, "c4g64"), weight)
    assert latent.value()[3].abs().max() < 1e-6
    assert torch.isfinite(latent.value()).all()


@pytest.mark.parametrize("name", CASES)
def test_packing_again_gives_the_same(name: str) -> None:
    weight = sample(ROWS, 100)
    tensor = packed(weight, name)
    again = LatentTensor(tensor, weight).packed()
    assert again.shape == tensor.shape and again.parts[0].format == tensor.parts[0].format
    assert again.parts[0].codebook is tensor.parts[0].codebook and again.parts[0].zeros is tensor.parts[0].zeros
    assert torch.equal(again.dequantize(), tensor.dequantize())


def test_packing_again_keeps_the_rows_of_each_part() -> None:
    weight = sample(30, 64)
    tensor = packed(weight, "c3g32", "u4g64", "c6g32")
    again = LatentTensor(tensor, weight).packed()
    assert torch.equal(again.row_part, tensor.row_part)
    assert torch.equal(again.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("grown", [0.02, 0.5, -0.5])
def test_scales_that_moved_are_cut_into_8_bits_again_and_codes_stay_as_trained(grown: float) -> None:
    weight = sample(ROWS, 64)
    latent = LatentTensor(packed(weight, "c3g32"), weight)
    with torch.no_grad():
        latent.parts[0].change += grown
    value, again = latent.value().detach(), latent.packed()
    assert (again.dequantize() - value).abs().max() < 0.01 * value.abs().max()
    assert torch.equal(again.dequantize().sign(), value.sign())


def test_trained_values_are_what_is_packed() -> None:
    weight = sample(ROWS, 64)
    latent = LatentTensor(packed(weight, "c3g32"), weight)
    with torch.no_grad():
        for part in latent.parts:
            part.latent += 0.3 * sample(*part.latent.shape, seed=2)
            part.change += 0.05 * sample(*part.change.shape, seed=3)
    value = latent.value().detach()
    assert (latent.packed().dequantize() - value).norm() < 0.01 * value.norm()
    assert (value - weight).norm() > 0.2 * weight.norm()


# ---- gradients -------------------------------------------------------------------------------------------------------
def surrogate(latent: Tensor, scale: Tensor, latent_at: Tensor, scale_at: Tensor, value_at: Tensor) -> Tensor:
    """v(w, s) of the straight-through estimator at (w0, s0): rounding is taken as adding a constant in units of s.

    v = s · round(w / s) with round(t) = t + e and e = v0 / s0 - w0 / s0 held fixed, so dv/dw = 1 and dv/ds = e.
    """
    error = (value_at - latent_at) / scale_at
    return latent + scale * error


@pytest.mark.parametrize("name", ["c3g32", "u4g32", "c4g64"])
@pytest.mark.parametrize("columns", [64, 50])
def test_gradients_are_those_of_the_surrogate(name: str, columns: int) -> None:
    weight, fmt = sample(6, columns), Format.parse(name)
    latent = LatentTensor(packed(weight, name), weight)
    part, upstream = latent.parts[0], sample(6, columns, seed=5)
    value = latent.value()
    (value * upstream).sum().backward()
    assert torch.equal(part.latent.grad, upstream)
    assert part.change.grad.shape == part.scale.shape == (6, fmt.groups(columns))

    at, group = part.latent.detach().double(), torch.arange(columns) // fmt.group_size
    scale, value = part.scale.double(), value.detach().double()

    def loss(change: Tensor) -> Tensor:
        moved = (scale * change.exp())[:, group]
        return (surrogate(at, moved, at, scale[:, group], value) * upstream).sum()

    step = 1e-6
    terms = ((value - at) / scale[:, group] * upstream).abs()  # each is kept in bfloat16
    for row in range(6):
        for column in range(fmt.groups(columns)):
            change = torch.zeros_like(scale)
            change[row, column] = step
            expected = float((loss(change) - loss(-change)) / (2 * step))
            found = float(part.change.grad[row, column])
            rounding = 2.0**-8 * float(scale[row, column] * terms[row, group == column].sum())
            assert found == pytest.approx(expected, abs=rounding)
            assert rounding < 0.01 * float(scale[row, column]) * float(upstream.abs().sum())


def test_gradients_reach_every_part() -> None:
    weight = sample(30, 64)
    latent = LatentTensor(packed(weight, "c3g32", "u4g64"), weight)
    upstream = sample(30, 64, seed=4)
    (latent.value() * upstream).sum().backward()
    for index, part in enumerate(latent.parts):
        assert torch.equal(part.latent.grad, upstream[latent.row_part == index])
        assert part.change.grad.abs().sum() > 0


def test_a_descent_step_on_scales_lowers_the_error() -> None:
    weight = sample(ROWS, 128)
    latent = LatentTensor(packed(weight, "u2g32", gptq=False), weight)
    with torch.no_grad():
        for part in latent.parts:
            part.change += 0.3
    errors = []
    for _ in range(30):
        error = (latent.value() - weight).square().sum()
        errors.append(float(error.detach()))
        gradients = torch.autograd.grad(error, [part.change for part in latent.parts])
        with torch.no_grad():
            for part, gradient in zip(latent.parts, gradients, strict=True):
                part.change -= 0.01 * gradient.sign()
    assert errors[-1] < 0.9 * errors[0]


def test_spacing_is_the_mean_distance_between_the_values_a_weight_can_take() -> None:
    weight = sample(ROWS, 64)
    for name in ("c4g32", "u4g32"):
        latent = LatentTensor(packed(weight, name), weight).parts[0]
        grid = latent.scale[:, :, None] * (torch.arange(16.0) if latent.grid.sorted is None else latent.grid.sorted)
        assert abs(latent.spacing() / float(grid.diff().mean()) - 1) < 1e-4
