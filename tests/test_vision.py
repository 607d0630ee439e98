from __future__ import annotations

import base64
import importlib.util
import io
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from sklearn.datasets import load_digits

from gulliver.core.errors import ArtifactError, ConfigError, DataError
from gulliver.core.evidence.intervals import matched_interval, wilson_interval
from gulliver.core.store.artifact import create
from gulliver.nets.inception import Inception, InceptionConfig
from gulliver.nets.weights import assign, release, unfilled
from gulliver.pipeline.ask import ask
from gulliver.tasks import get_task, open_model
from gulliver.tasks.answerer import OpenOptions
from gulliver.tasks.vision.examples import Examples, read_split, split_by_content
from gulliver.tasks.vision.scores import divergences

DIGITS = Path(importlib.util.find_spec("sklearn").origin).parent / "datasets" / "data" / "digits.csv.gz"
TASK = get_task("vision")
SCHEMA = pa.schema([("image", pa.list_(pa.float32())), ("label", pa.int64()), ("split", pa.string())])


def write_rows(path, rows):
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)


def make_dataset(folder, rows=None, task="vision"):
    """A dataset artifact of `rows`, by default every ninth digit."""
    if rows is None:
        rows = [{**row, "split": split} for split in ("train", "eval") for row in list(TASK.rows(DIGITS, split))[::9]]
    with create(folder, kind="dataset", task=task, step={"name": "read", "version": 1}, config={}) as writer:
        write_rows(writer.path / "examples.parquet", rows)
        return writer.commit()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    TASK.save(TASK.build(1, seed=1), path)
    return path


# ---- data -----------------------------------------------------------------------------------------------------
def test_digits_are_read_whole_and_split_by_label():
    train, held_out = read_split(DIGITS, "train"), read_split(DIGITS, "eval")
    assert len(train) + len(held_out) == 1797 and len(held_out) == 539
    shares = np.bincount(held_out.labels) / np.bincount(np.concatenate([train.labels, held_out.labels]))
    assert shares.min() > 0.29 and shares.max() < 0.31
    oracle = {(row.tobytes(), int(label)) for row, label in zip(*load_digits(return_X_y=True), strict=True)}
    mine = {
        ((row * 16).astype(np.float64).tobytes(), int(label))
        for part in (train, held_out)
        for row, label in zip(part.images, part.labels, strict=True)
    }
    assert mine == oracle
    assert not {row.tobytes() for row in train.images} & {row.tobytes() for row in held_out.images}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=60), st.randoms())
def test_equal_images_never_stand_in_both_splits_and_order_does_not_matter(pairs, random):
    images = np.array([[pixel / 5] for pixel, _ in pairs], dtype=np.float32)
    examples = Examples(images, np.array([label for _, label in pairs]))
    held_out = split_by_content(examples)
    assert not set(images[held_out, 0]) & set(images[~held_out, 0])
    order = list(range(len(pairs)))
    random.shuffle(order)
    assert set(images[order][split_by_content(examples.take(np.array(order))), 0]) == set(images[held_out, 0])


def test_read_understands_artifact_and_parquet(tmp_path, dataset):
    from_artifact = list(TASK.rows(dataset.path, "eval"))
    from_file = list(TASK.rows(str(dataset.file("examples.parquet")), "eval"))
    assert from_artifact == from_file
    assert set(from_artifact[0]) == {"image", "label"} and len(from_artifact[0]["image"]) == 64
    rows = list(islice(TASK.rows(DIGITS, "train"), 40))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "plain.parquet")
    both = [list(TASK.rows(tmp_path / "plain.parquet", split)) for split in ("train", "eval")]
    assert sorted(map(str, both[0] + both[1])) == sorted(map(str, rows)) and 5 < len(both[1]) < 20


