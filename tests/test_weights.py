"""Networks without weights, one tensor at a time, and files written one tensor at a time."""

from __future__ import annotations

import json

import pytest
import torch
from language_samples import write_causal
from safetensors.torch import save_file
from torch import nn

from gulliver.core.errors import ArtifactError
from gulliver.nets import weights
from gulliver.tasks import get_task


def tied():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def test_an_empty_network_has_real_buffers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    with weights.empty_parameters():
        model = Net()
    assert weights.unfilled(model) == ["linear.weight", "linear.bias"]
    assert model.table.tolist() == [0, 1, 2]
    assert not Net().linear.weight.is_meta


def test_tied_parameters_stay_tied_through_release_and_assign():
    model = tied()
    assert weights.aliases(model)["embed.weight"] == ("embed.weight", "head.weight")
    weights.release(model, ["embed."])
    assert weights.unfilled(model) == ["embed.weight"]
    assert model["head"].weight.is_meta and not model["body"].weight.is_meta
    assert weights.assign(model, [("head.weight", torch.ones(7, 4, dtype=torch.float16))]) == {"embed.weight"}
    assert model["head"].weight is model["embed"].weight
    assert model["embed"].weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("tensor", "told"),
    [(("nose.weight", torch.ones(1)), "unexpected tensor"), (("body.weight", torch.ones(4, 5)), "different models")],
)
def test_what_does_not_fit_is_refused(tensor, told):
    with pytest.raises(ArtifactError, match=told):
        weights.assign(tied(), [tensor])


def test_shards_are_read_through_their_index(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / "two.safetensors")
    save_file({"c": torch.zeros(3)}, tmp_path / "unlisted.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    found = dict(weights.read_safetensors(tmp_path, torch.float32))
    assert {name: tensor.dtype for name, tensor in found.items()} == {"a": torch.float32, "b": torch.float32}


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"a": 3}}', "outside its folder"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "missing"),
        ("{", "not a safetensors index"),
        ("[]", "not a safetensors index"),
    ],
)
def test_a_hostile_index_is_refused(tmp_path, index, told):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ArtifactError, match=told):
        list(weights.read_safetensors(tmp_path))


def test_damaged_and_repeated_tensors_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"no \*.safetensors"):
        list(weights.read_safetensors(tmp_path))
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(ArtifactError, match="duplicate tensor"):
        list(weights.read_safetensors(tmp_path))
    (tmp_path / "two.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes()[:-3])
    with pytest.raises(ArtifactError, match="damaged"):
        list(weights.read_safetensors(tmp_path))


def test_a_loaded_network_equals_what_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = write_causal(tmp_path)
    ours, theirs = get_task("language").load(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(ours.get_parameter(name), tensor) for name, tensor in theirs.named_parameters())
