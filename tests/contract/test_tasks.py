"""What every task promises, checked for every row of TASKS at toy size, through the public methods alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from language_samples import text, write_dataset
from test_vision import DIGITS, make_dataset

from gulliver.core.errors import ConfigError, DataError
from gulliver.core.evidence.evidence import METRICS
from gulliver.core.store.artifact import Artifact
from gulliver.nets.weights import assign, read_safetensors, release, unfilled
from gulliver.tasks import FOREIGN, TASKS, get_task
from gulliver.tasks.base import Batch


@dataclass(frozen=True)
class Toy:
    """What a test must know about a family and the contract does not say."""

    dataset: Callable[[Path], Artifact]
    output: Callable[[Any, Batch], torch.Tensor]
    request: dict[str, Any]
    batch: dict[str, int]
    score: dict[str, int]
    source: Callable[[Path], Path]


def _texts(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(text(100, 1))
    return path


def _images(folder: Path) -> Artifact:
    task = get_task("vision")
    rows = [{**row, "split": split} for split in ("train", "eval") for row in task.read(DIGITS, split)[::20]]
    return make_dataset(folder, rows)


TOYS = {
    "language": Toy(
        dataset=lambda folder: write_dataset(folder, [text(100, 1)], [text(50, 2)]),
        output=lambda model, batch: model(input_ids=batch["tokens"]).logits,
        request={"prompt": "the giant", "max_new_tokens": 2},
        batch={"tokens": 24},
        score={"windows": 3, "context": 32},
        source=_texts,
    ),
    "vision": Toy(
        dataset=_images,
        output=lambda model, batch: model(batch["image"]),
        request={"image": [0.5] * 64},
        batch={},
        score={},
        source=lambda folder: DIGITS,
    ),
}


@pytest.fixture(params=sorted(TASKS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def toy(family: str) -> Toy:
    return TOYS[family]


@pytest.fixture
def dataset(toy: Toy, tmp_path: Path) -> Artifact:
    return toy.dataset(tmp_path / "data")


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    """A saved network of this family."""
    task = get_task(family)
    task.save(task.build(1, seed=3).eval(), tmp_path / "model")
    return tmp_path / "model"


def take(
    family: str, toy: Toy, dataset: Artifact, folder: Path, count: int, seed: int = 0, step: int = 0
) -> list[Batch]:
    batches = get_task(family).batches(dataset, "train", 3, seed, step, folder=folder, **toy.batch)
    return list(itertools.islice(batches, count))


def same(first: Batch, second: Batch) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_every_task_has_a_toy_and_its_own_name() -> None:
    assert set(TOYS) == set(TASKS)
    for name in TASKS:
        assert get_task(name).name == name
    assert {task for task, _ in FOREIGN.values()} <= set(TASKS)
    with pytest.raises(ConfigError, match="'vision'"):
        get_task("vison")


def test_read_gives_two_parts_that_share_nothing(family: str, toy: Toy, tmp_path: Path) -> None:
    task, source = get_task(family), toy.source(tmp_path)
    train, held_out = (task.read(source, split) for split in ("train", "eval"))
    assert len(train) > 0 and len(held_out) > 0
    assert all(row not in train for row in held_out)
    with pytest.raises((ConfigError, DataError), match="split"):
        task.read(source, "test")
    with pytest.raises(DataError):
        task.read(tmp_path / "absent.txt", "train")


def test_read_takes_a_dataset_artifact(family: str, dataset: Artifact) -> None:
    for split in ("train", "eval"):
        assert get_task(family).read(dataset.path, split)


def test_batches_are_a_pure_function_of_seed_and_step(family: str, toy: Toy, dataset: Artifact, folder: Path) -> None:
    first = take(family, toy, dataset, folder, 5)
    assert all(same(a, b) for a, b in zip(first[2:], take(family, toy, dataset, folder, 3, step=2), strict=True))
    assert all(same(a, b) for a, b in zip(first, take(family, toy, dataset, folder, 5), strict=True))
    assert not same(first[0], take(family, toy, dataset, folder, 1, seed=1)[0])
    with pytest.raises(ConfigError, match="batch_size"):
        next(get_task(family).batches(dataset, "train", 0, 0, 0, folder=folder))


def test_build_has_one_dial_and_a_seed(family: str) -> None:
    task = get_task(family)
    counts = [sum(parameter.numel() for parameter in task.build(size).parameters()) for size in (1, 2)]
    assert counts[0] < counts[1]
    first, again, other = (list(task.build(1, seed).parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    with pytest.raises(ConfigError, match="size"):
        task.build(0)


def test_what_is_saved_is_loaded(family: str, toy: Toy, dataset: Artifact, folder: Path, tmp_path: Path) -> None:
    task = get_task(family)
    model, again = task.build(1, seed=3).eval(), task.load(folder)
    batch = take(family, toy, dataset, folder, 1)[0]
    with torch.no_grad():
        torch.testing.assert_close(toy.output(model, batch), toy.output(again, batch), rtol=0, atol=0)
    assert not again.training and all(parameter.dtype == torch.float32 for parameter in again.parameters())
    task.save(again, tmp_path / "again")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()
    }
    empty = task.load(folder, empty=True)
    assert set(unfilled(empty)) == {name for name, _ in again.named_parameters()}


def test_losses_are_one_per_example_and_train(family: str, toy: Toy, dataset: Artifact, folder: Path) -> None:
    task = get_task(family)
    model, parent = task.load(folder), task.build(1, seed=8).eval()
    batch = take(family, toy, dataset, folder, 1)[0]
    part = {name: tensor[:2] for name, tensor in batch.items()}
    for reference in (None, parent):
        losses = task.loss(model, batch, reference)
        assert losses.dtype == torch.float32 and bool((losses >= 0).all())
        torch.testing.assert_close(task.loss(model, part, reference), losses[:2], rtol=1e-4, atol=1e-6)
        model.zero_grad()
        losses.mean().backward()
        assert sum(parameter.grad is not None for parameter in model.parameters()) > 0
    assert all(parameter.grad is None for parameter in parent.parameters())
    assert task.loss(model, batch, model).abs().max() < 1e-5


def test_streaming_through_blocks_equals_the_network(family: str, toy: Toy, dataset: Artifact, folder: Path) -> None:
    """On a network without weights, each block's weights given just before it runs and taken right after."""
    task = get_task(family)
    whole, empty = task.load(folder), task.load(folder, empty=True)
    batches = take(family, toy, dataset, folder, 3)
    stored = dict(read_safetensors(folder))
    buffers = {name for name, _ in empty.named_buffers()}
    activations: list[Any] = list(batches)
    with torch.no_grad():
        for block in task.blocks(empty, batches):
            needed = {name for name in stored if name.startswith(block.prefixes)}
            assign(empty, [(name, stored[name]) for name in sorted(needed)])
            assert set(unfilled(empty)).isdisjoint(needed)
            activations = [block.forward(x, index) for index, x in enumerate(activations)]
            release(empty, block.prefixes)
        assert set(unfilled(empty)) == set(stored) - buffers
        for batch, found in zip(batches, activations, strict=True):
            torch.testing.assert_close(found, toy.output(whole, batch), rtol=1e-6, atol=1e-6)


