"""The step `plan`: the knapsack is solved exactly, its sizes are those of the packed model, and budgets are held."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from compress_samples import Lab, contents
from hypothesis import given, settings
from hypothesis import strategies as st

from gulliver.compress import plan as planning
from gulliver.compress.gptq import left_by_feedback, quantize_matrix
from gulliver.compress.knapsack import GAP, Item, solve
from gulliver.compress.plan import planned, row_classes
from gulliver.compress.statistics import Joint, Use, energies, likely_increase, loss_increase, open_statistics
from gulliver.compress.targets import menu
from gulliver.core.errors import ArtifactError, BudgetError
from gulliver.core.records import LossIncrease, Plan
from gulliver.core.store.artifact import Artifact, create
from gulliver.runtime.formats import CODEBOOK_BITS, GROUP_SIZES, PLANES, Format
from gulliver.runtime.packing import is_packed, weight_shapes
from gulliver.runtime.reference import read_stored

MENU = [Format(8, 64, "uniform"), Format(4, 64, "codebook"), Format(3, 128, "codebook"), Format(2, 32, "codebook")]


# ---- the knapsack ----------------------------------------------------------------------------------------------------
def random_items(random: np.random.Generator, count: int) -> list[Item]:
    """Items of very different sizes whose loss increases mostly, but not always, fall with bytes."""
    items = []
    for number in range(count):
        level = 10.0 ** random.uniform(-4, 2)
        cost = np.sort(random.uniform(0, 1, len(MENU)))
        if random.uniform() < 0.3:
            random.shuffle(cost)
        rows, columns = random.integers(1, 600, 2).tolist()
        items.append(Item(f"layer.{number}.weight", rows, columns, tuple((level * cost).tolist())))
    return items


def brute_force(items: list[Item], budget_bytes: int) -> float | None:
    """The least loss increase of all choices within the budget."""
    best = None
    for choice in itertools.product(range(len(MENU)), repeat=len(items)):
        if sum(item.bytes(MENU[index]) for item, index in zip(items, choice, strict=True)) <= budget_bytes:
            cost = sum(item.loss_increases[index] for item, index in zip(items, choice, strict=True))
            best = cost if best is None else min(best, cost)
    return best


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 5), share=st.floats(-0.1, 1.1))
def test_no_choice_within_the_budget_costs_less(seed: int, count: int, share: float) -> None:
    items = random_items(np.random.default_rng(seed), count)
    least = sum(min(item.bytes(fmt) for fmt in MENU) for item in items)
    most = sum(max(item.bytes(fmt) for fmt in MENU) for item in items)
    budget = int(least + share * (most - least))
    chosen, best = solve(items, MENU, budget), brute_force(items, budget)
    assert (chosen is None) == (best is None) == (budget < least)
    if chosen is None or best is None:
        return
    assert sum(item.bytes(MENU[index]) for item, index in zip(items, chosen, strict=True)) <= budget
    found = sum(item.loss_increases[index] for item, index in zip(items, chosen, strict=True))
    assert found <= best * (1 + GAP) + 1e-9


def test_the_smallest_formats_fit_a_budget_of_exactly_their_size() -> None:
    items = random_items(np.random.default_rng(3), 40)
    least = sum(min(item.bytes(fmt) for fmt in MENU) for item in items)
    chosen = solve(items, MENU, least)
    assert chosen is not None
    assert sum(item.bytes(MENU[index]) for item, index in zip(items, chosen, strict=True)) == least
    assert solve(items, MENU, least - 1) is None


@pytest.mark.parametrize("seed", range(4))
def test_the_budget_of_a_large_model_is_held_to_the_byte(seed: int) -> None:
    random = np.random.default_rng(seed)
    formats = menu("any", 2)
    items = []
    for number in range(200):
        cost = np.sort(random.uniform(0, 1, len(formats))) * 10.0 ** random.uniform(-4, 2)
        rows, columns = int(random.integers(1000, 200_000)), int(random.integers(1000, 9000))
        items.append(Item(f"layer.{number}.weight", rows, columns, tuple(cost.tolist())))
    least = sum(min(item.bytes(fmt) for fmt in formats) for item in items)
    budget = int(1.7 * least) + seed
    chosen = solve(items, formats, budget)
    assert chosen is not None
    assert sum(item.bytes(formats[index]) for item, index in zip(items, chosen, strict=True)) <= budget


# ---- the menu and the classes of rows --------------------------------------------------------------------------------
def test_the_menu_holds_what_its_kind_says() -> None:
    uniform = {Format(bits, size, "uniform") for bits in PLANES for size in GROUP_SIZES}
    codebook = {Format(bits, size, "codebook") for bits in CODEBOOK_BITS for size in GROUP_SIZES}
    assert set(menu("uniform", 2)) == uniform and set(menu("codebook", 2)) == codebook
    assert {fmt.bits for fmt in menu("codebook", 4)} == {4, 5, 6}
    assert {fmt.bits for fmt in menu("any", 2)} == set(PLANES)
    for kind in ("uniform", "codebook", "any"):
        sizes = [fmt.packed_bytes(64, 1024) for fmt in menu(kind, 2)]
        assert sizes == sorted(sizes, reverse=True)


def test_classes_of_rows_are_ordered_by_importance_and_hold_each_row_once() -> None:
    rows = 24_600
    counts = torch.rand(rows, generator=torch.Generator().manual_seed(0)) ** 8
    uses, matrix = [Use(torch.ones(32), counts)], torch.randn(rows, 32, generator=torch.Generator().manual_seed(1))
    classes = row_classes(uses, matrix)
    assert len(classes) == len(planning.CLASSES)
    assert len(row_classes([Use(torch.ones(32), counts[:1600])], matrix[:1600])) == 4  # a fifth, a third, two, all
    assert torch.cat(classes).sort().values.tolist() == list(range(rows))
    for before, after in itertools.pairwise(classes):
        assert counts[before].min() >= counts[after].max()
        assert len(before) % 16 == 0
    (alone,) = row_classes([Use(torch.eye(32), counts)], matrix)
    assert alone.tolist() == list(range(rows))


def test_what_gptq_leaves_is_told_from_rounding_to_nearest() -> None:
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(64, 64, generator=generator) / 8 + torch.eye(64) / 4
    x = torch.randn(4096, 64, generator=generator) @ mixed
    moment, weight = x.T @ x / len(x), torch.randn(2048, 64, generator=generator)
    uses, fmt = [Use(moment, torch.rand(2048, generator=generator))], Format(4, 64, "codebook")
    joint = Joint(moment, left_by_feedback(moment, 64))
    nearest, told = quantize_matrix(weight, fmt, moment, gptq=False), quantize_matrix(weight, fmt, moment)
    expected = likely_increase(weight, nearest, uses, energies(weight, uses), joint)
    delta = told.rows(0, len(weight)).dequantize() - weight
    real = 0.5 * float((uses[0].rows * torch.linalg.vecdot(delta @ moment, delta)).sum())
    assert real < 0.8 * likely_increase(weight, nearest, uses, energies(weight, uses))  # or there is nothing to tell
    assert expected == pytest.approx(real, rel=0.3)
    assert loss_increase(weight, told, uses) == pytest.approx(real, rel=0.05)  # from some of the rows
    assert loss_increase(weight[:512], told.rows(0, 512), [Use(moment, uses[0].rows[:512])]) == pytest.approx(
        0.5 * float((uses[0].rows[:512] * torch.linalg.vecdot(delta[:512] @ moment, delta[:512])).sum()), rel=1e-4
    )


# ---- the step --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def smallest(language: Lab) -> int:
    """The smallest size of which `plan` says that it is feasible."""
    with pytest.raises(BudgetError, match="bytes are too few") as refusal:
        language.plan(1)
    assert refusal.value.exit_code == 4 and refusal.value.nearest is not None
    return int(refusal.value.nearest["size_bytes"])


def test_the_nearest_feasible_size_is_feasible_and_no_smaller_one_is(language: Lab, smallest: int) -> None:
    made = language.plan(smallest)
    assert contents(made, Plan.file)["size_bytes"] == smallest
    assert language.quantize(plan=made).weight_bytes <= smallest
    with pytest.raises(BudgetError):
        language.plan(smallest - 1)


@pytest.mark.parametrize("more", [1.15, 1.6, 3.0])
def test_the_packed_model_is_as_large_as_planned_and_within_the_budget(
    language: Lab, smallest: int, more: float
) -> None:
    budget = int(more * smallest)
    made = language.plan(budget)
    told, packed = contents(made, Plan.file)["size_bytes"], language.quantize(plan=made)
    assert packed.weight_bytes <= told <= budget
    assert told - packed.weight_bytes <= 0.01 * told + 20_000
    assert made.inputs == {"model": (language.model.id,), "calibration": (language.calibration.id,)}
    assert (
        len({part["format"] for row in contents(made, Plan.file)["tensors"] for part in row["parts"]}) > 1 or more > 2
    )


def test_blocks_that_a_model_was_pulled_with_take_no_room_beside_the_plan(language: Lab, smallest: int) -> None:
    exported = language.step("export", {"format": "gguf", "type": "q8_0"}, model=language.model)
    pulled = language.step("pull", {"source": str(exported.file("model.gguf"))})
    assert is_packed(pulled.path) and weight_shapes(pulled.path) == weight_shapes(language.model.path)
    lab = Lab(language.store, pulled, language.dataset)
    with pytest.raises(BudgetError, match="bytes are too few") as refusal:
        lab.plan(1)
    assert refusal.value.nearest is not None
    least = int(refusal.value.nearest["size_bytes"])
    assert abs(least - smallest) < 0.02 * smallest, "as small as the plain model"
    assert 0.9 * least - 20_000 < lab.quantize(plan=lab.plan(least)).weight_bytes <= least
    fixed = planning.overhead_bytes(pulled, set())
    assert fixed >= pulled.weight_bytes - 4096, "what no plan has touched stays in its blocks"


def test_more_bytes_never_cost_more(language: Lab, smallest: int) -> None:
    bodies = [contents(language.plan(int(smallest * more)), Plan.file) for more in (1.0, 1.1, 1.3, 1.8, 2.5, 4.0)]
    costs = [body["loss_increase"] for body in bodies]
    assert all(after <= before * (1 + GAP) for before, after in itertools.pairwise(costs)), costs
    assert costs[-1] < costs[0] / 20
    frontier = bodies[0]["frontier"]
    assert frontier == bodies[-1]["frontier"]
    assert frontier[0]["size_bytes"] == smallest
    for before, after in itertools.pairwise(frontier):
        assert after["size_bytes"] >= before["size_bytes"]
        assert after["loss_increase"] <= before["loss_increase"] * (1 + GAP)


def test_the_plan_adds_up(language: Lab, smallest: int) -> None:
    body = contents(language.plan(int(1.5 * smallest)), Plan.file)
    parts = [part for row in body["tensors"] for part in row["parts"]]
    assert sum(part["loss_increase"] for part in parts) == pytest.approx(body["loss_increase"])
    assert sum(row["loss_increase"] for row in body["blocks"]) == pytest.approx(body["loss_increase"])
    assert {row["name"] for row in body["blocks"]} >= {"embed", "model.layers.0", "model.layers.1"}
    for row in body["tensors"]:
        assert sum(part["rows"] for part in row["parts"]) == row["shape"][0]
        assert sum(part["size_bytes"] for part in row["parts"]) == row["size_bytes"] < body["size_bytes"]
        for part in row["parts"]:
            assert 2 < part["bits_per_weight"] < 12
    assert {row["name"] for row in body["tensors"]} == set(
        open_statistics(language.calibration, language.model).weights
    )


def test_the_predicted_loss_increase_is_near_what_packing_does(language: Lab, smallest: int) -> None:
    made = language.plan(int(1.5 * smallest), gptq=True, probe_rows=32)
    done = sum(contents(language.quantize(plan=made), LossIncrease.file)["weights"].values())
    assert 0.4 < done / contents(made, Plan.file)["loss_increase"] < 2.5


def test_kinds_and_fewest_bits_are_held(language: Lab, smallest: int) -> None:
    def formats(**config: Any) -> set[Format]:
        body = contents(language.plan(3 * smallest, **config), Plan.file)
        return {Format.parse(part["format"]) for row in body["tensors"] for part in row["parts"]}

    assert {fmt.kind for fmt in formats(kind="uniform")} == {"uniform"}
    assert {fmt.kind for fmt in formats(kind="codebook")} == {"codebook"}
    assert min(fmt.bits for fmt in formats(min_bits=5)) >= 5


def test_rows_of_a_table_may_have_formats_of_their_own(
    language: Lab, smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "MIN_CLASS_ROWS", 8)
    monkeypatch.setattr(planning, "CLASSES", (1 / 8, 1 / 3, 1.0))
    for more in (1.2, 1.35, 1.5, 1.7, 2.0):
        made = language.plan(int(more * smallest), seed=1)
        body = contents(made, Plan.file)
        (table,) = (row for row in body["tensors"] if "embed" in row["name"])
        if len(table["parts"]) > 1:
            break
    assert len(table["parts"]) > 1
    packed = language.quantize(plan=made, seed=1)
    assert packed.weight_bytes <= body["size_bytes"] <= int(more * smallest)
    stored = dict(read_stored(packed.path))[table["name"]]
    found = [[part.shape[0], part.format.name] for part in stored.parts]
    assert found == [[part["rows"], part["format"]] for part in table["parts"]]
    importance = planning.importance(
        open_statistics(language.calibration, language.model).uses(table["name"]),
        torch.empty(table["shape"]),
    )
    assert importance[stored.row_part == 0].min() >= importance[stored.row_part == 1].max()


def test_another_family_is_planned_by_the_same_step(digits: Lab) -> None:
    with pytest.raises(BudgetError) as refusal:
        digits.plan(1)
    least = int(refusal.value.nearest["size_bytes"])
    for budget in (least, int(1.4 * least)):
        made = digits.plan(budget)
        packed = digits.quantize(plan=made)
        told = contents(made, Plan.file)["size_bytes"]
        assert packed.weight_bytes <= told <= budget
        assert told - packed.weight_bytes <= 0.01 * told + 20_000


# ---- plans that do not fit -------------------------------------------------------------------------------------------
def replaced(lab: Lab, made: Artifact, text: str) -> Artifact:
    """A plan with this text in place of its own."""
    with create(
        lab.store.artifacts_folder,
        kind="report",
        task=made.task,
        inputs=made.inputs,
        step={"name": "plan", "version": 1},
        config={},
    ) as writer:
        (writer.path / Plan.file).write_text(text, encoding="utf-8")
        return writer.commit()


def _broken(body: dict[str, Any]) -> dict[str, str]:
    first, *rest = body["tensors"]
    more = {**first, "parts": [{**first["parts"][0], "rows": first["parts"][0]["rows"] + 1}]}
    return {
        "no JSON": "{",
        "nested": "[" * 100_000,
        "a list": "[]",
        "no tensors": "{}",
        "tensors of text": json.dumps({**body, "tensors": "many"}),
        "an unknown format": json.dumps(
            {**body, "tensors": [{**first, "parts": [{"rows": 1, "format": "x9g1"}]}, *rest]}
        ),
        "a format that is no text": json.dumps(
            {**body, "tensors": [{**first, "parts": [{"rows": 1, "format": 4}]}, *rest]}
        ),
        "rows that are no number": json.dumps(
            {**body, "tensors": [{**first, "parts": [{"rows": [], "format": "u4g64"}]}]}
        ),
        "too many rows": json.dumps({**body, "tensors": [more, *rest]}),
        "no parts": json.dumps({**body, "tensors": [{**first, "parts": []}, *rest]}),
        "a weight too few": json.dumps({**body, "tensors": rest}),
        "a weight too many": json.dumps({**body, "tensors": [*body["tensors"], {**first, "name": "other.weight"}]}),
    }


def test_a_damaged_plan_is_refused(language: Lab, smallest: int) -> None:
    made = language.plan(2 * smallest)
    statistics = open_statistics(language.calibration, language.model)
    assert set(planned(made, statistics)) == set(statistics.weights)
    for what, text in _broken(contents(made, Plan.file)).items():
        with pytest.raises(ArtifactError, match="plan again"):
            planned(replaced(language, made, text), statistics)
            pytest.fail(what)
        with pytest.raises(ArtifactError, match="plan again"):
            language.quantize(plan=replaced(language, made, text))


def test_the_plan_of_another_model_is_refused(language: Lab, digits: Lab, smallest: int) -> None:
    statistics = open_statistics(digits.calibration, digits.model)
    with pytest.raises(ArtifactError, match="plan again"):
        planned(language.plan(2 * smallest), statistics)


def test_the_calibration_of_another_model_is_refused(language: Lab, digits: Lab) -> None:
    with pytest.raises(ArtifactError, match="run `gulliver calibrate` on this model"):
        language.step("plan", {"size_bytes": 10**6}, model=language.model, calibration=digits.calibration)
    with pytest.raises(ArtifactError, match=r"no file 'statistics.json'"):
        language.step("plan", {"size_bytes": 10**6}, model=language.model, calibration=language.plan(10**6))
