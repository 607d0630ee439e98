"""Weights of any shape in any product: what calibration sees of them, and that they come back packed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from language_samples import SMALL, write_causal, write_dataset
from toy_language import sentences

from gulliver.cli.session import Session, described
from gulliver.compress.collect import shares
from gulliver.compress.observe import Moments, output_gradients
from gulliver.compress.products import Product, Watch
from gulliver.compress.statistics import open_statistics
from gulliver.core.progress import Progress
from gulliver.core.records import Packing, PlainTensors, StatisticsTable
from gulliver.core.store.store import Store
from gulliver.pipeline.call import call
from gulliver.pipeline.resolve import resolve_model
from gulliver.runtime.packed import as_matrix, from_matrix
from gulliver.runtime.reference import read_tensors

X = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
STACKED = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))


def moments(weight: torch.Tensor, run: Any) -> tuple[Moments, dict[str, torch.Tensor]]:
    with Moments({"w": weight}, True) as found:
        found.begin(None)
        run(weight)
    return found, found.stored()


@pytest.mark.parametrize(
    ("shape", "run", "inputs"),
    [
        ((48, 32), lambda w: torch.nn.functional.linear(X, w), 1),
        ((32, 48), lambda w: X @ w, 0),
        ((32, 48), lambda w: torch.addmm(torch.zeros(48), X, w), 0),
        ((32, 48), lambda w: torch.baddbmm(torch.zeros(1, 5, 48), batch1=X[None], batch2=w[None]), 0),
        ((48, 32), lambda w: X @ w.T, 1),
        ((48, 32), lambda w: (w @ X.T).T, 1),
        ((48, 32), lambda w: torch.nn.functional.linear(X, w[16:]), 1),
        ((48, 32), lambda w: torch.einsum("ti,oi->to", X, w), 1),
    ],
)
def test_a_product_is_seen_however_it_is_written(shape: tuple[int, int], run: Any, inputs: int) -> None:
    weight = torch.randn(*shape)
    found, stored = moments(weight, run)
    assert found.inputs == {"w": {inputs}}
    torch.testing.assert_close(stored["moment:w"], X.T @ X / 5)
    matrix = as_matrix(weight, inputs)
    assert matrix.shape == (48, 32) and torch.equal(from_matrix(matrix, shape, inputs), weight)


@pytest.mark.parametrize(
    ("shape", "run", "inputs"),
    [
        ((3, 48, 32), lambda w: [torch.nn.functional.linear(STACKED[k], w[k]) for k in range(3)], 2),
        ((3, 32, 48), lambda w: torch.bmm(STACKED, w), 1),
        ((3, 32, 48), lambda w: torch.einsum("eti,eio->eto", STACKED, w), 1),
        ((3, 32, 48), lambda w: STACKED[:, None] @ w[:, None], 1),
        ((3, 48, 32), lambda w: w[:, None] @ STACKED[:, None].transpose(-1, -2), 2),
    ],
)
def test_each_matrix_of_a_stack_has_a_moment(shape: tuple[int, ...], run: Any, inputs: int) -> None:
    found, stored = moments(torch.randn(*shape), run)
    assert found.inputs == {"w": {inputs}}
    for k in range(3):
        torch.testing.assert_close(stored[f"moment:w@{k}"], STACKED[k].T @ STACKED[k] / 5)


def test_gradients_at_outputs_belong_to_the_rows_that_made_them() -> None:
    weight, part = torch.nn.Parameter(torch.randn(48, 32)), torch.randn(5, 32)
    holder = torch.nn.ParameterDict({"w": weight})
    with output_gradients(holder, {"w": weight}) as sums:
        (torch.nn.functional.linear(X, weight[16:]) * part).sum().backward()
    torch.testing.assert_close(sums["w"], torch.cat([torch.zeros(16), part.square().sum(0)]))


def test_what_is_cut_across_its_inputs_is_named() -> None:
    weight, seen = torch.randn(48, 64), list[Product]()
    watch = Watch({"w": weight}, lambda product, output: seen.append(product))
    with watch:
        torch.nn.functional.linear(X, weight[:, :32])
        torch.nn.functional.linear(X, torch.randn(4, 32))
    assert set(watch.odd) == {"w"} and not seen


def test_rows_that_are_weighed_and_summed_count_as_much_as_what_they_are_weighed_with() -> None:
    """Matrices below each other in one parameter, each multiplied along its rows: a stack of experts stored flat."""
    weight, part = torch.nn.Parameter(torch.randn(3 * 32, 48)), torch.randn(5, 48)

    def run(whole: torch.Tensor) -> torch.Tensor:
        stack = whole.view(3, 32, 48)
        return X @ stack[0] + (stack[2].T @ X.T).T + X[:1] @ stack[2]

    found, stored = moments(weight, run)
    assert found.inputs == {"w": {1}} and not found._watch.odd and not found.sums
    squares = [X.square().sum(0), torch.zeros(32), X.square().sum(0) + X[0].square()]
    torch.testing.assert_close(stored["energy:w"], torch.cat(squares) / 11)
    counted = shares(stored["energy:w"])
    torch.testing.assert_close(counted[32:64], counted[[*range(32), *range(64, 96)]].mean().expand(32))
    with output_gradients(torch.nn.ParameterDict({"w": weight}), {"w": weight}) as sums:
        (run(weight) * part).sum().backward()
    torch.testing.assert_close(sums["w@table"], 2 * part.square().sum(0) + part.sum(0).square())


# ---- whole models ---------------------------------------------------------------------------------------------------
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 257},
    "mixtral": SMALL | {"num_local_experts": 4, "hidden_size": 64, "num_experts_per_tok": 1},
    "gpt_oss": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "hidden_size": 64},
    "dbrx": {
        **{"vocab_size": 257, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
        **{"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
        **{"ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    },
    "mamba": {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


@pytest.mark.parametrize("kind", MODELS)
def test_networks_of_any_shape_are_packed_and_the_rest_is_named(kind: str, tmp_path: Path) -> None:
    folder, options = write_causal(tmp_path / kind), {key: v for key, v in MODELS[kind].items() if v is not None}
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **options)).save_pretrained(
        folder
    )
    store = Store(tmp_path / "store")
    model = resolve_model(folder, store)
    dataset = write_dataset(tmp_path / "data", sentences(40, 0), sentences(8, 1))
    small = {"examples": 4, "batch_size": 2, "gradient_examples": 2, "family": {"tokens": 16}}
    calibration = call("calibrate", small, {"model": model, "dataset": dataset}, store=store)
    packed = call("quantize", {"group_size": 32}, {"model": model, "calibration": calibration}, store=store)
    table, plain, packing = StatisticsTable.of(calibration), PlainTensors.of(packed), Packing.of(packed)
    assert set(table.weights) == set(packing.tensors) and not set(packing.tensors) & set(plain.tensors)
    values, stored = dict(read_tensors(model.path)), dict(read_tensors(packed.path))
    for name, row in packing.tensors.items():
        error = (stored[name] - values[name]).norm() / values[name].norm()
        assert tuple(stored[name].shape) == row.shape and error < 0.3, name
    assert all(row.reason for row in plain.tensors.values()) and plain.share < 0.35
    shown, _ = described(packed, Session(str(store.home), None, Progress(quiet=True), "gulliver quantize"), None)
    assert shown["plain"] == json.loads((packed.path / PlainTensors.file).read_text())
    if kind in ("mixtral", "gpt_oss"):
        stacks = [row for row in table.weights.values() if row.matrices == 4]
        assert len(stacks) == 4
        statistics = open_statistics(calibration, model)
        name = next(name for name, row in table.weights.items() if row.matrices == 4)
        assert not torch.equal(statistics.uses(name, 0)[0].moment, statistics.uses(name, 1)[0].moment)
        for told in table.unreached.values():
            assert re.search("of its 4 matrices", told)
    if kind == "gpt2":
        assert packing.tensors["transformer.h.0.mlp.c_fc.weight"].inputs == 0


def test_an_expert_that_no_text_reached_gets_the_mean_and_is_named(tmp_path: Path) -> None:
    lab_options = SMALL | {"num_local_experts": 16, "hidden_size": 64, "num_experts_per_tok": 1, "num_hidden_layers": 1}
    folder = write_causal(tmp_path / "moe")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("mixtral", **{k: v for k, v in lab_options.items() if v is not None})
    made = transformers.AutoModelForCausalLM.from_config(config)
    made.model.layers[0].mlp.gate.weight.data[3:] = 0  # experts from 3 on are never the best
    made.model.layers[0].mlp.gate.weight.data[:3] *= 50
    made.save_pretrained(folder)
    store = Store(tmp_path / "store")
    model, dataset = resolve_model(folder, store), write_dataset(tmp_path / "data", sentences(40, 0), sentences(8, 1))
    small = {"examples": 4, "batch_size": 2, "gradient_examples": 2, "family": {"tokens": 16}}
    calibration = call("calibrate", small, {"model": model, "dataset": dataset}, store=store)
    statistics = open_statistics(calibration, model)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert "matrices" in statistics.table.unreached[name]
    left = [k for k in range(16) if statistics.weights[name].uses[k][1] == f"moment:{name}@mean"]
    reached = [statistics.uses(name, k)[0].moment for k in range(16) if k not in left]
    assert left and reached
    torch.testing.assert_close(statistics.uses(name, left[0])[0].moment, torch.stack(reached).mean(0))