def test_what_cannot_be_used_is_refused(tmp_path):
    row = {"image": [0.5] * 64, "label": 1, "split": "train"}
    other = {"image": [0.25] * 64, "label": 1, "split": "eval"}
    cases = {
        "both": ([row, {**row, "split": "eval"}], "also in the train split"),
        "strange": ([{**row, "split": "test"}], "column 'split' holds 'test'"),
        "ragged": ([row, {**other, "image": [0.1]}], "same number"),
        "bright": ([{**row, "image": [1.5] * 64}], "between 0 and 1"),
        "nan": ([{**row, "image": [float("nan")] * 64}], "between 0 and 1"),
        "hole": ([{**row, "image": [None] * 64}], "none of them empty"),
        "empty": ([{**row, "image": None}], "empty cells"),
        "negative": ([{**row, "label": -1}], "labels count from 0"),
        "one-sided": ([row], "no examples"),
    }
    for name, (rows, message) in cases.items():
        write_rows(tmp_path / f"{name}.parquet", rows)
        with pytest.raises(DataError, match=message):
            list(TASK.rows(tmp_path / f"{name}.parquet", "eval"))


def test_foreign_files_are_refused(tmp_path):
    pq.write_table(pa.table({"image": ["a"], "label": [1]}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"pixels": [[0.5]], "label": [1]}), tmp_path / "column.parquet")
    pq.write_table(pa.table({"image": [[0.5]], "label": [0.5]}), tmp_path / "label.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    (tmp_path / "short.csv").write_text("1,2,3\n")
    (tmp_path / "words.csv").write_text("a,b\n")
    (tmp_path / "torn.csv.gz").write_bytes(DIGITS.read_bytes()[:2000])
    (tmp_path / "half.csv").write_text(",".join(["1"] * 64 + ["0.5"]) + "\n")
    (tmp_path / "notes.txt").write_text("hello")
    names = sorted(path.name for path in tmp_path.iterdir())
    for name in [*names, "missing.parquet", "."]:
        with pytest.raises(DataError):
            list(TASK.rows(tmp_path / name, "train"))
    with pytest.raises(DataError, match="give a vision dataset"):
        list(TASK.rows(make_dataset(tmp_path / "made", task="language").path, "train"))
    with pytest.raises(ConfigError, match="split is 'test'"):
        list(TASK.rows(DIGITS, "test"))


def test_batches_are_a_pure_function_of_seed_and_step(dataset, folder):
    def take(start, count, seed=3, batch_size=32):
        stream = TASK.batches(dataset, "train", batch_size, seed, start, folder=folder)
        return list(islice(stream, count))

    first = take(0, 12)
    assert first[0]["image"].shape == (32, 1, 8, 8) and first[0]["image"].dtype == torch.float32
    assert first[0]["label"].dtype == torch.int64
    for one, other in zip(first[7:], take(7, 5), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert not torch.equal(first[0]["image"], take(0, 1, seed=4)[0]["image"])
    count = len(list(TASK.rows(dataset.path, "train")))
    epoch = take(0, count, batch_size=1)
    assert len({batch["image"].numpy().tobytes() for batch in epoch}) == count
    huge = take(1, 1, batch_size=2 * count)[0]
    assert len(huge["label"]) == 2 * count


def test_a_dataset_that_does_not_fit_the_network_is_refused(tmp_path, folder):
    row = {"image": [0.5] * 64, "label": 1, "split": "train"}
    small = make_dataset(tmp_path, [{**row, "image": [0.5] * 9}])
    many = make_dataset(tmp_path, [{**row, "label": 10}])
    one_sided = make_dataset(tmp_path, [row])
    for made, split, message in (
        (small, "train", "9 pixels"),
        (many, "train", "label 10"),
        (one_sided, "eval", "no eval"),
    ):
        with pytest.raises(DataError, match=message):
            next(TASK.batches(made, split, 4, 0, 0, folder=folder))
    with pytest.raises(DataError, match="no eval examples"):
        TASK.score(TASK.load(folder), one_sided, folder=folder)


# ---- networks -------------------------------------------------------------------------------------------------
def test_size_is_a_dial_and_the_seed_decides_the_weights():
    counts = [sum(p.numel() for p in TASK.build(size).parameters()) for size in (1, 2, 3)]
    assert counts == sorted(counts) and len(set(counts)) == 3
    before = torch.get_rng_state()
    one, same, other = (TASK.build(1, seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["stem.conv.weight"], other["stem.conv.weight"])


@pytest.mark.parametrize("dials", [{"size": 0}, {"size": 65}, {"size": True}, {"size": 1, "classes": 1}, {"size": 1.5}])
def test_a_wrong_shape_is_refused(dials):
    with pytest.raises(ConfigError):
        InceptionConfig(**dials)


def test_other_image_shapes_work():
    model = Inception(InceptionConfig(1, classes=3, channels=3, height=12, width=9))
    assert model(torch.rand(2, 3, 12, 9)).shape == (2, 3)


def test_an_example_does_not_depend_on_its_batch(folder):
    model = TASK.build(1)
    images = torch.rand(6, 1, 8, 8)
    torch.testing.assert_close(model.train()(images)[:1], model(images[:1]), rtol=1e-4, atol=1e-5)


def test_save_and_load_keep_every_bit(folder, tmp_path):
    model = TASK.load(folder)
    assert not model.training and not unfilled(model)
    TASK.save(model, tmp_path)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    fresh = TASK.build(1, seed=1).state_dict()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in model.state_dict().items())


def test_half_precision_is_saved_as_it_is_and_loaded_as_float32(tmp_path):
    TASK.save(TASK.build(1).bfloat16(), tmp_path)
    assert load_file(tmp_path / "model.safetensors")["stem.conv.weight"].dtype == torch.bfloat16
    assert {p.dtype for p in TASK.load(tmp_path).parameters()} == {torch.float32}


def test_damaged_folders_are_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    missing = {name: tensor for name, tensor in tensors.items() if name != "stem.norm.bias"}
    cases = [
        ("{", tensors),
        ("[]", tensors),
        (json.dumps({**config, "architectures": ["Other"]}), tensors),
        (json.dumps({**config, "size": 10**9}), tensors),
        (json.dumps({**config, "depth": 3}), tensors),
        (json.dumps({**config, "size": 2}), tensors),
        (json.dumps(config), missing),
        (json.dumps(config), {**tensors, "extra": torch.ones(1)}),
    ]
    for text, weights in cases:
        (tmp_path / "config.json").write_text(text)
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(ArtifactError):
            TASK.load(tmp_path)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        TASK.load(tmp_path / "nowhere")


# ---- arithmetic -----------------------------------------------------------------------------------------------
def test_loss_is_cross_entropy_or_divergence_from_the_parent(dataset, folder):
    model, parent = TASK.build(1, seed=2), TASK.load(folder)
    batch = next(TASK.batches(dataset, "train", 16, 0, 0, folder=folder))
    losses = TASK.loss(model, batch)
    expected = -model(batch["image"]).log_softmax(-1).gather(1, batch["label"][:, None])[:, 0]
    torch.testing.assert_close(losses, expected)
    against = TASK.loss(model, batch, parent)
    p, q = (torch.distributions.Categorical(logits=net(batch["image"])) for net in (parent, model))
    torch.testing.assert_close(against, torch.distributions.kl_divergence(p, q), rtol=1e-4, atol=1e-6)
    against.mean().backward()
    assert all(p.grad is None for p in parent.parameters())
    assert all(p.grad is not None for p in model.parameters())
    assert TASK.loss(parent, batch, parent).abs().max() < 1e-6


def test_blocks_stream_an_empty_network_to_the_same_logits(dataset, folder):
    batches = list(islice(TASK.batches(dataset, "train", 8, 0, 0, folder=folder), 2))
    model, whole = TASK.load(folder, empty=True), TASK.load(folder)
    blocks = TASK.blocks(model, batches)
    assert set(unfilled(model)) == {name for name, _ in model.named_parameters()}
    assert [block.name for block in blocks] == ["stem", "inceptions.0", "inceptions.1", "inceptions.2", "head"]
    tensors = load_file(folder / "model.safetensors")
    activations = list(batches)
    with torch.inference_mode():
        for block in blocks:
            assign(model, [(name, tensor) for name, tensor in tensors.items() if name.startswith(block.prefixes)])
            activations = [block.forward(x, index) for index, x in enumerate(activations)]
            release(model, block.prefixes)
        for x, batch in zip(activations, batches, strict=True):
            torch.testing.assert_close(x, whole(batch["image"]))
    assert len(unfilled(model)) == len(tensors)


def test_blocks_name_every_parameter_once_and_pack_convolutions_and_linears(folder):
    model = TASK.load(folder)
    blocks = TASK.blocks(model, [])
    for name, _ in model.named_parameters():
        assert sum(name.startswith(block.prefixes) for block in blocks) == 1, name
    shapes = {name: model.get_parameter(name).shape for block in blocks for name in block.weights}
    assert [sum(len(shape) == dims for shape in shapes.values()) for dims in (4, 2)] == [22, 2]
    packed = sum(shape.numel() for shape in shapes.values())
    assert packed > 0.98 * sum(p.numel() for p in model.parameters())


def test_another_family_s_network_is_refused():
    with pytest.raises(ConfigError, match="does not know the network Linear"):
        TASK.blocks(torch.nn.Linear(2, 2), [])


# ---- judgement ------------------------------------------------------------------------------------------------
@given(st.integers(1, 400), st.data())
def test_wilson_matches_scipy(n, data):
    hits = data.draw(st.integers(0, n))
    share, low, high = wilson_interval(hits, n)
    oracle = binomtest(hits, n).proportion_ci(0.95, "wilson")
    assert share == hits / n
    assert (low, high) == pytest.approx((min(oracle.low, share), max(oracle.high, share)), abs=1e-9)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_matched_interval_is_symmetric_and_holds_the_value(pairs):
    one, two = (np.array(column) for column in zip(*pairs, strict=True))
    value, low, high = matched_interval(one, two)
    assert value == pytest.approx(one.mean() - two.mean())
    assert -1.0 <= low <= value <= high <= 1.0 and low < high
    back = matched_interval(two, one)
    assert back == pytest.approx((-value, -high, -low))


def test_matched_interval_covers_the_truth():
    """The parent is right on 95 %, the model on 90 % of images; 95 % intervals must hold 0.05 about 95 times in 100."""
    generator = np.random.default_rng(0)
    both = generator.choice(4, p=[0.88, 0.07, 0.02, 0.03], size=(2000, 150))
    first, second = both <= 1, (both == 0) | (both == 2)
    covered = 0
    for one, two in zip(first, second, strict=True):
        _, low, high = matched_interval(one, two)
        covered += low <= 0.05 <= high
    assert 0.93 < covered / 2000 < 0.985


def test_score_is_right_and_paired(dataset, folder):
    model, parent = TASK.build(1, seed=2).eval(), TASK.load(folder)
    rows = {row.metric: row for row in TASK.score(model, dataset, parent, folder=folder)}
    held_out = read_split(dataset.path, "eval")
    images, labels = torch.from_numpy(held_out.images).reshape(-1, 1, 8, 8), torch.from_numpy(held_out.labels)
    with torch.inference_mode():
        mine, theirs = model(images), parent(images)
    right, best = mine.argmax(-1) == labels, theirs.argmax(-1)
    assert rows["accuracy"].value == pytest.approx(right.float().mean().item())
    drop = (best == labels).float().mean().item() - right.float().mean().item()
    assert rows["accuracy_drop"].value == pytest.approx(drop)
    assert rows["quality_loss"].value == rows["accuracy_drop"].value
    assert rows["top1_agreement"].value == pytest.approx((best == mine.argmax(-1)).float().mean().item())
    assert rows["kl_divergence"].value == pytest.approx(divergences(mine, theirs).mean().item(), rel=1e-4)
    majority = np.bincount(read_split(dataset.path, "train").labels).argmax()
    assert rows["baseline_accuracy"].value == pytest.approx((held_out.labels == majority).mean())
    assert {row.n for row in rows.values()} == {len(held_out)}
    assert len({row.data_hash for row in rows.values()}) == 1 and len(rows["accuracy"].data_hash) == 64
    alone = {row.metric for row in TASK.score(model, dataset, folder=folder)}
    assert alone == {"accuracy", "cross_entropy", "baseline_accuracy", "accuracy_vs_baseline"}
    half = TASK.score(model, dataset, folder=folder, share=0.5)
    assert {row.n for row in half} == {round(len(held_out) / 2)}
    with pytest.raises(ConfigError, match="unknown option 'batchsize'"):
        TASK.chosen({"batchsize": 7})


def test_a_model_against_itself_loses_nothing_but_is_not_certain(dataset, folder):
    model = TASK.load(folder)
    rows = {row.metric: row for row in TASK.score(model, dataset, model, folder=folder)}
    drop = rows["accuracy_drop"]
    assert drop.value == 0.0 and drop.low < 0.0 < drop.high
    assert rows["top1_agreement"].value == 1.0 > rows["top1_agreement"].low
    assert rows["kl_divergence"].high == 0.0


def test_a_damaged_model_scores_worse_and_an_untrained_one_does_not_beat_the_majority(dataset, folder):
    parent = TASK.load(folder)
    rows = {row.metric: row for row in TASK.score(parent, dataset, folder=folder)}
    assert rows["accuracy_vs_baseline"].low <= 0.0
    broken = TASK.load(folder)
    with torch.no_grad():
        broken.head.output.bias[0] += 100.0
    kl = {row.metric: row for row in TASK.score(broken, dataset, parent, folder=folder)}["kl_divergence"]
    assert kl.low > 1.0


def test_nan_weights_give_nan_evidence(dataset, folder):
    model = TASK.load(folder)
    with torch.no_grad():
        model.head.output.bias[0] = float("nan")
    rows = {row.metric: row for row in TASK.score(model, dataset, TASK.load(folder), folder=folder)}
    assert not rows["cross_entropy"].is_number and not rows["kl_divergence"].is_number


def test_the_workload_counts_its_images(folder):
    assert {name: work() for name, work in TASK.workloads(TASK.load(folder), folder).items()} == {
        "examples_per_s": 256.0
    }


@pytest.fixture(scope="module")
def answerer(folder):
    with open_model(folder, "vision", "model", OpenOptions()) as answerer:
        yield answerer


def answer(answerer, request):
    return answerer.answer(answerer.request_model.model_validate(request)).model_dump()


def png(pixels):
    """The bytes of a picture file in base64; `pixels` uint8 [height, width] or [height, width, 3]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_answer(folder, answerer):
    image = next(TASK.rows(DIGITS, "eval"))["image"]
    flat = answer(answerer, {"image": image})
    nested = answer(answerer, {"image": np.reshape(image, (1, 8, 8)).tolist()})
    assert flat == nested and json.loads(json.dumps(flat)) == flat
    assert flat["label"] == int(np.argmax(flat["probabilities"])) and sum(flat["probabilities"]) == pytest.approx(1.0)
    with torch.inference_mode():
        expected = TASK.load(folder)(torch.tensor(image).reshape(1, 1, 8, 8)).softmax(-1)[0]
    assert flat["probabilities"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_picture_file_is_the_pixels_it_holds(answerer):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    numbers = answer(answerer, {"image": (pixels / 255).tolist()})
    grey = answer(answerer, {"image": png(pixels)})
    colour = answer(answerer, {"image": png(np.stack([pixels] * 3, -1))})
    large = answer(answerer, {"image": png(np.kron(pixels, np.ones((4, 4), np.uint8)))})
    for found in (grey, colour):
        assert found["probabilities"] == pytest.approx(numbers["probabilities"], abs=1e-5)
    assert large["probabilities"] == pytest.approx(numbers["probabilities"], abs=0.02)


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"image": [0.5] * 64, "prompt": "x"},
        {"image": [0.5] * 63},
        {"image": "picture"},
        {"image": "aGVsbG8="},
        {"image": png(np.zeros((8, 8), np.uint8))[:40]},
        {"image": [[0.5] * 32, [0.5] * 31]},
        {"image": [2.0] * 64},
        {"image": [float("nan")] * 64},
        {"image": None},
        {"image": {"a": 1}},
    ],
)
def test_wrong_requests_are_refused(answerer, request_):
    with pytest.raises(DataError):
        ask(answerer, request_)


def test_a_dataset_whose_file_was_swapped_is_refused(dataset, folder):
    hostile = replace(dataset, path=dataset.path / "nowhere")
    with pytest.raises(DataError):
        next(TASK.batches(hostile, "train", 4, 0, 0, folder=folder))
