"""The step `calibrate`: its statistics are what plain hooks on the whole network see, and a killed run goes on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compress_samples import TOKENS, Lab, contents
from language_samples import write_dataset, write_encoder
from torch import Tensor, nn

from gulliver.compress import calibrate
from gulliver.compress.collect import elsewhere, frequencies
from gulliver.compress.options import CalibrateOptions
from gulliver.compress.statistics import ROWS, Statistics, open_statistics
from gulliver.core.errors import BudgetError, ConfigError, DataError
from gulliver.core.progress import Progress
from gulliver.core.records import Calibration
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.store import Store
from gulliver.nets.precision import has_bfloat16, products_in
from gulliver.pipeline.call import call
from gulliver.tasks import get_task

BFLOAT16 = 0.03
"""Calibration runs the network in bfloat16, the oracle in float32: most relative difference of a whole matrix."""
FEW = {"examples": 8, "batch_size": 4, "tokens": 32, "gradient_examples": 8}


def far(found: Tensor, expected: Tensor) -> float:
    """Relative difference of two tensors."""
    return float((found - expected).norm() / expected.norm())


def opened(lab: Lab, **config: Any) -> Statistics:
    made = lab.step("calibrate", FEW | config, model=lab.model, dataset=lab.dataset)
    return open_statistics(made, lab.model)


def batches_of(lab: Lab, count: int = 2, size: int = 4, **dials: Any) -> list[dict[str, Tensor]]:
    """The batches that calibration with FEW sees."""
    task = get_task(lab.model.task)
    stream = task.batches(lab.dataset, "train", size, 0, 0, folder=lab.model.path, options=task.chosen(dials))
    return [next(stream) for _ in range(count)]


def inputs_of(network: nn.Module, run: Any, kinds: tuple[type[nn.Module], ...]) -> dict[str, list[Tensor]]:
    """Weight name -> what the module got, call by call, while `run()` runs the whole network in float32."""
    found: dict[str, list[Tensor]] = {}
    for name, module in network.named_modules():
        if isinstance(module, kinds):
            module.register_forward_pre_hook(
                lambda module, args, name=name: found.setdefault(f"{name}.weight", []).append(args[0])
            )
    with torch.no_grad():
        run()
    return found


@pytest.fixture(scope="module")
def seen(language: Lab) -> dict[str, list[Tensor]]:
    network = get_task("language").load(language.model.path)
    batches = batches_of(language, tokens=32)
    return inputs_of(
        network, lambda: [network(input_ids=batch["tokens"]) for batch in batches], (nn.Linear, nn.Embedding)
    )


def test_moments_are_the_mean_of_x_xt_over_the_whole_network(language: Lab, seen: dict[str, list[Tensor]]) -> None:
    statistics = opened(language)
    checked = 0
    for name, calls in seen.items():
        if name not in statistics.weights or not calls[0].is_floating_point():
            continue
        x = torch.cat(calls).flatten(0, -2)
        assert len(x) == 8 * 32
        (view,) = statistics.uses(name)
        assert far(view.moment, x.T @ x / len(x)) < BFLOAT16, name
        checked += 1
    assert checked == 2 * 7


def test_modules_that_read_the_same_tensor_share_one_stored_moment(language: Lab) -> None:
    statistics = opened(language)
    layer = "model.layers.0"
    uses = {name: row.uses[0][:2] for name, row in statistics.weights.items()}
    attention = {uses[f"{layer}.self_attn.{part}_proj.weight"] for part in "qkv"}
    gated = {uses[f"{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up")}
    others = {uses[f"{layer}.self_attn.o_proj.weight"], uses[f"{layer}.mlp.down_proj.weight"]}
    assert len(attention) == len(gated) == 1 and len(attention | gated | others) == 4
    rows = {row.uses[0][2] for row in statistics.weights.values()}
    assert len(rows) == len(statistics.weights)  # how much outputs matter is each module's own


def test_a_tied_embedding_has_a_view_for_each_use(language: Lab, seen: dict[str, list[Tensor]]) -> None:
    statistics = opened(language)
    (table,) = (name for name in statistics.weights if "embed" in name)
    looked_up, head = statistics.uses(table)
    assert looked_up.moment.dim() == 1 and head.moment.dim() == 2
    x = torch.cat(seen["lm_head.weight"]).flatten(0, -2)
    assert far(head.moment, x.T @ x / len(x)) < BFLOAT16
    counts = torch.bincount(torch.cat(seen[table]).flatten(), minlength=len(looked_up.rows)).float()
    likely = likelihoods(language, batches_of(language, tokens=32))
    assert far(looked_up.rows, elsewhere((counts + likely.sum(0)) / (2 * counts.sum()))) < BFLOAT16
    assert float(looked_up.rows.sum()) == pytest.approx(1)


def test_outputs_of_the_head_count_by_the_squared_gradients_that_are_expected(language: Lab) -> None:
    statistics = opened(language, sensitivity="gradient")
    (table,) = (name for name in statistics.weights if "embed" in name)
    head = statistics.uses(table)[1].rows
    likely = likelihoods(language, batches_of(language, tokens=32))
    expected = (likely * (1 - likely)).mean(0)
    assert far(head / head.sum(), elsewhere(expected / expected.sum())) < BFLOAT16
    assert float(head.sum()) == pytest.approx(float(expected.sum()), rel=0.3)  # those of the tokens that did come


def test_a_part_of_what_rows_matter_is_set_aside_for_other_data() -> None:
    found = elsewhere(torch.tensor([0.64, 0.36, 0.0, 0.0]))
    assert found.sum() == pytest.approx(1)
    assert found.tolist() == pytest.approx([0.7 * 0.64 + 0.3 * 8 / 14, 0.7 * 0.36 + 0.3 * 6 / 14, 0, 0])
    assert torch.equal(elsewhere(torch.zeros(3)), torch.zeros(3))


def likelihoods(lab: Lab, batches: list[dict[str, Tensor]]) -> Tensor:
    """Of every token, how likely it comes next, at each position of the batches: [positions, vocabulary]."""
    network = get_task("language").load(lab.model.path)
    with torch.no_grad():
        return torch.cat([network(input_ids=batch["tokens"]).logits.softmax(-1).flatten(0, 1) for batch in batches])


def test_rows_of_a_table_that_were_not_seen_share_what_those_seen_once_made_up() -> None:
    found = frequencies(torch.tensor([6.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    assert torch.allclose(found, torch.tensor([0.48, 0.16, 0.08, 0.08, 0.05, 0.05, 0.05, 0.05]))
    assert torch.equal(frequencies(torch.tensor([3.0, 1.0])), torch.tensor([0.75, 0.25]))
    assert torch.allclose(frequencies(torch.tensor([3.0, 0.0])), torch.tensor([2 / 3, 1 / 3]))
    assert torch.allclose(frequencies(torch.tensor([1.0, 0.0])), torch.tensor([0.5, 0.5]))  # at most half


def test_diagonal_moments_are_the_diagonal_of_the_full_ones(language: Lab) -> None:
    full, diagonal = opened(language), opened(language, moments="diagonal")
    for name in full.weights:
        for one, other in zip(full.uses(name), diagonal.uses(name), strict=True):
            assert other.moment.dim() == 1
            assert far(other.moment, one.moment.diagonal() if one.moment.dim() == 2 else one.moment) < 1 / 256
    sizes = [statistics.artifact.weight_bytes for statistics in (full, diagonal)]
    assert sizes[1] < sizes[0] / 4


def test_the_output_gradient_is_that_of_the_loss(language: Lab) -> None:
    statistics = opened(language, sensitivity="gradient")
    assert statistics.table.sensitivity == "gradient"
    network = get_task("language").load(language.model.path)
    name = "model.layers.1.mlp.up_proj"
    found: list[Tensor] = []
    network.get_submodule(name).register_forward_hook(
        lambda module, args, output: output.register_hook(found.append) and None
    )
    for batch in batches_of(language, tokens=32):
        for row in batch["tokens"]:
            network(input_ids=row[None], labels=row[None]).loss.backward()
    assert len(found) == 8
    expected = 31 * torch.stack([grad.square().sum((0, 1)) for grad in found]).mean(0)  # for each of 31 positions
    assert far(statistics.uses(f"{name}.weight")[0].rows, expected) < 0.1
    assert far(opened(language, sensitivity="power").uses(f"{name}.weight")[0].rows, expected) > 0.5


def test_power_weighs_outputs_by_the_inverse_of_their_power(language: Lab, seen: dict[str, list[Tensor]]) -> None:
    statistics = opened(language, sensitivity="power")
    assert statistics.table.sensitivity == "power"
    network = get_task("language").load(language.model.path)
    expected = {}
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        rows = statistics.uses(name)[0].rows
        assert (rows == rows[0]).all()
        output = torch.cat(seen[name]) @ network.get_parameter(name).detach().T
        expected[name] = float(rows[0] * len(rows) * output.square().mean())
    first, second = expected.values()
    assert first == pytest.approx(second, rel=BFLOAT16)


def test_without_memory_for_a_backward_pass_outputs_count_by_power(language: Lab) -> None:
    for limit, chosen in ((1_000_000_000, "power"), (2_000_000_000, "gradient"), (None, "gradient")):
        options = CalibrateOptions(max_ram_bytes=limit).resolved({"model": language.model})
        assert options.sensitivity == chosen
    inputs = {"model": language.model, "dataset": language.dataset}
    made = language.step("calibrate", FEW | {"sensitivity": "power"}, **inputs)
    assert open_statistics(made, language.model).table.sensitivity == "power"


def test_gradients_block_by_block_are_those_of_the_whole_network(language: Lab) -> None:
    """Every watched output: squared gradients, from blocks in reverse, against one backward pass."""
    statistics = opened(language, sensitivity="gradient")
    task = get_task("language")
    network = task.load(language.model.path)
    sums: dict[str, Tensor] = {}

    def add(name: str, grad: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + grad.float().square().sum((0, 1))

    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            seen = partial(add, f"{name}.weight")
            module.register_forward_hook(lambda module, args, output, seen=seen: output.register_hook(seen) and None)
    for batch in batches_of(language, tokens=32):
        with products_in(has_bfloat16()):
            task.loss(network, batch).sum().backward()
    checked = 0
    for name, total in sums.items():
        if name in statistics.weights:
            assert far(statistics.uses(name)[0].rows, 31 * total / 8) < BFLOAT16, name
            checked += 1
    assert checked == 2 * 7


def test_padding_does_not_count(store: Store, quiet: Progress, tmp_path: Path) -> None:
    texts = ["the queen mends the old map.", "the giant counts every lantern of the harbour."] * 2
    texts += ["a child finds the rope.", "a sailor forgets every island."] * 2
    dataset = write_dataset(store.artifacts_folder, texts, ["the queen."])
    shared: dict[str, Any] = {"store": store, "progress": quiet}
    model = call("pull", {"source": str(write_encoder(tmp_path / "encoder"))}, {}, **shared)
    made = call("calibrate", FEW | {"tokens": 60}, {"model": model, "dataset": dataset}, **shared)
    statistics, task = open_statistics(made, model), get_task("encoder")
    network = task.load(model.path)
    batches = batches_of(Lab(store, model, dataset), tokens=60)
    kept = [batch["mask"].bool() for batch in batches]
    assert not all(mask.all() for mask in kept)
    calls = inputs_of(
        network,
        lambda: [network(input_ids=batch["tokens"], attention_mask=batch["mask"]) for batch in batches],
        (nn.Linear, nn.Embedding),
    )
    name = next(name for name in statistics.weights if name.endswith("layer.1.output.dense.weight"))
    x = torch.cat([x[mask] for x, mask in zip(calls[name], kept, strict=True)])
    everything = torch.cat([x.flatten(0, 1) for x in calls[name]])
    moment = statistics.uses(name)[0].moment
    assert far(moment, x.T @ x / len(x)) < BFLOAT16
    assert far(moment, everything.T @ everything / len(everything)) > 2 * BFLOAT16
    table = next(name for name in statistics.weights if "word_embeddings" in name)
    ids = torch.cat([batch["tokens"][mask] for batch, mask in zip(batches, kept, strict=True)])
    counts = torch.bincount(ids, minlength=statistics.weights[table].shape[0])
    assert torch.allclose(statistics.uses(table)[0].rows, elsewhere(frequencies(counts)))
    assert statistics.table.sensitivity == "power"  # an encoder has no loss of its own


def test_a_convolution_is_a_product_with_its_patches(digits: Lab) -> None:
    config = {"examples": 8, "batch_size": 4}
    made = digits.step("calibrate", config, model=digits.model, dataset=digits.dataset)
    statistics, task = open_statistics(made, digits.model), get_task("vision")
    network = task.load(digits.model.path)
    batches = batches_of(digits)
    calls = inputs_of(network, lambda: [network(batch["image"]) for batch in batches], (nn.Conv2d, nn.Linear))
    convolutions = 0
    for name, row in statistics.weights.items():
        module, weight = network.get_submodule(name.removesuffix(".weight")), network.get_parameter(name).detach()
        x = torch.cat(calls[name])
        if isinstance(module, nn.Conv2d):
            output = nn.functional.conv2d(x, weight, None, module.stride, module.padding, module.dilation)
            output, convolutions = output.transpose(0, 1).flatten(1), convolutions + 1
        else:
            output = (x @ weight.T).T
        (view,) = statistics.uses(name)
        matrix = weight.flatten(1)
        assert view.moment.shape == (matrix.shape[1],) * 2 and row.shape == tuple(weight.shape)
        assert far(((matrix @ view.moment) * matrix).sum(1), output.square().mean(1)) < BFLOAT16, name
        assert len(view.rows) == len(weight) and (view.rows >= 0).all() and view.rows.sum() > 0
    assert convolutions


# ---- runs that stop --------------------------------------------------------------------------------------------------
@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the blocks that were run, in order; a name put into `stop` beforehand stops the run there."""
    ran: list[str] = []
    real = calibrate._pass

    def counted(block: Any, *rest: Any, **last: bool) -> Path:
        if block.name in stop:
            stop.remove(block.name)
            raise KeyboardInterrupt
        ran.append(block.name)
        return real(block, *rest, **last)

    monkeypatch.setattr(calibrate, "_pass", counted)
    yield ran


