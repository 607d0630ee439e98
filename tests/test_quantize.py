"""The step `quantize`: each method beats the simple one by a margin, and a killed run makes the same model."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_samples import Lab, contents, divergence
from safetensors.torch import load_file
from torch import Tensor

from gulliver.compress.gptq import quantize_matrix
from gulliver.compress.quantize import narrow
from gulliver.compress.statistics import open_statistics
from gulliver.core.errors import BudgetError, ConfigError
from gulliver.core.records import Calibration, LossIncrease
from gulliver.core.store.artifact import Artifact, copy_artifact, verify
from gulliver.core.store.store import Store
from gulliver.nets.weights import read_safetensors
from gulliver.pipeline.steps import checked_config, find
from gulliver.runtime.formats import Format
from gulliver.runtime.grid import (
    Lookup,
    as_groups,
    fit_codebook_grid,
    fit_symmetric_grid,
    fit_uniform_grid,
    learn_codebook,
    midpoints,
    nearest,
)
from gulliver.runtime.packed import PackedTensor
from gulliver.runtime.packing import is_packed
from gulliver.runtime.reference import read_stored
from gulliver.tasks import get_task


def total(packed: Artifact) -> float:
    return sum(contents(packed, LossIncrease.file)["weights"].values())


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A weight whose columns and rows have different spreads, as trained ones do."""
    random = torch.Generator().manual_seed(seed)
    spread = (
        torch.randn(rows, 1, generator=random).mul(0.3).exp() * torch.randn(columns, generator=random).mul(0.2).exp()
    )
    return 0.02 * spread * torch.randn(rows, columns, generator=random)


