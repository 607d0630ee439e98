"""What every task promises, checked for every row of TASKS at toy size, through the public methods alone."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from language_samples import text, write_dataset
from pydantic import ValidationError
from test_vision import DIGITS, make_dataset

from gulliver.core.errors import ArtifactError, ConfigError, DataError
from gulliver.core.evidence.evidence import METRICS
from gulliver.core.store.artifact import Artifact
from gulliver.nets.weights import assign, read_safetensors, release, unfilled
from gulliver.runtime.batching.records import EngineClosed
from gulliver.tasks import FOREIGN, TASKS, detect_task, get_task, open_model
from gulliver.tasks.answerer import OpenOptions
from gulliver.tasks.base import Batch
from gulliver.tasks.blocks import packed_names


@dataclass(frozen=True)
class Toy:
    """What a test must know about a family and the contract does not say."""

    dataset: Callable[[Path], Artifact]
    output: Callable[[Any, Batch], torch.Tensor]
    request: dict[str, Any]
    words: Callable[[Path], list[str]]
    options: dict[str, int]
    source: Callable[[Path], Path]


def _texts(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(text(100, 1))
    return path


def _images(folder: Path) -> Artifact:
    task = get_task("vision")
    rows = [{**row, "split": split} for split in ("train", "eval") for row in list(task.rows(DIGITS, split))[::20]]
    return make_dataset(folder, rows)


def _picture(folder: Path) -> list[str]:
    from PIL import Image

    Image.fromarray(np.full((20, 30), 200, np.uint8)).save(folder / "grey.png")
    return [str(folder / "grey.png")]


TOYS = {
    "language": Toy(
        dataset=lambda folder: write_dataset(folder, [text(100, 1)], [text(50, 2)]),
        output=lambda model, batch: model(input_ids=batch["tokens"]).logits,
        request={"prompt": "the giant", "max_tokens": 2, "temperature": 0},
        words=lambda folder: ["the", "giant"],
        options={"tokens": 24, "windows": 3, "context": 32},
        source=_texts,
    ),
    "encoder": Toy(
        dataset=lambda folder: write_dataset(folder, [text(100, 1)], [text(50, 2)]),
        output=lambda model, batch: model(input_ids=batch["tokens"], attention_mask=batch["mask"]).last_hidden_state,
        request={"texts": ["the giant", "a small machine"]},
        words=lambda folder: ["the giant", "a small machine"],
        options={"tokens": 24, "texts": 12},
        source=_texts,
    ),
    "vision": Toy(
        dataset=_images,
        output=lambda model, batch: model(batch["image"]),
        request={"image": [0.5] * 64},
        words=_picture,
        options={},
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
    task = get_task(family)
    options = task.chosen(toy.options)
    batches = task.batches(dataset, "train", 3, seed, step, folder=folder, options=options)
    return list(itertools.islice(batches, count))


def same(first: Batch, second: Batch) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_every_task_has_a_toy_and_its_own_name() -> None:
    assert set(TOYS) == set(TASKS)
    for name in TASKS:
        assert get_task(name).name == name
    assert {row.family for row in FOREIGN} <= set(TASKS)
    with pytest.raises(ConfigError, match="'vision'"):
        get_task("vison")


def test_examples_are_two_parts_that_share_nothing(family: str, toy: Toy, tmp_path: Path) -> None:
    task, source = get_task(family), toy.source(tmp_path)
    train, held_out, everything = (list(task.rows(source, split)) for split in ("train", "eval", "all"))
    assert train and held_out and len(everything) in (1, len(train) + len(held_out))
    units = [set(task.units_of(source, split)) for split in ("train", "eval")]
    assert not units[0] & units[1]
    for batch in task.examples(source, "train"):
        assert isinstance(batch, pyarrow.RecordBatch) and batch.num_rows <= 2048
    with pytest.raises((ConfigError, DataError), match="split"):
        list(task.examples(source, "test"))
    with pytest.raises(DataError):
        list(task.examples(tmp_path / "absent.txt", "train"))


def test_examples_come_from_a_dataset_artifact(family: str, dataset: Artifact) -> None:
    for split in ("train", "eval"):
        assert list(get_task(family).examples(dataset.path, split))


def test_options_are_checked_and_named(family: str, toy: Toy) -> None:
    task = get_task(family)
    assert task.chosen(toy.options).model_dump().items() >= toy.options.items()
    with pytest.raises(ConfigError, match="colour"):
        task.chosen({"colour": 3})


def test_batches_are_a_pure_function_of_seed_and_step(family: str, toy: Toy, dataset: Artifact, folder: Path) -> None:
    first = take(family, toy, dataset, folder, 5)
    assert all(same(a, b) for a, b in zip(first[2:], take(family, toy, dataset, folder, 3, step=2), strict=True))
    assert all(same(a, b) for a, b in zip(first, take(family, toy, dataset, folder, 5), strict=True))
    assert not same(first[0], take(family, toy, dataset, folder, 1, seed=1)[0])
    with pytest.raises(ConfigError, match="batch_size"):
        next(get_task(family).batches(dataset, "train", 0, 0, 0, folder=folder))


def test_a_held_out_part_can_be_gone_through_once(family: str, toy: Toy, dataset: Artifact, folder: Path) -> None:
    task = get_task(family)
    shared = {"folder": folder, "options": task.chosen(toy.options)}
    once = list(task.batches(dataset, "eval", 4, 0, 0, once=True, **shared))
    rows = [
        tuple(tensor[at].numpy().tobytes() for tensor in batch.values())
        for batch in once
        for at in range(_count(batch))
    ]
    assert [_count(batch) for batch in once[:-1]] == [4] * (len(once) - 1) and 1 <= _count(once[-1]) <= 4
    assert len(set(rows)) > 0.7 * len(rows), "texts that are cut may be equal, but few are"
    again = task.batches(dataset, "eval", 4, 0, 0, **shared)
    assert all(same(batch, next(again)) for batch in once[:-1])
    assert [task.positions(batch).shape for batch in once] == [(_count(batch),) for batch in once]


def _count(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]


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
    references: tuple[Any, ...] = (None, parent) if family != "encoder" else (parent,)  # it has no loss of its own
    for reference in references:
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
    named = packed_names(blocks)
    assert named and len(set(named)) == len(named)
    for block in blocks:
        assert all(name.startswith(block.prefixes) for name in block.weights)
        assert all(model.get_parameter(name).dim() >= 2 for name in block.weights)
    for name, _ in model.named_parameters():
        assert any(name.startswith(block.prefixes) for block in blocks), name
    assert len({block.name for block in blocks}) == len(blocks)


def test_scores_are_evidence_beside_a_baseline(family: str, toy: Toy, dataset: Artifact, folder: Path) -> None:
    task = get_task(family)
    options = task.chosen(toy.options)
    model, parent = task.load(folder), _changed(task.load(folder))
    alone = task.score(model, dataset, folder=folder, options=options)
    paired = task.score(model, dataset, parent, folder=folder, options=options)
    assert {item.metric for item in alone} < {item.metric for item in paired}
    assert any(item.metric.startswith("baseline_") for item in alone)
    assert any(item.metric.endswith("_vs_baseline") for item in paired)
    assert {"quality_loss"} <= {item.metric for item in paired}
    for item in paired:
        assert item.metric in METRICS and item.data_hash and item.n >= 2
        assert math.isfinite(item.value) and item.low <= item.value <= item.high
    itself = task.score(model, dataset, task.load(folder), folder=folder, options=options)
    assert {item.metric: item.value for item in itself}["quality_loss"] == pytest.approx(0, abs=1e-6)
    share = task.score(model, dataset, folder=folder, options=options, share=0.5)
    assert {item.metric for item in share} == {item.metric for item in alone}


def _changed(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model


def test_workloads_measure_the_speed_that_the_family_names(family: str, folder: Path) -> None:
    task = get_task(family)
    work = task.workloads(task.load(folder), folder)
    assert task.row.speed_metric in work and set(work) <= set(METRICS)
    assert all(once() >= 1 for once in work.values())


def test_a_unit_is_removed_from_all_that_are_coupled(family: str, toy: Toy, dataset: Artifact, folder: Path) -> None:
    """Zeroing what would be removed changes nothing that is left: the unit's writer alone carries what it adds."""
    task = get_task(family)
    model = task.load(folder)
    for coupling in task.couplings(model):
        readers = [member for member in coupling.members if member[1] == 0]
        writers = [member for member in coupling.members if member[1] == 1]
        assert readers and writers and coupling.units > 0
        whole, half = task.load(folder), task.load(folder)
        with torch.no_grad():
            for name, dim, size in writers:
                for network in (whole, half):
                    network.get_parameter(name).narrow(dim, 0, size).zero_()
            for name, dim, size in readers:
                half.get_parameter(name).narrow(dim, 0, size).zero_()
            batch = take(family, toy, dataset, folder, 1)[0]
            torch.testing.assert_close(toy.output(half, batch), toy.output(whole, batch), rtol=1e-5, atol=1e-6)


