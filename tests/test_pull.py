"""The step `pull`: whole, checked models become artifacts; everything else is refused with its remedy."""

from __future__ import annotations

import json

import pytest
import torch
from language_samples import write_causal, write_encoder
from safetensors.torch import load_file, save_file
from test_gguf import write_gguf

from gulliver.core import catalog
from gulliver.core.context import Context
from gulliver.core.errors import ArtifactError, ConfigError, DataError
from gulliver.core.records import Origin
from gulliver.core.store.artifact import verify
from gulliver.data.options import PullOptions
from gulliver.data.pull import run
from gulliver.tasks import get_task


@pytest.fixture
def ctx(store, quiet):
    return Context(store=store, progress=quiet, work=store.work("0" * 64), step="pull")


def fetch(ctx, source, **options):
    return run(PullOptions(source=str(source), **options), {}, ctx)


def test_a_folder_is_copied_and_checked(tmp_path, ctx):
    folder = write_causal(tmp_path / "model")
    (folder / "README.md").write_text("not part of a model")
    made = fetch(ctx, folder)
    verify(made)
    assert (made.kind, made.task) == ("model", "language")
    assert made.file("model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert made.file("model.safetensors").stat().st_ino != (folder / "model.safetensors").stat().st_ino
    assert {"config.json", "tokenizer.json", "origin.json"} <= set(made.files) and "README.md" not in made.files
    assert str(tmp_path) not in json.dumps(made.manifest)
    other = write_causal(tmp_path / "elsewhere" / "model")
    assert fetch(ctx, other).id == made.id
    get_task("language").load(made.path)


def test_an_encoder_keeps_its_pooling_files(tmp_path, ctx):
    folder = write_encoder(tmp_path / "model")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    assert {"modules.json", "1_Pooling/config.json", "vocab.txt"} - set(fetch(ctx, folder).files) <= {"vocab.txt"}


def test_shards_stay_shards(tmp_path, ctx):
    folder = write_causal(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:4], names[4:]), 1):
        file = f"model-{number}-of-2.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    made = fetch(ctx, folder)
    assert sum(name.endswith(".safetensors") for name in made.files) == 2
    loaded = get_task("language").load(made.path)
    assert torch.equal(loaded.get_parameter(names[0]), tensors[names[0]])


def test_names_of_other_checkpoints_become_the_networks_own(tmp_path, ctx):
    folder = write_causal(tmp_path / "model", "gpt_neox")
    assert "embed_out.weight" in load_file(folder / "model.safetensors")
    made = fetch(ctx, folder)
    names = {name for name, _ in get_task("language").load(folder, empty=True).named_parameters()}
    assert set(load_file(made.file("model.safetensors"))) == names
    assert "tokenizer.json" in made.files


def test_a_gguf_file_is_converted(tmp_path, ctx):
    folder = write_causal(tmp_path / "source")
    made = fetch(ctx, write_gguf(tmp_path / "model.gguf", folder))
    verify(made)
    before, after = load_file(folder / "model.safetensors"), load_file(made.file("model.safetensors"))
    assert all(torch.equal(after[name], before[name]) for name in before)
    weights = sum(before[name].numel() for name in before)
    assert Origin.of(made) == Origin(
        source="model.gguf",
        original_file="model.gguf",
        original_format="GGUF F32",
        original_bytes=(tmp_path / "model.gguf").stat().st_size,
        bfloat16_bytes=2 * weights,
    )


def test_a_catalog_dataset_becomes_a_dataset(ctx):
    made = fetch(ctx, "catalog:digits")
    assert (made.kind, made.task, made.step["name"]) == ("dataset", "vision", "pull")


def test_another_familys_model_is_recognized(tmp_path, ctx):
    task = get_task("vision")
    task.save(task.build(1), tmp_path)
    assert fetch(ctx, tmp_path).task == "vision"


def test_the_hub_is_asked_for_safe_files_only(tmp_path, ctx, monkeypatch):
    import huggingface_hub

    folder = write_causal(tmp_path / "snapshots" / "abc123")
    asked = {}

    def snapshot(repository, **options):
        asked.update(options, repository=repository)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    made = fetch(ctx, "hf:org/name@main")
    assert (asked["repository"], asked["revision"]) == ("org/name", "main")
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])
    origin = Origin.of(made)
    assert (origin.source, origin.revision) == ("hf:org/name@main", "abc123")

    def fail(repository, **options):
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DataError, match="no route"):
        fetch(ctx, "hf:org/name")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="ORG/NAME"):
        fetch(ctx, "hf:a/b/c")


def poison(folder, name, tensor):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.norm.weight"
BAD = {
    "nan": (lambda folder: poison(folder, NORM, torch.full((32,), float("nan"))), "not finite"),
    "shape": (lambda folder: poison(folder, NORM, torch.ones(31)), "different models"),
    "dtype": (lambda folder: poison(folder, NORM, torch.ones(32, dtype=torch.float64)), "float64"),
    "truncated": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "damaged",
    ),
    "pickle": (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "convert it"),
    "nothing": (lambda folder: (folder / "model.safetensors").unlink(), "no \\*.safetensors"),
    "config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "json": (lambda folder: (folder / "config.json").write_text("{"), "JSON"),
    "quantized": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "llama", "quantization_config": {}}'),
        "quantized already",
    ),
    "packed": (lambda folder: (folder / "packing.json").write_text("{}"), "quantized already"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_model_that_cannot_be_used_is_refused_and_nothing_is_left(name, tmp_path, ctx):
    change, told = BAD[name]
    folder = write_causal(tmp_path / "model")
    change(folder)
    with pytest.raises(ArtifactError, match=told):
        fetch(ctx, folder)
    assert list(ctx.store.artifacts_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "told"), [("absent", "does not exist"), ("catalog:smollm", "smollm2"), ("text.txt", "not a GGUF")]
)
def test_an_unknown_source_is_named(tmp_path, ctx, source, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(ConfigError, match=told):
        fetch(ctx, source)


def test_the_catalog_is_asked_for_models(tmp_path, ctx, monkeypatch):
    folder = write_causal(tmp_path / "model")
    monkeypatch.setattr(catalog, "fetch", lambda name, cache: folder)
    made = fetch(ctx, "catalog:all-minilm-l6-v2")
    origin = Origin.of(made)
    assert (origin.source, origin.license) == ("catalog:all-minilm-l6-v2", "Apache-2.0")
    size = (folder / "model.safetensors").stat().st_size
    assert (origin.original_file, origin.original_format) == ("model.safetensors", "safetensors float32")
    assert origin.original_bytes == size and size * 0.4 < (origin.bfloat16_bytes or 0) <= size / 2
