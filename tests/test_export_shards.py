"""Weight files are laid out for who maps them: matrices in the order of use, each at a multiple of 64 bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compress_samples import Lab
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_decoders import random_packed
from torch import Tensor

from gulliver.core.errors import ArtifactError
from gulliver.nets.files import ITEM_BYTES, Stored, stored_tensors
from gulliver.nets.weights import CODES
from gulliver.runtime.formats import ALIGNMENT
from gulliver.runtime.packing import order_of_use
from gulliver.runtime.reference import stored_form
from gulliver.runtime.shards import ShardWriter, write_file, write_tensors

IN_ORDER = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{name}"
        for layer in (0, 1, 2, 10)
        for name in (
            "input_layernorm.weight",
            "self_attn.q_proj.weight",
            "self_attn.k_proj.weight",
            "self_attn.v_proj.weight",
            "self_attn.o_proj.weight",
            "post_attention_layernorm.weight",
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
            "mlp.down_proj.weight",
        )
    ),
    "model.norm.weight",
    "lm_head.weight",
]


def in_file(folder: Path) -> dict[Path, list[tuple[str, Stored]]]:
    """Of each weight file its tensors, from front to back."""
    files: dict[Path, list[tuple[str, Stored]]] = {}
    for name, stored in sorted(stored_tensors(folder).items(), key=lambda row: (row[1].offset, row[1].length)):
        files.setdefault(stored.path, []).append((name, stored))
    return files


def assert_laid_out(folder: Path) -> None:
    """In every file matrices of whole cache lines come first, aligned and in the order of use; no number is split."""
    tiles: list[str] = []
    for _, rows in sorted(in_file(folder).items()):
        lines = [name for name, at in rows if len(at.shape) > 1 and at.length % ALIGNMENT == 0]
        assert [name for name, _ in rows][: len(lines)] == lines == sorted(lines, key=order_of_use)
        assert all(at.offset % (ALIGNMENT if name in lines else ITEM_BYTES[at.dtype]) == 0 for name, at in rows)
        tiles += [name for name, _ in rows if ".tiles." in name]
        assert set(lines) >= {name for name, _ in rows if ".tiles." in name}
    assert tiles and tiles == sorted(tiles, key=order_of_use)


def test_the_order_of_use_is_a_decoders() -> None:
    assert sorted(sorted(IN_ORDER), key=order_of_use) == IN_ORDER
    assert sorted(IN_ORDER) != IN_ORDER


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_every_tiles_tensor_is_aligned_and_in_order(tmp_path: Path, shard_bytes: int) -> None:
    with ShardWriter(tmp_path, shard_bytes) as shards:
        for number, name in enumerate(IN_ORDER):
            if "norm" in name:
                shards.add({name: torch.ones(33, dtype=torch.float16)})
            else:
                formats = ["c6g32", "u4g64", "c5g32"] if "embed" in name else ["u4g64" if number % 2 else "c3g32"]
                shards.add(stored_form(name, random_packed(40, 70, formats, number)))
    assert (len(in_file(tmp_path)) > 1) == (shard_bytes < 10**9)
    assert_laid_out(tmp_path)


def test_one_file_is_sorted_whatever_order_tensors_come_in(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as shards:
        for name in sorted(IN_ORDER, reverse=True):
            shards.add(
                {name: torch.ones(5)} if "norm" in name else stored_form(name, random_packed(16, 32, ["u4g32"], 1))
            )
    assert_laid_out(tmp_path)
    (rows,) = in_file(tmp_path).values()
    names = [name.removesuffix(".tiles.0") for name, _ in rows]
    assert names == [name for name in IN_ORDER if "norm" not in name] + [name for name in IN_ORDER if "norm" in name]


def test_what_quantize_and_distill_write_is_laid_out(language: Lab) -> None:
    packed = language.quantize(bits=4)
    distilled = language.step(
        "distill",
        {"steps": 1, "batch_size": 1, "tokens": 8},
        model=packed,
        parent=language.model,
        dataset=language.dataset,
    )
    for model in (packed, distilled):
        assert_laid_out(model.path)


@given(
    st.lists(st.tuples(st.sampled_from(sorted(CODES.values())), st.lists(st.integers(0, 9), max_size=3)), max_size=9)
)
def test_any_tensors_are_read_back_by_safetensors(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    types = {code: dtype for dtype, code in CODES.items()}
    tensors: dict[str, Tensor] = {}
    for number, (code, shape) in enumerate(rows):
        count = torch.Size(shape).numel()
        numbers = torch.arange(count * types[code].itemsize, dtype=torch.int64) % (2 if code == "BOOL" else 50)
        tensors[f"tensor.{number}"] = numbers.to(torch.uint8).view(types[code]).reshape(shape)
    write_file(path, tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_file_written_tensor_by_tensor_opens_elsewhere(tmp_path: Path) -> None:
    tensors = {"b.c": torch.randn(3, 5), "a": torch.randn(4), "scalar": torch.tensor(2.0)}
    rows = {name: (torch.bfloat16, tensor.shape) for name, tensor in tensors.items()}
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as stream:
        write_tensors(stream, rows, reversed(tensors.items()))
    found = load_file(path)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name].to(torch.bfloat16)) for name in tensors)
    for wrong in ([("a", tensors["a"])] * 2, [("c", tensors["a"])], [("a", tensors["b.c"])]):
        with open(path, "wb") as stream, pytest.raises(ArtifactError, match="unexpected or duplicate tensor"):
            write_tensors(stream, rows, wrong)
    with open(path, "wb") as stream, pytest.raises(AssertionError, match=r"no data came for b\.c"):
        write_tensors(stream, rows, [("a", tensors["a"]), ("scalar", tensors["scalar"])])