def test_transformers_have_couplings() -> None:
    for name, count in (("language", 4), ("encoder", 4)):
        task = get_task(name)
        assert len(task.couplings(task.build(1))) == count


def test_what_a_model_writes_is_an_example(family: str, toy: Toy, folder: Path, tmp_path: Path) -> None:
    task = get_task(family)
    if not task.generates:
        with pytest.raises(ConfigError, match="write no data"):
            task.author(folder, seed=0, work=tmp_path)
        return
    with task.author(folder, options=task.chosen(toy.options), seed=0, work=tmp_path) as author:
        written = author.write(range(2))
    assert len(written) == 2
    assert all(isinstance(unit, str) for example in written for unit in task.units(example.row))


def test_a_folder_is_claimed_by_one_family(family: str, folder: Path) -> None:
    assert detect_task(folder) == family
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Odd"], "model_type": "odd"}))
    (folder / "modules.json").unlink(missing_ok=True)
    with pytest.raises(ArtifactError, match="Odd"):
        detect_task(folder)


def test_an_open_model_answers_and_refuses_nonsense(family: str, toy: Toy, folder: Path, tmp_path: Path) -> None:
    with open_model(folder, family, family, OpenOptions(threads=1)) as answerer:
        assert set(answerer.can) == set(TASKS[family].can) and "predict" in answerer.can
        asked = answerer.request_model.model_validate(toy.request)
        first, again = answerer.answer(asked), answerer.answer(asked)
        assert first == again and isinstance(first, answerer.response_model)
        assert answerer.show(first) and answerer.backend and answerer.why
        assert answerer.answer(answerer.read(toy.words(tmp_path)))
        with pytest.raises(ValidationError):
            answerer.request_model.model_validate({"nonsense": 1})
        assert "requests_waiting" in answerer.engine.stats() and answerer.engine.histograms()
    with pytest.raises(EngineClosed):
        answerer.answer(asked)