stop: set[str] = set()


def test_an_interrupted_run_goes_on_at_its_block(language: Lab, passes: list[str]) -> None:
    inputs = {"model": language.model, "dataset": language.dataset}
    config = FEW | {"gradient_examples": 4}
    whole = language.step("calibrate", config, **inputs)
    order, again = passes[:], Store(language.store.home.parent / "again")
    assert len(order) == 4
    passes.clear()
    other: dict[str, Any] = {"store": again, "progress": Progress(quiet=True)}
    for number in (1, 2, 3):
        stop.add(order[number])
        with pytest.raises(KeyboardInterrupt):
            call("calibrate", config, inputs, **other)
    resumed = call("calibrate", config, inputs, **other)
    assert passes == order  # each block once
    assert resumed.id == whole.id


def test_a_run_killed_inside_a_block_does_it_again(language: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"model": language.model, "dataset": language.dataset}
    config = FEW | {"gradient_examples": 1}
    other: dict[str, Any] = {"store": Store(language.store.home.parent / "inside"), "progress": Progress(quiet=True)}
    real, left = calibrate.save_file, [5]

    def failing(*args: Any, **options: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "save_file", failing)
        with pytest.raises(KeyboardInterrupt):
            call("calibrate", config, inputs, **other)
    resumed = call("calibrate", config, inputs, **other)
    assert resumed.id == language.step("calibrate", config, **inputs).id


