"""Tensor types of GGUF files: values to the last bit, packed where tiles hold them, with their own precision else."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, dequantize, quantize
from gguf_files import CASES, network, stored_tensors, write_file
from gguf_samples import NETWORKS, TEXT, exported, model_folder, sentence_piece
from safetensors.torch import load_file

from gulliver.core.progress import Progress
from gulliver.core.store.store import Store
from gulliver.pipeline.call import call
from gulliver.runtime.packed import unpack
from gulliver.runtime.packing import read_packing
from gulliver.runtime.reference import read_tensors
from gulliver.tasks import get_task
from gulliver.tasks.language.gguf.decode import decode
from gulliver.tasks.language.gguf.header import TYPES, TensorInfo
from gulliver.tasks.language.gguf.kept import format_of, holds, keep
from gulliver.tasks.language.gguf.read import convert_gguf
from gulliver.tasks.text.tokenizer import load_tokenizer

KEPT = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
OTHERS = [Type.F32, Type.F16, Type.BF16]


def info(path, number, blocks, shape):
    """A tensor of a file that holds nothing else."""
    path.write_bytes(blocks.tobytes())
    return TensorInfo("weight", TYPES[number], shape, path, 0, blocks.nbytes)


@pytest.mark.parametrize("kind", KEPT, ids=lambda kind: kind.name)
def test_blocks_that_tiles_hold_stay_packed_to_the_last_bit(tmp_path, kind):
    model, folder = network(CASES["llama"]), tmp_path / "folder"
    folder.mkdir()
    file = write_file(tmp_path / "model.gguf", model, CASES["llama"], kind)
    convert_gguf(file, folder)
    name = "model.layers.0.mlp.up_proj.weight"
    assert name in read_packing(folder) and "model.layers.1.self_attn.q_proj.weight" in read_packing(folder)
    values = dict(read_tensors(folder))[name].numpy()
    stored = next(one for one in GGUFReader(file).tensors if one.name == "blk.0.ffn_up.weight")
    assert np.array_equal(values, dequantize(stored.data, kind))


@pytest.mark.parametrize("experts", [3, 4, 16])
@pytest.mark.parametrize("name", ["mixtral", "qwen2 moe", "lfm 2 moe"])
def test_experts_stay_packed_whatever_their_number(tmp_path, name, experts):
    many = {"num_experts": experts, "num_local_experts": experts}
    case = replace(CASES[name], options={**CASES[name].options, **many})
    folder = tmp_path / "folder"
    folder.mkdir()
    file = write_file(tmp_path / "model.gguf", network(case), case, Type.Q4_0)
    convert_gguf(file, folder)
    packed, values = read_packing(folder), dict(read_tensors(folder))
    stacks = [one for one in values if one.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    stored = {one.name: dequantize(one.data, one.tensor_type) for one in GGUFReader(file).tensors}
    assert stacks
    for one in stacks:
        prefix = f"blk.{one.split('.')[2]}.ffn_"
        parts = ("down",) if "down" in one else ("gate", "up")
        wanted = np.concatenate([stored[f"{prefix}{part}_exps.weight"] for part in parts], axis=1)
        assert packed[one].inputs == 2 and np.array_equal(values[one].numpy(), wanted)
        tiles = load_file(folder / "model.safetensors")[f"{one}.tiles.0"]
        assert tiles.numel() < values[one].numel() * 5.5 / 8  # 4.5 bits, and a factor for each row of few columns
    found, tokens = get_task("language").load(folder), torch.arange(24)[None]
    with torch.no_grad():
        assert found(input_ids=tokens, use_cache=False).logits.isfinite().all()


def test_a_matrix_of_few_rows_does_not_grow(tmp_path):
    """The router of three experts: a tile of sixteen rows at 8 bits would take more than three at 16."""
    case = replace(CASES["mixtral"], options={**CASES["mixtral"].options, "num_local_experts": 3})
    folder = tmp_path / "folder"
    folder.mkdir()
    convert_gguf(write_file(tmp_path / "model.gguf", network(case), case, Type.Q8_0), folder)
    stored = load_file(folder / "model.safetensors")
    routers = [name for name in stored if name.endswith("mlp.gate.weight")]
    assert routers and all(stored[name].dtype == torch.bfloat16 for name in routers)


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        ((Type.Q8_0, Type.Q8_0), r"output\.weight \(Q8_0\) is nearly token_embd\.weight \(Q8_0\), "),
        ((Type.Q8_0, Type.Q4_0), r"output\.weight \(Q8_0\) is a finer copy of token_embd\.weight \(Q4_0\), "),
    ],
)
def test_a_head_that_is_nearly_the_embedding_is_told_of_as_it_is(tmp_path, kinds, told):
    model = network(CASES["qwen2"])
    table = model.get_input_embeddings().weight
    model.lm_head.weight.data = table.data * (1 + 0.01 * torch.randn(table.shape))
    types = {"output.weight": kinds[0], "token_embd.weight": kinds[1]}
    file = write_file(tmp_path / "model.gguf", model, CASES["qwen2"], lambda name, _: types.get(name, Type.F32))
    (tmp_path / "folder").mkdir()
    assert re.match(told, convert_gguf(file, tmp_path / "folder").note)


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.name)
def test_plain_types_keep_their_precision(tmp_path, kind):
    model, folder = network(CASES["qwen2"]), tmp_path / "folder"
    folder.mkdir()
    convert_gguf(write_file(tmp_path / "model.gguf", model, CASES["qwen2"], kind), folder)
    dtype = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}[kind]
    name = "model.layers.0.mlp.up_proj.weight"
    found = load_file(folder / "model.safetensors")[name]
    assert found.dtype == dtype and torch.equal(found, model.get_parameter(name).to(dtype))


@pytest.mark.parametrize("number", sorted(number for number, kind in TYPES.items() if kind.readable))
def test_every_type_is_decoded(tmp_path, number):
    kind = TYPES[number]
    random = np.random.default_rng(number)
    blocks = random.integers(0, 256, (6 * 256 // kind.block, kind.size_bytes), dtype=np.uint8)
    half = random.standard_normal(len(blocks)).astype(np.float16).view(np.uint8).reshape(-1, 2)
    plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
    if kind.name in plain:
        blocks = random.standard_normal(6 * 256).astype(plain[kind.name]).view(np.uint8).reshape(len(blocks), -1)
    elif kind.name not in ("MXFP4", "NVFP4", "BF16") and kind.block > 1:
        for at in (0, 2, kind.size_bytes - 2, kind.size_bytes - 4):
            blocks[:, at : at + 2] = half
    elif kind.name == "BF16":
        blocks = (random.standard_normal(6 * 256).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        blocks = blocks.view(np.uint8).reshape(-1, 2)
    elif kind.name == "MXFP4":
        blocks[:, 0] = 120
    elif kind.name == "NVFP4":
        blocks[:, :4] = 56
    found = decode(info(tmp_path / "weight", number, blocks, (6, 256)), torch.float32)
    if number in (41, 42):
        levels = [
            [(byte >> at & 1) * 2 - 1 for byte in row for at in range(8)]
            if number == 41
            else [(byte >> at & 3) - 1 for byte in row for at in (0, 2, 4, 6)]
            for row in blocks[:, 2:].tolist()
        ]
        wanted = np.array(levels, np.float32) * np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    elif kind.name.startswith("I") and kind.block == 1:
        return
    elif kind.name == "F64":
        wanted = np.ascontiguousarray(blocks).view(np.float64).astype(np.float32)
    else:
        wanted = dequantize(blocks.reshape(6, -1), Type(number))
    assert np.array_equal(found.numpy(), wanted.reshape(6, 256))


@pytest.mark.parametrize("number", [2, 3, 6, 7, 8, 34, 35, 41, 42])
def test_kept_blocks_are_the_values_that_decoding_gives(tmp_path, number):
    kind, random = TYPES[number], np.random.default_rng(number)
    values = random.standard_normal((20, 256)).astype(np.float32)
    if number in (41, 42):
        blocks = random.integers(0, 256, (20 * 256 // kind.block, kind.size_bytes), dtype=np.uint8)
        blocks[:, :2] = random.standard_normal(len(blocks)).astype(np.float16).view(np.uint8).reshape(-1, 2)
        if number == 42:  # the code 3, a level of 2, is not a ternary model's
            blocks[:, 2:] &= ~(blocks[:, 2:] >> 1 & 0x55)
    else:
        blocks = quantize(values, Type(number)).reshape(-1, kind.size_bytes)
    wanted = decode(info(tmp_path / "weight", number, blocks, (20, 256)), torch.float32)
    fmt = format_of(kind)
    assert fmt is not None and holds(kind, blocks)
    tiles = keep(kind, blocks.reshape(20, -1), 256)
    assert torch.equal(unpack(tiles, fmt, 20, 256, None).dequantize(), wanted)


def test_a_ternary_block_with_a_level_of_two_is_not_kept():
    blocks = np.full((4, 18), 255, np.uint8)
    assert not holds(TYPES[42], blocks)


@pytest.mark.parametrize("kind", KEPT, ids=lambda kind: kind.name)
def test_what_was_kept_is_exported_as_it_came(tmp_path, kind):
    model = network(CASES["llama"])
    file = write_file(tmp_path / "model.gguf", model, CASES["llama"], kind)
    store = Store(tmp_path / "home")
    pulled = call("pull", {"source": str(file)}, {}, store=store, progress=Progress(quiet=True))
    back = exported(store, pulled)
    before, after = ({one.name: one for one in GGUFReader(path).tensors} for path in (file, back.file("model.gguf")))
    assert set(before) == set(after)
    for name, one in before.items():
        assert one.tensor_type == after[name].tensor_type, name
        assert np.array_equal(*(dequantize(two.data, two.tensor_type) for two in (one, after[name]))), name
    again = call("pull", {"source": str(back.file("model.gguf"))}, {}, store=store, progress=Progress(quiet=True))
    assert again.files["model.safetensors"] == pulled.files["model.safetensors"]


def test_every_stored_tensor_has_a_name_of_its_own():
    names = [name for name, _ in stored_tensors(network(CASES["lfm 2 moe"]), CASES["lfm 2 moe"])]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", NETWORKS)
def test_what_we_export_can_be_pulled_again(tmp_path, name):
    model_type, options = NETWORKS[name]
    tokenizer = sentence_piece() if model_type == "gemma3_text" else None
    source = model_folder(tmp_path / "source", model_type, tokenizer, **options)
    store = Store(tmp_path / "home")
    file = exported(store, source).file("model.gguf")
    again = call("pull", {"source": str(file)}, {}, store=store, progress=Progress(quiet=True))
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        wanted, got = (get_task("language").load(one)(input_ids=tokens).logits for one in (source, again.path))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    before, after = load_tokenizer(source), load_tokenizer(again.path)
    assert after(TEXT)["input_ids"] == before(TEXT)["input_ids"]