def inputs_moment(columns: int, seed: int = 1) -> Tensor:
    """H of correlated inputs, a few of which are far larger than the others."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(1000, columns, generator=random) @ (
        torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=random)
    )
    x = x * torch.randn(columns, generator=random).mul(0.8).exp()
    return x.T @ x / len(x)


def cost(weight: Tensor, moment: Tensor, name: str, gptq: bool, sweeps: int = 0) -> float:
    delta = quantize_matrix(weight, Format.parse(name), moment, gptq=gptq, sweeps=sweeps).dequantize() - weight
    return float(((delta @ moment) * delta).sum())


# ---- margins over the simple method ----------------------------------------------------------------------------------
@pytest.mark.parametrize(("bits", "kind"), [(3, "codebook"), (4, "codebook"), (4, "uniform"), (2, "codebook")])
def test_gptq_beats_rounding_to_nearest_on_a_trained_model(language: Lab, bits: int, kind: str) -> None:
    options: dict[str, Any] = {"bits": bits, "kind": kind}
    passed_on, plain = language.quantize(**options), language.quantize(**options, method="rtn")
    assert total(plain) > 1.2 * total(passed_on)
    assert passed_on.weight_bytes == plain.weight_bytes


@pytest.mark.parametrize("name", ["c2g64", "c3g64", "c4g32", "u3g64", "u4g128"])
def test_gptq_beats_rounding_to_nearest_on_correlated_inputs(name: str) -> None:
    weight, moment = gaussian(96, 192), inputs_moment(192)
    assert cost(weight, moment, name, gptq=False) > 1.5 * cost(weight, moment, name, gptq=True)


@pytest.mark.parametrize("name", ["c2g64", "c4g32", "u3g64", "u8g128", "s4g64"])
@pytest.mark.parametrize("columns", [192, 200])
def test_each_sweep_over_the_codes_leaves_less(name: str, columns: int) -> None:
    """Also where the last group is not full, and where some inputs are always zero."""
    weight, moment = gaussian(96, columns), inputs_moment(columns)
    moment[:, 5] = moment[5, :] = 0
    chosen = [cost(weight, moment, name, gptq=True, sweeps=sweeps) for sweeps in (0, 1, 2, 4)]
    assert chosen[1] < 0.97 * chosen[0]
    assert chosen[3] < chosen[2] < chosen[1]


def test_a_sweep_without_what_it_needs_changes_nothing() -> None:
    """With the diagonal alone, or without passing errors on, the nearest codes are the best."""
    weight, moment = gaussian(32, 128), inputs_moment(128)
    for options in ({"moment": moment.diagonal()}, {"moment": moment, "gptq": False}, {"moment": None}):
        once, again = (quantize_matrix(weight, Format(4, 64, "codebook"), sweeps=n, **options) for n in (0, 3))
        assert torch.equal(once.dequantize(), again.dequantize())


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("gptq", [True, False])
def test_a_learned_codebook_beats_even_steps(bits: int, gptq: bool) -> None:
    weight, moment = gaussian(128, 256), inputs_moment(256)
    even = cost(weight, moment, f"u{bits}g64", gptq)
    assert even > 1.15 * cost(weight, moment, f"c{bits}g64", gptq)


def test_a_learned_codebook_beats_even_steps_on_a_trained_model(language: Lab) -> None:
    even, learned = (language.quantize(bits=3, kind=kind) for kind in ("uniform", "codebook"))
    assert total(even) > 1.1 * total(learned)


def weighted_error(groups: Tensor, importance: Tensor, approximation: Tensor) -> float:
    return float(((approximation - groups).square() * importance).sum())


def test_searched_codebook_scales_beat_the_largest_magnitude() -> None:
    groups = as_groups(gaussian(256, 256), Format(3, 64, "codebook")).flatten(0, 1)
    importance = torch.randn(1, 64, generator=torch.Generator().manual_seed(2)).exp()
    codebook = learn_codebook(groups, importance, 8).float()

    def error(scales: Tensor) -> float:
        codes = nearest(groups / scales[:, None], midpoints(codebook))
        return weighted_error(groups, importance, codebook[codes] * scales[:, None])

    widest = groups.abs().amax(1) / codebook.abs().max()
    assert error(widest) > 1.25 * error(fit_codebook_grid(groups, importance, Lookup(codebook)).scales)


def test_a_table_finds_what_a_search_finds() -> None:
    """Exactly, for codebooks of integers: at borders, beyond both ends, and between."""
    generator = torch.Generator().manual_seed(0)
    for levels in (4, 8, 16, 64):
        codebook = torch.randperm(255, generator=generator)[:levels].sub(127).sort().values.to(torch.int8)
        borders, lookup = midpoints(codebook), Lookup(codebook)
        values = torch.cat([150 * torch.randn(4096, generator=generator), borders, torch.arange(-300.0, 300.0)])
        wanted = nearest(values, borders)
        assert torch.equal(lookup.codes[lookup.places(values)].int(), wanted)
        assert torch.equal(lookup.entries[lookup.places(values)], codebook.float()[wanted])


def test_searched_uniform_ranges_beat_the_full_range() -> None:
    groups = as_groups(gaussian(256, 256), Format(3, 64, "uniform")).flatten(0, 1)
    importance = torch.randn(1, 64, generator=torch.Generator().manual_seed(2)).exp()

    def error(scales: Tensor, zeros: Tensor) -> float:
        codes = torch.round(groups / scales[:, None] + zeros[:, None]).clamp_(0, 7)
        return weighted_error(groups, importance, (codes - zeros[:, None]) * scales[:, None])

    low, high = groups.amin(1), groups.amax(1)
    scales = (high - low) / 7
    grid = fit_uniform_grid(groups, importance, 8)
    assert grid.zeros is not None
    assert error(scales, torch.round(-low / scales)) > 1.2 * error(grid.scales, grid.zeros)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_symmetric_scales_are_nearly_the_best_of_all_that_are_allowed(bits: int) -> None:
    fmt = Format(bits, 32, "symmetric")
    groups = as_groups(gaussian(16, 256), fmt).flatten(0, 1)
    importance = torch.randn(1, 32, generator=torch.Generator().manual_seed(4)).exp()
    factors = torch.full((len(groups),), 2.0**-8)
    middle = fmt.levels // 2

    def errors(scales: Tensor) -> Tensor:
        levels = torch.round(groups / scales[:, None]).clamp_(-middle, middle - 1)
        return ((levels * scales[:, None] - groups) ** 2 * importance).sum(1)

    grid = fit_symmetric_grid(groups, importance, fmt, factors)
    multiples = grid.scales / factors
    assert torch.equal(multiples, multiples.round()) and multiples.min() >= 1 and multiples.max() <= fmt.top_scale
    assert grid.zeros is not None and set(grid.zeros.tolist()) == {middle}
    allowed = [errors(torch.full((len(groups),), number * 2.0**-8)) for number in range(1, fmt.top_scale + 1)]
    best = torch.stack(allowed).amin(0)
    assert errors(grid.scales).sum() < 1.1 * best.sum()


def test_importance_changes_what_is_fitted_well() -> None:
    weight = gaussian(128, 128)
    skewed = torch.randn(128, generator=torch.Generator().manual_seed(3)).mul(1.5).exp()
    name = "c3g32"
    plain = quantize_matrix(weight, Format.parse(name), None).dequantize()
    fitted = quantize_matrix(weight, Format.parse(name), skewed).dequantize()
    assert weighted_error(weight, skewed, plain) > 1.1 * weighted_error(weight, skewed, fitted)
    assert weighted_error(weight, torch.ones(128), plain) < weighted_error(weight, torch.ones(128), fitted)


@pytest.mark.parametrize("gptq", [True, False])
def test_more_bits_and_smaller_groups_cost_less(gptq: bool) -> None:
    weight, moment = gaussian(64, 128), inputs_moment(128)
    bits = ("c2g64", "c3g64", "c4g64", "c5g64", "c6g64", "u8g64")
    costs = [cost(weight, moment, name, gptq) for name in bits]
    assert all(before > 1.5 * after for before, after in itertools.pairwise(costs)), costs
    assert cost(weight, moment, "c3g128", gptq) > cost(weight, moment, "c3g32", gptq)
    assert cost(weight, moment, "u8g64", gptq) < 1e-3 * float(((weight @ moment) * weight).sum())


def test_inputs_that_were_never_seen_do_no_harm() -> None:
    weight, moment = gaussian(32, 96), inputs_moment(96)
    moment[10:60] = 0
    moment[:, 10:60] = 0
    part = quantize_matrix(weight, Format(4, 32, "codebook"), moment)
    assert torch.isfinite(part.dequantize()).all()
    assert (part.dequantize() - weight)[:, 10:60].square().mean() < 0.2 * weight[:, 10:60].square().mean()
    nothing = quantize_matrix(weight, Format(4, 32, "codebook"), torch.zeros(96, 96))
    assert (nothing.dequantize() - weight).norm() < 0.2 * weight.norm()


# ---- the packed model ------------------------------------------------------------------------------------------------
def test_the_loss_increase_is_that_of_the_stored_values(language: Lab) -> None:
    packed, statistics = language.quantize(bits=3), open_statistics(language.calibration, language.model)
    stored, told = dict(read_stored(packed.path)), contents(packed, LossIncrease.file)["weights"]
    plain = dict(read_safetensors(language.model.path, torch.float32))
    assert set(told) == set(statistics.weights)
    for name, expected in told.items():
        approximation = stored[name].dequantize()
        delta = (approximation - plain[name]).double()
        slow = 0.0
        for use in statistics.uses(name):
            full = use.moment.double() if use.moment.dim() == 2 else use.moment.double().diag()
            slow += sum(0.5 * float(row) * float(d @ full @ d) for row, d in zip(use.rows, delta, strict=True))
        assert expected == pytest.approx(slow, rel=1e-3)


@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"bits": 4, "kind": "uniform", "group_size": 32}, {"bits": 8, "kind": "uniform"}]
)
def test_one_format_for_all_and_the_rest_in_16_bits(language: Lab, options: dict[str, Any]) -> None:
    packed = language.quantize(**options)
    fmt = Format(options["bits"], options.get("group_size", 64), options.get("kind", "codebook"))
    weights = set(open_statistics(language.calibration, language.model).weights)
    plain = dict(read_safetensors(language.model.path, torch.float32))
    network, kept = get_task("language").load(packed.path), 0
    for name, tensor in read_stored(packed.path):
        if isinstance(tensor, PackedTensor):
            assert [part.format for part in tensor.parts] == [fmt] and name in weights
            assert torch.equal(network.get_parameter(name), tensor.dequantize())
        else:
            assert tensor.dtype == torch.float16 and name not in weights
            assert torch.equal(tensor, plain[name].to(torch.float16))
            kept += 1
    assert kept and is_packed(packed.path)
    verify(packed)
    assert contents(packed, Calibration.file) == contents(language.calibration, Calibration.file)
    assert {"config.json", "tokenizer.json"} <= set(packed.files)
    assert packed.inputs == {"model": (language.model.id,), "calibration": (language.calibration.id,)}
    assert packed.weight_bytes < language.model.weight_bytes * (options["bits"] + 1.5) / 32


def test_the_more_bits_the_nearer_to_the_parent(language: Lab) -> None:
    far = [divergence(language, language.quantize(bits=bits, kind="uniform")) for bits in (2, 3, 4, 8)]
    assert far == sorted(far, reverse=True)
    assert far[-1] < 0.01 * far[0]


def test_values_beyond_float16_stay_wide() -> None:
    assert narrow(torch.tensor([1.0, 70_000.0])).dtype == torch.float32
    assert narrow(torch.tensor([1.0, float("nan")])).dtype == torch.float32
    assert narrow(torch.tensor([1.0, 60_000.0])).dtype == torch.float16
    assert narrow(torch.tensor([1], dtype=torch.int64)).dtype == torch.int64
    assert narrow(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_convolutions_are_packed(digits: Lab) -> None:
    packed = digits.quantize(bits=4, group_size=32)
    stored = dict(read_stored(packed.path))
    convolutions = [
        name for name, tensor in stored.items() if isinstance(tensor, PackedTensor) and len(tensor.shape) == 4
    ]
    network = get_task("vision").load(packed.path)
    plain = load_file(digits.model.path / "model.safetensors")
    assert convolutions
    for name in convolutions:
        assert torch.equal(network.get_parameter(name), stored[name].dequantize())
        assert (stored[name].dequantize() - plain[name]).norm() < 0.2 * plain[name].norm()
    vectors = {name for name, tensor in stored.items() if not isinstance(tensor, PackedTensor)}
    assert vectors and all(torch.equal(stored[name], plain[name].to(torch.float16)) for name in vectors)
    assert total(digits.quantize(bits=3, method="rtn")) > 1.1 * total(digits.quantize(bits=3))
    assert divergence(digits, packed) < 0.5 * divergence(digits, digits.quantize(bits=2, group_size=32))


def test_diagonal_statistics_round_to_nearest(language: Lab) -> None:
    config = {"examples": 8, "moments": "diagonal", **language.dials}
    diagonal = language.step("calibrate", config, model=language.model, dataset=language.dataset)
    made = [
        language.step("quantize", {"bits": 3, "method": method}, model=language.model, calibration=diagonal)
        for method in ("gptq", "rtn")
    ]
    one, other = (dict(read_stored(packed.path)) for packed in made)
    assert all(
        torch.equal(one[name].dequantize(), other[name].dequantize())
        for name in contents(made[0], LossIncrease.file)["weights"]
    )


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_a_packed_model_is_not_packed_again(language: Lab) -> None:
    with pytest.raises(ConfigError, match="packed already"):
        language.step("quantize", {}, model=language.quantize(bits=3), calibration=language.calibration)


WRONG = [({"bits": 7}, "choose one of"), ({"group_size": 48}, "choose one of"), ({"bits": 8}, "use uniform")]


@pytest.mark.parametrize(("options", "word"), WRONG)
def test_formats_that_do_not_exist(language: Lab, options: dict[str, int], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        language.quantize(**options)


def test_a_memory_limit_is_enforced(language: Lab) -> None:
    with pytest.raises(BudgetError, match="limit is 2 MB"):
        language.quantize(bits=5, max_ram_bytes=2_000_000)


# ---- runs that stop --------------------------------------------------------------------------------------------------
def start(store: Store, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gulliver", *words, "--home", str(store.home), "--json", "--quiet"]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, env=os.environ
    )


def test_a_killed_run_goes_on_and_makes_the_same_model(language: Lab, tmp_path: Path) -> None:
    expected = language.quantize(bits=3, kind="uniform", group_size=32)
    store = Store(tmp_path / "home")
    for artifact in (language.model, language.calibration):
        copy_artifact(artifact, store.artifacts_folder / artifact.id)
    words = ["quantize", language.model.id, "--calibration", language.calibration.id]
    words += ["--bits", "3", "--kind", "uniform", "--group-size", "32"]
    moments, seen = random.Random(5), 0
    for _ in range(3):
        process = start(store, *words)
        while process.poll() is None and len(list((store.home / "work").glob("*/weight-*"))) <= seen:
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.05))
        with contextlib.suppress(ProcessLookupError):  # it may just have finished
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        seen = len(list((store.home / "work").glob("*/weight-*.safetensors")))
    done = {path: path.stat().st_mtime_ns for path in (store.home / "work").glob("*/weight-*.safetensors")}
    weights = len(contents(expected, LossIncrease.file)["weights"])
    assert 0 < len(done) <= weights or store.has(expected.id)
    out, err = start(store, *words).communicate(timeout=120)
    assert json.loads(out)["id"] == expected.id, err
    verify(store.get(expected.id))
    assert not list((store.home / "work").glob("*/weight-*"))


def test_what_a_call_left_that_was_killed_once_recorded_goes_with_the_next(
    language: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []
    monkeypatch.setattr(Store, "clear_work", lambda store, key: keys.append(key))  # as if it was killed before
    made = language.quantize(bits=3, seed=77)
    left = language.store.home / "work" / keys[-1]
    assert list(left.glob("weight-*"))
    monkeypatch.undo()
    assert language.quantize(bits=3, seed=77).id == made.id
    assert not left.exists()


def test_finished_weights_are_not_packed_again(language: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from gulliver.compress import quantize

    packed: list[int] = []
    real = quantize.quantize_matrix

    def counted(weight: Tensor, *rest: Any, **options: Any) -> Any:
        if len(packed) == 5:
            packed.append(0)
            raise KeyboardInterrupt
        packed.append(weight.numel())
        return real(weight, *rest, **options)

    monkeypatch.setattr(quantize, "quantize_matrix", counted)
    options: dict[str, Any] = {"bits": 6, "group_size": 128}
    with pytest.raises(KeyboardInterrupt):
        language.quantize(**options)
    made = language.quantize(**options)
    assert len(packed) == len(contents(made, LossIncrease.file)["weights"]) + 1


@pytest.mark.parametrize(
    ("step", "options", "told"),
    [
        ("quantize", {"method": "feedback"}, "'gptq' or 'rtn'"),
        ("quantize", {"method": "nearest"}, "'gptq' or 'rtn'"),
        ("plan", {"size_bytes": 1000, "feedback": False}, "gptq"),
    ],
)
def test_former_names_of_options_are_refused_with_the_new_ones(step: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        checked_config(find(step), options)