# ---- refusals --------------------------------------------------------------------------------------------------------
def test_a_memory_limit_that_cannot_be_held_is_infeasible(language: Lab) -> None:
    with pytest.raises(BudgetError, match="limit is 1 MB") as refusal:
        opened(language, max_ram_bytes=1_000_000)
    assert refusal.value.exit_code == 4


def test_families_are_not_mixed(language: Lab, digits: Lab) -> None:
    with pytest.raises(ConfigError, match="for language, but the dataset is for vision"):
        language.step("calibrate", model=language.model, dataset=digits.dataset)


def test_a_packed_model_is_not_calibrated(language: Lab) -> None:
    with pytest.raises(ConfigError, match="packed already; calibrate the plain model"):
        language.step("calibrate", FEW, model=language.quantize(bits=8, kind="uniform"), dataset=language.dataset)


def test_what_was_calibrated_on_is_never_measured_on(language: Lab) -> None:
    passage = "the giant measures every island and the queen counts the lanterns. " * 8
    other = "a sailor mends the old map while the child forgets the long rope. " * 8
    folder = language.store.artifacts_folder
    mixed = write_dataset(folder, [passage], [f"{other}\n\n{passage}\n"])
    calibration = language.step("calibrate", FEW | {"examples": 4}, model=language.model, dataset=mixed)
    assert contents(calibration, Calibration.file)["dataset"] == mixed.id
    packed = language.step("quantize", {}, model=language.model, calibration=calibration)
    scored: dict[str, Any] = {"windows": 2, "context": 16}
    with pytest.raises(DataError, match="was calibrated on text of the eval part"):
        language.step("quality", scored, model=packed, dataset=mixed)
    distilled = {"model": packed, "parent": language.model, "dataset": language.dataset}
    grandchild = language.step("distill", {"steps": 1, "tokens": TOKENS}, **distilled)
    with pytest.raises(DataError, match="was calibrated on text of the eval part"):
        language.step("quality", scored, model=grandchild, dataset=mixed)
    language.step("quality", scored, model=packed, dataset=write_dataset(folder, [passage], [other]))