def test_blocks_own_every_parameter_and_name_what_may_be_packed(
    family: str, toy: Toy, dataset: Artifact, folder: Path
) -> None:
    task = get_task(family)
    model = task.load(folder, empty=True)
    blocks = task.blocks(model, take(family, toy, dataset, folder, 1))
    packable = [weight for block in blocks for weight in block.weights]
    for block in blocks:
        assert all(weight.name.startswith(block.prefixes) for weight in block.weights)
    for name, parameter in model.named_parameters():
        assert any(name.startswith(block.prefixes) for block in blocks), name
        if name in {weight.name for weight in packable}:
            assert parameter.dim() >= 2
    assert {weight.kind for weight in packable} <= {"linear", "conv", "embedding"}
    assert len({block.name for block in blocks}) == len(blocks)


def test_scores_are_evidence_beside_a_baseline(family: str, toy: Toy, dataset: Artifact, folder: Path) -> None:
    task = get_task(family)
    model, parent = task.load(folder), task.build(1, seed=8).eval()
    alone = task.score(model, dataset, folder=folder, **toy.score)
    paired = task.score(model, dataset, parent, folder=folder, **toy.score)
    assert {item.metric for item in alone} < {item.metric for item in paired}
    assert any(item.metric.startswith("baseline_") for item in alone)
    assert any(item.metric.endswith("_vs_baseline") for item in alone)
    assert {"quality_loss"} <= {item.metric for item in paired}
    for item in paired:
        assert item.metric in METRICS and item.data_hash and item.n >= 2
        assert math.isfinite(item.value) and item.low <= item.value <= item.high
    itself = {
        item.metric: item.value for item in task.score(model, dataset, task.load(folder), folder=folder, **toy.score)
    }
    assert itself["quality_loss"] == pytest.approx(0, abs=1e-6)
    with pytest.raises((ConfigError, TypeError), match="colour"):
        task.score(model, dataset, folder=folder, colour=3)


def test_a_request_is_answered_and_nonsense_refused(family: str, toy: Toy, folder: Path) -> None:
    task = get_task(family)
    model = task.load(folder)
    assert task.answer(model, toy.request, folder=folder) == task.answer(model, toy.request, folder=folder)
    with pytest.raises(DataError):
        task.answer(model, {"nonsense": 1}, folder=folder)
