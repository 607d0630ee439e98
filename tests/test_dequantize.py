"""Weights that other tools quantized: read as those tools read them, by their own code or by the obvious loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_export import llama, opened, pack_model, reference_model, written
from torch import Tensor

from gulliver.core.errors import ArtifactError
from gulliver.nets.dequantize import read, recipes, unpack_bits
from gulliver.nets.files import stored_tensors
from gulliver.nets.kinds import Quantization, quantization
from gulliver.tasks.text.plain import write_plain

ROWS, COLUMNS = 48, 96


def plain(folder: Path, tensors: dict[str, Tensor], scheme: Quantization, dtype: torch.dtype = torch.float32) -> Any:
    """The tensors of a folder that holds `tensors`, as they are loaded."""
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    stored = stored_tensors(folder)
    plan = recipes(stored, scheme)
    return {name: read(recipe, stored, scheme, dtype) for name, recipe in plan.items()}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- FP8 ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rows", "columns"), [(256, 128), (200, 300), (64, 64)])
def test_fp8_blocks_have_a_scale_each(rows: int, columns: int, tmp_path: Path) -> None:
    codes = (random(rows, columns) * 20).to(torch.float8_e4m3fn)
    scale = random(-(-rows // 128), -(-columns // 128), seed=1).abs() + 0.1
    expected = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            expected[row, column] = codes[row, column].float() * scale[row // 128, column // 128]
    scheme = Quantization("fp8", {"weight_block_size": [128, 128]})
    tensors = {
        "a.weight": codes,
        "a.weight_scale_inv": scale,
        "a.activation_scale": torch.ones(1),
        "n.weight": scale[0],
    }
    found = plain(tmp_path, tensors, scheme)
    assert set(found) == {"a.weight", "n.weight"}
    assert torch.equal(found["a.weight"], expected) and torch.equal(found["n.weight"], scale[0])
    rounded = plain(tmp_path, tensors, scheme, torch.bfloat16)
    assert torch.equal(rounded["a.weight"], expected.to(torch.bfloat16)) and rounded["n.weight"].dtype == torch.float32


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (ROWS, 1), (ROWS,)])
def test_fp8_with_one_scale_or_one_a_row(shape: tuple[int, ...], tmp_path: Path) -> None:
    codes = (random(ROWS, COLUMNS) * 20).to(torch.float8_e4m3fn)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.1
    expected = codes.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(()))
    for method in ("fbgemm_fp8", "modelopt", "compressed-tensors"):
        found = plain(tmp_path, {"a.weight": codes, "a.weight_scale": scale}, Quantization(method, {}))
        assert torch.equal(found["a.weight"], expected), method


def test_experts_in_one_fp8_tensor(tmp_path: Path) -> None:
    codes = (random(3, 256, 128) * 20).to(torch.float8_e4m3fn)
    scale = random(3, 2, 1, seed=1).abs()
    found = plain(
        tmp_path,
        {"mlp.experts.gate_up_proj": codes, "mlp.experts.gate_up_proj_scale_inv": scale},
        Quantization("fp8", {"weight_block_size": [128, 128]}),
    )
    expected = codes.float() * scale.repeat_interleave(128, 1)
    assert list(found) == ["mlp.experts.gate_up_proj"] and torch.equal(found["mlp.experts.gate_up_proj"], expected)


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    codes = (random(ROWS, 128) * 20).to(torch.float8_e4m3fn)
    scale = torch.full((1, 1), 2.0**-7).to(torch.float8_e8m0fnu)
    found = plain(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scale}, Quantization("fp8", {}))
    assert torch.equal(found["a.weight"], codes.float() / 128)


# ---- compressed-tensors: its own code is the oracle -----------------------------------------------------------------
CASES: dict[str, dict[str, Any]] = {
    **{
        f"{bits} bits, {strategy}, {'symmetric' if symmetric else 'zero points'}": {
            "format": "pack-quantized",
            "weights": {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
            | ({"group_size": 32} if strategy == "group" else {}),
        }
        for bits in (2, 3, 4, 8)
        for strategy in ("group", "channel")
        for symmetric in (True, False)
    },
    "bytes, channel": {
        "format": "int-quantized",
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    },
    "bytes, group, zero points": {
        "format": "int-quantized",
        "weights": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32},
    },
    "float8, tensor": {
        "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"},
    },
    "float8, channel": {
        "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
    },
    "float8, block": {
        "format": "float-quantized",
        "weights": {
            **{"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [16, 32]},
        },
    },
}


@pytest.mark.parametrize("scale_type", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_compressed_tensors_as_its_own_code_reads_it(name: str, scale_type: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    case = CASES[name]
    args = QuantizationArgs.model_validate(case["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(case["format"])
    shape = {
        "group": (ROWS, COLUMNS // 32),
        "channel": (ROWS, 1),
        "tensor": (1,),
        "block": (ROWS // 16, COLUMNS // 32),
    }[case["weights"]["strategy"]]
    weight = random(ROWS, COLUMNS) * 0.05
    levels = 2 ** case["weights"]["num_bits"] if case["weights"]["type"] == "int" else 448 * 2
    scale = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5) * 0.3 / levels
    state = {"weight": weight, "weight_scale": scale.to(scale_type)}
    if not case["weights"]["symmetric"]:
        high = levels // 4
        zeros = torch.randint(-high, high, shape, generator=torch.Generator().manual_seed(2))
        state["weight_zero_point"] = zeros.to(torch.int8)
    small = compressor.compress(dict(state), scheme)
    expected = compressor.decompress(dict(small), scheme)["weight"]
    settings = {
        "format": case["format"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": case["weights"]}},
    }
    config = {"quantization_config": {"quant_method": "compressed-tensors", **settings}}
    read_as = quantization(tmp_path, config)
    assert read_as is not None
    found = plain(tmp_path, {f"a.b.{leaf}": tensor for leaf, tensor in small.items()}, read_as)
    assert set(found) == {"a.b.weight"} and found["a.b.weight"].dtype == expected.dtype
    assert torch.equal(found["a.b.weight"], expected)


def test_columns_in_another_order_of_groups(tmp_path: Path) -> None:
    """Strategy "group" with activation order: the group of each column is stored."""
    codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1)) // 32
    scale = random(ROWS, COLUMNS // 32).abs()
    tensors = {
        "a.weight_packed": (codes.reshape(ROWS, -1, 8).long() << (4 * torch.arange(8))).sum(-1).to(torch.int32),
        "a.weight_scale": scale,
        "a.weight_g_idx": order.to(torch.int32),
        "a.weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    scheme = Quantization(
        "compressed-tensors", {"config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 32}}}}
    )
    assert torch.equal(plain(tmp_path, tensors, scheme)["a.weight"], (codes.float() - 8) * scale[:, order])


@pytest.mark.parametrize("tied", [True, False])
def test_what_we_export_is_read_back_exactly(tied: bool, tmp_path: Path) -> None:
    network = llama(tied)
    formats = ("u4g32",) if tied else ("u4g32", "u6g32")
    names = [name for name, parameter in network.named_parameters() if parameter.dim() == 2]
    weights = [name for name in names if tied or "embed" not in name]
    choose = {name: (formats[index % len(formats)],) for index, name in enumerate(weights)}
    tensors = pack_model(network, choose)
    folder = written(tmp_path / "exported", network, tensors)
    (tmp_path / "plain").mkdir()
    write_plain(folder, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    ours, expected = opened(tmp_path / "plain"), reference_model(network, tensors)
    for name, parameter in expected.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter), name


# ---- GPTQ and AWQ: the obvious loop ---------------------------------------------------------------------------------
def words(values: Tensor, bits: int) -> Tensor:
    """Unsigned integers [rows, columns] packed along each row, value i at bit i · bits, one bit at a time."""
    packed = [[0] * (values.shape[1] * bits // 32) for _ in values]
    for row, line in enumerate(values.tolist()):
        for index, value in enumerate(line):
            for bit in range(bits):
                at = index * bits + bit
                packed[row][at // 32] |= (value >> bit & 1) << at % 32
    return torch.tensor(packed, dtype=torch.int64).to(torch.int32)  # the highest bit becomes the sign


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_by_its_definition(bits: int, ordered: bool, version: str, tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (COLUMNS, 64), generator=source)  # [inputs, outputs]
    zeros = torch.randint(0, 2**bits, (COLUMNS // 32, 64), generator=source)
    scale = (torch.rand(COLUMNS // 32, 64, generator=source) + 0.1).half()
    group = torch.arange(COLUMNS) // 32
    if ordered:
        group = group[torch.randperm(COLUMNS, generator=source)]
    kept = (zeros - 1) % 2**bits if version == "gptq" else zeros
    tensors = {"a.qweight": words(codes.T, bits).T, "a.qzeros": words(kept, bits), "a.scales": scale}
    tensors["a.g_idx"] = group.to(torch.int32)
    expected = torch.empty(64, COLUMNS, dtype=torch.float16)
    for row in range(64):
        for column in range(COLUMNS):
            of = int(group[column])
            expected[row, column] = float(codes[column, row] - zeros[of, row]) * float(scale[of, row])
    settings = {"bits": bits, "group_size": 32, "checkpoint_format": version}
    found = plain(tmp_path, {**tensors, "a.bias": scale[0]}, Quantization("gptq", settings))
    assert set(found) == {"a.weight", "a.bias"} and torch.equal(found["a.weight"], expected)


def test_awq_by_its_definition(tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (COLUMNS, 64), generator=source)
    zeros = torch.randint(0, 16, (COLUMNS // 32, 64), generator=source)
    scale = (torch.rand(COLUMNS // 32, 64, generator=source) + 0.1).half()

    def pack(values: Tensor) -> Tensor:
        mixed = values.reshape(len(values), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1)
        return words(mixed, 4)

    tensors = {"a.qweight": pack(codes), "a.qzeros": pack(zeros), "a.scales": scale}
    expected = ((codes - zeros.repeat_interleave(32, 0)).float() * scale.float().repeat_interleave(32, 0)).half().T
    found = plain(tmp_path, tensors, Quantization("awq", {"bits": 4, "group_size": 32}))
    assert torch.equal(found["a.weight"], expected)


def test_mxfp4_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 8, 3, 16), generator=source, dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 8, 3), generator=source, dtype=torch.uint8)
    tensors = {"experts.gate_up_proj_blocks": blocks, "experts.gate_up_proj_scales": scales}
    found = plain(tmp_path, tensors, Quantization("mxfp4", {}), torch.bfloat16)
    assert torch.equal(found["experts.gate_up_proj"], convert_moe_packed_tensors(blocks, scales))


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_come_out_as_they_went_in(bits: int) -> None:
    values = torch.randint(0, 2**bits, (5, 64), generator=torch.Generator().manual_seed(bits))
    assert torch.equal(unpack_bits(words(values, bits), bits, 64).long(), values)
    assert torch.equal(unpack_bits(words(values, bits), bits, 50).long(), values[:, :50])
    few = words(
        values[:, :32], bits
    )  # one word a row, as the zero points of few rows are, and not row by row in memory
    assert torch.equal(unpack_bits(few.T.contiguous().T, bits, 32 // bits).long(), values[:, : 32 // bits])


# ---- what is refused ------------------------------------------------------------------------------------------------
CODES8 = torch.zeros(4, 32).to(torch.float8_e4m3fn)
BROKEN = {
    "no scale": ({"a.weight": CODES8}, Quantization("fp8", {}), "no scale"),
    "scales of another shape": (
        {"a.weight": CODES8, "a.weight_scale_inv": torch.ones(3, 7)},
        Quantization("fp8", {}),
        "cannot be dequantized",
    ),
    "a scale that is not finite": (
        {"a.weight": CODES8, "a.weight_scale_inv": torch.full((1, 1), float("nan"))},
        Quantization("fp8", {}),
        "not finite",
    ),
    "a code that is not a number": (
        {"a.weight": torch.full((4, 32), float("nan")).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(1)},
        Quantization("fp8", {}),
        "not finite",
    ),
    "words that no width fills": (
        {
            "a.weight_packed": torch.zeros(4, 5, dtype=torch.int32),
            "a.weight_scale": torch.ones(4, 1),
            "a.weight_shape": torch.tensor([4, 32]),
        },
        Quantization("compressed-tensors", {"config_groups": {"g": {"weights": {"num_bits": 4}}}}),
        "none of the config's widths",
    ),
    "zero points that are missing": (
        {"a.qweight": torch.zeros(4, 32, dtype=torch.int32), "a.qzeros": torch.zeros(1, 1, dtype=torch.int32)},
        Quantization("gptq", {"bits": 4}),
        "no scale",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_pieces_that_do_not_fit_are_refused_by_name(name: str, tmp_path: Path) -> None:
    tensors, scheme, told = BROKEN[name]
    with pytest.raises(ArtifactError, match=rf"a\.\w+.*{told}"):
        plain(tmp_path, tensors, scheme)