def test_samples_and_dataset_are_dealt_out_in_turn(language: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    own = write_dataset(language.store.artifacts_folder, ["a child counts. " * 200], [])
    inputs: dict[str, Artifact] = {"model": language.model, "dataset": language.dataset}
    alone, both = language.step("calibrate", FEW, **inputs), language.step("calibrate", FEW, **inputs, samples=own)
    assert both.inputs == {"model": (language.model.id,), "dataset": (language.dataset.id,), "samples": (own.id,)}
    task, options = get_task("language"), get_task("language").chosen({"tokens": 32})
    first, second = (
        next(task.batches(data, "train", 4, 0, 0, folder=language.model.path, options=options))["tokens"]
        for data in (language.dataset, own)
    )
    table = next(name for name in open_statistics(both, language.model).weights if "embed" in name)
    counts = torch.bincount(torch.cat([first, second]).flatten(), minlength=len(_rows(both, language, table)))
    likely = likelihoods(language, [{"tokens": first}, {"tokens": second}]).sum(0)
    assert far(_rows(both, language, table), elsewhere((counts + likely) / (2 * counts.sum()))) < BFLOAT16
    assert not torch.allclose(_rows(both, language, table), _rows(alone, language, table))
    assert len(contents(both, Calibration.file)["fingerprints"]) > len(
        contents(alone, Calibration.file)["fingerprints"]
    )
    assert both.file(ROWS).is_file()


def _rows(made: Artifact, lab: Lab, table: str) -> Tensor:
    return open_statistics(made, lab.model).uses(table)[0].rows
