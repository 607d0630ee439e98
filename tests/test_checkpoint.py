from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from gulliver.core.errors import ArtifactError
from gulliver.learning.checkpoint import open_checkpoint, save_checkpoint
from gulliver.runtime import shards


def _tensors():
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 5),
        "transposed": torch.randn(4, 3).t(),
        "half": torch.randn(7).to(torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "count": torch.tensor(2**40),
    }


def test_round_trip_keeps_every_bit_and_the_scalars(tmp_path):
    path, tensors = tmp_path / "deep" / "loop.safetensors", _tensors()
    save_checkpoint(path, tensors, {"losses": [0.1, 1e-300], "name": "é"})
    found = open_checkpoint(path)
    assert found.meta == {"losses": [0.1, 1e-300], "name": "é"}
    read = {name: tensor.clone() for name, tensor in found.tensors()}
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    assert os.listdir(path.parent) == [path.name]


def test_the_file_is_plain_safetensors(tmp_path):
    path, tensors = tmp_path / "x.safetensors", _tensors()
    save_checkpoint(path, tensors, {})
    read = load_file(path)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_no_file_is_no_checkpoint(tmp_path):
    assert open_checkpoint(tmp_path / "none") is None


def test_nan_and_unknown_types_are_refused_and_leave_nothing(tmp_path):
    with pytest.raises(ValueError):
        save_checkpoint(tmp_path / "x", {}, {"loss": float("nan")})
    with pytest.raises(TypeError, match="complex"):
        save_checkpoint(tmp_path / "x", {"c": torch.zeros(2, dtype=torch.complex64)}, {})
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x"
    save_checkpoint(path, {"a": torch.ones(2)}, {"step": 1})

    def full(tensor):
        raise OSError("No space left on device")

    monkeypatch.setattr(shards, "bytes_of", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, {"a": torch.zeros(2)}, {"step": 2})
    found = open_checkpoint(path)
    assert found.meta == {"step": 1} and os.listdir(tmp_path) == ["x"]
    assert [tensor.tolist() for _, tensor in found.tensors()] == [[1.0, 1.0]]


def test_hostile_files_are_refused(tmp_path):
    path = tmp_path / "x"
    save_checkpoint(path, {"a": torch.ones(64)}, {"step": 1})
    whole = path.read_bytes()
    save_file({"a": torch.ones(2)}, tmp_path / "foreign")
    hostile = [
        b"",
        whole[:-1],
        whole + b"x",
        b"\xff" * 64,
        (tmp_path / "foreign").read_bytes(),
        _with_meta("not json"),
        _with_meta(json.dumps([1])),
        _with_meta(json.dumps({"format": 2, "meta": {}})),
        _with_meta(json.dumps({"format": 1, "meta": []})),
    ]
    for content in hostile:
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="delete it"):
            open_checkpoint(path)


def _with_meta(text):
    head = json.dumps({"__metadata__": {"gulliver.checkpoint": text}}).encode()
    return struct.pack("<Q", len(head)) + head
