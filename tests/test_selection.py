"""Which files of a folder are its weights: those that transformers takes, and what is left aside."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from checkpoint_samples import change_config, change_tensors
from language_samples import write_causal
from safetensors.torch import load_file, save_file
from test_checkpoints import TASK, answer, logits, pulled, sharded

from gulliver.core.errors import ArtifactError
from gulliver.core.records import Origin
from gulliver.nets.files import stored_tensors, weight_files
from gulliver.nets.selection import INDEX, select


def test_other_files_beside_the_weights_are_left_aside_with_a_sentence(tmp_path, store):
    folder = write_causal(tmp_path / "model")
    plain = answer(folder, store)
    tensors = load_file(folder / "model.safetensors")
    save_file({"tok_embeddings.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.fp16.safetensors")
    save_file({"base_model.lora_A.weight": torch.ones(2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert weight_files(folder) == [folder / "model.safetensors"]
    told = select(folder).told()
    assert all(name in told for name in ("adapter_model", "consolidated", "model.fp16", "left aside"))
    assert answer(folder, store) == plain
    made = pulled(folder, store)
    assert [name for name in made.files if name.endswith(".safetensors")] == ["model.safetensors"]
    assert "adapter_config.json" not in made.files and told in str(Origin.of(made).notes)


def test_an_index_decides_and_must_be_true(tmp_path):
    folder = write_causal(tmp_path)
    places = sharded(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    save_file({"model.norm.weight": torch.ones(32)}, folder / "model-extra.safetensors")
    assert set(stored_tensors(folder)) == set(places) and select(folder).aside == ("model-extra.safetensors",)
    (folder / INDEX).write_text(json.dumps({"weight_map": {**places, "model.absent": places["model.norm.weight"]}}))
    with pytest.raises(ArtifactError, match=r"holds 'model.absent', which it lacks"):
        stored_tensors(folder)
    (folder / places["model.norm.weight"]).unlink()
    with pytest.raises(ArtifactError, match=r"listed in .* but missing"):
        stored_tensors(folder)


def test_an_index_beside_a_whole_file_is_left_aside_as_transformers_does(tmp_path, store):
    folder = write_causal(tmp_path / "model")
    expected = logits(TASK.load(folder))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.absent": "model-00001-of-00002.safetensors"}}))
    assert weight_files(folder) == [folder / "model.safetensors"] and select(folder).aside == (INDEX,)
    assert f"left aside: {INDEX}" in select(folder).told()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(logits(TASK.load(folder)), expected) and torch.equal(logits(theirs), expected)
    made = pulled(folder, store)
    assert INDEX not in made.files and INDEX in str(Origin.of(made).notes)


def test_a_whole_file_decides_even_where_the_index_lists_more(tmp_path, store):
    folder = write_causal(tmp_path / "model", "llama-untied")
    table = load_file(folder / "model.safetensors")["lm_head.weight"]
    change_tensors(folder, {"lm_head.weight": None})
    save_file({"lm_head.weight": table}, folder / "head.safetensors", metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "head.safetensors"}}))
    with pytest.raises(ArtifactError, match=r"no usable weights for lm_head\.weight"):
        pulled(folder, store)


def test_a_file_that_the_config_names_comes_first(tmp_path, store):
    folder = write_causal(tmp_path / "model")
    expected = logits(TASK.load(folder))
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    change_tensors(folder, {"model.norm.weight": torch.zeros(32)})
    change_config(folder, transformers_weights="other.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    made = pulled(folder, store)
    assert torch.equal(logits(TASK.load(made.path)), expected) and torch.equal(logits(theirs), expected)
    assert "transformers_weights" not in json.loads(made.file("config.json").read_text())
    for name in ("absent.safetensors", "../other.safetensors", "config.json", 3):
        change_config(folder, transformers_weights=name)
        with pytest.raises(ArtifactError, match="remove the key"):
            select(folder)


@pytest.mark.parametrize("names", [("model-00001-of-00002", "model-00002-of-00002"), ("one", "two")])
def test_files_of_other_names_are_taken_where_nothing_else_can_be_meant(tmp_path, store, names):
    folder = write_causal(tmp_path / "model", "gpt_neox")
    expected = answer(folder, store, "reference")
    sharded(folder, names)
    assert not select(folder).usual and names[0] in select(folder).told()
    assert answer(folder, store, "reference") == expected
    assert "model.safetensors" in pulled(folder, store).files


def test_one_file_of_another_name_is_taken(tmp_path, store):
    folder = write_causal(tmp_path / "model")
    expected = answer(folder, store)
    (folder / "model.safetensors").rename(folder / "pytorch_model.safetensors")
    assert answer(folder, store) == expected and "model.safetensors" in pulled(folder, store).files
