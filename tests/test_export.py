"""Export: other tools must read the values that we read, bit for bit where the format can hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from gulliver.compress.export import as_bfloat16, write_config
from gulliver.compress.export_compressed import compressed_config, compressed_tensors, pack_bits, plan_layout
from gulliver.core.errors import ConfigError
from gulliver.runtime.formats import Format
from gulliver.runtime.packed import PackedTensor, RowGroup
from gulliver.runtime.shards import ShardWriter

VOCABULARY = 96
EMBEDDING = "model.embed_tokens.weight"


def llama(tied: bool = True) -> nn.Module:
    """A random Llama whose widths (64, 96) are no multiple of every group size."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(config).float().eval()


def part(rows: int, columns: int, name: str, seed: int) -> RowGroup:
    """Random codes, scales, zero points and factors of a weight-like size."""
    fmt, random = Format.parse(name), torch.Generator().manual_seed(seed)
    groups = fmt.groups(columns)

    def draw(*shape: int, high: int) -> Tensor:
        return torch.randint(0, high, shape, generator=random, dtype=torch.uint8)

    factors = (torch.rand(rows, generator=random) * 1e-4 + 1e-5).to(torch.bfloat16)
    codes, scales = draw(rows, columns, high=fmt.levels), draw(rows, groups, high=256)
    if fmt.kind == "uniform":
        return RowGroup(fmt, codes, scales, factors, zeros=draw(rows, groups, high=fmt.levels))
    codebook = torch.sort(torch.randint(-128, 128, (fmt.levels,), generator=random)).values.to(torch.int8)
    return RowGroup(fmt, codes, scales, factors, codebook=codebook)


def packed(weight: Tensor, *names: str, seed: int = 0) -> PackedTensor:
    """A packed tensor of the weight's shape, its rows dealt out over parts of the named formats."""
    rows = weight.shape[0]
    row_part = (torch.arange(rows) % len(names)).to(torch.uint8) if len(names) > 1 else None
    counts = [int((row_part == index).sum()) if row_part is not None else rows for index in range(len(names))]
    parts = [
        part(count, weight[0].numel(), name, seed + i)
        for i, (count, name) in enumerate(zip(counts, names, strict=True))
    ]
    return PackedTensor(tuple(weight.shape), parts, row_part)


def pack_model(network: nn.Module, choose: dict[str, tuple[str, ...]]) -> dict[str, PackedTensor | Tensor]:
    """Every parameter, packed in the formats of the first key of `choose` that its name contains, else as it is."""
    tensors: dict[str, PackedTensor | Tensor] = {}
    for index, (name, weight) in enumerate(network.named_parameters()):
        names = next((formats for key, formats in choose.items() if key in name), None)
        tensors[name] = packed(weight, *names, seed=10 * index) if names else weight.detach()
    return tensors


def written(folder: Path, network: nn.Module, tensors: dict[str, PackedTensor | Tensor], widen: bool = False) -> Path:
    """What the step writes for these tensors, without an artifact around it."""
    layout = plan_layout(tensors.items(), network, widen)
    folder.mkdir()
    with ShardWriter(folder) as shards:
        for name, tensor in tensors.items():
            shards.add({name: tensor} if isinstance(tensor, Tensor) else compressed_tensors(name, tensor, layout))
    raw = {**network.config.to_dict(), "dtype": "float32", "quantization_config": compressed_config(layout, network)}
    write_config(raw, folder)
    return folder


def reference_model(network: nn.Module, tensors: dict[str, PackedTensor | Tensor]) -> nn.Module:
    """The network with our own reading of the packed tensors."""
    values = {name: value if isinstance(value, Tensor) else value.dequantize() for name, value in tensors.items()}
    network.load_state_dict(values, strict=False)
    return network


def opened(folder: Path) -> nn.Module:
    """The folder as a user opens it, after the first forward pass (compressed-tensors unpacks there)."""
    return transformers.AutoModelForCausalLM.from_pretrained(str(folder)).eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(5))


ONE_SCHEME = {
    "u4g64, linears": (True, {"proj": ("u4g64",)}),
    "u4g32, embedding too": (True, {"proj": ("u4g32",), "embed": ("u4g32",)}),
    "u3g128, untied": (False, {"proj": ("u3g128",), "embed": ("u3g64",), "lm_head": ("u3g32",)}),
    "u8g64": (True, {"proj": ("u8g64",), "embed": ("u8g64",)}),
    "u6g32, rows in two group sizes": (True, {"proj": ("u6g32",), "embed": ("u6g32", "u6g64")}),
}
SEVERAL_SCHEMES = {
    "attention 3, mlp 5": (True, {"self_attn": ("u3g32",), "mlp": ("u5g64",)}),
    "three widths, a dense head": (False, {"q_proj": ("u2g64",), "mlp": ("u8g32",), "v_proj": ("u6g128",)}),
}


@pytest.mark.parametrize("case", [*ONE_SCHEME, *SEVERAL_SCHEMES])
def test_transformers_reads_our_values_bit_for_bit(case: str, tmp_path: Path, tokens: Tensor) -> None:
    tied, choose = {**ONE_SCHEME, **SEVERAL_SCHEMES}[case]
    network = llama(tied)
    tensors = pack_model(network, choose)
    folder = written(tmp_path / "out", network, tensors)
    ours = reference_model(network, tensors)
    theirs = opened(folder)
    with torch.no_grad():
        expected, found = ours(tokens).logits, theirs(tokens).logits
    weights = dict(theirs.named_parameters(remove_duplicate=False))
    for name, weight in ours.named_parameters():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], weight), name
    assert torch.equal(found, expected)
    kinds = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert {kind["weights"]["strategy"] for kind in kinds} == {"group" if case in ONE_SCHEME else "block"}


@pytest.mark.parametrize("formats", [("u4g32", "u4g32"), ("u4g32", "u5g64")])
def test_an_encoder_opens_too(formats: tuple[str, str], tmp_path: Path, tokens: Tensor) -> None:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        architectures=["BertModel"],
    )
    network = transformers.BertModel(config).float().eval()
    tensors = pack_model(network, {"dense.weight": formats[:1], "query.weight": formats[1:]})
    folder = written(tmp_path / "out", network, tensors)
    ours = reference_model(network, tensors)
    theirs = transformers.AutoModel.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        assert torch.equal(theirs(tokens).last_hidden_state, ours(tokens).last_hidden_state)


def test_bfloat16_on_request_gives_the_plain_rounding(tmp_path: Path) -> None:
    network = llama()
    tensors = pack_model(network, {"proj": ("u4g64",), "embed": ("u4g64",)})
    folder = written(tmp_path / "out", network, tensors)
    ours = reference_model(network, tensors)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16)
    for name, weight in ours.named_parameters():
        assert torch.equal(theirs.get_parameter(name), weight.to(torch.bfloat16)), name


def test_the_files_are_as_small_as_the_codes(tmp_path: Path) -> None:
    network = llama()
    folder = written(tmp_path / "out", network, pack_model(network, {"proj": ("u3g32",), "embed": ("u3g32",)}))
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("_packed"):
            weight = network.get_parameter(name.removesuffix("_packed"))
            assert tensor.numel() * 32 == weight.numel() * 3, name


REFUSED = {
    "codebook": ({"proj": ("c4g64",)}, "codebook"),
    "rows of two widths": ({"proj": ("u4g64",), "embed": ("u8g64", "u4g64")}, "4, 8 bits"),
    "an embedding among several widths": ({"proj": ("u4g64",), "embed": ("u6g64",)}, "embedding"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_refused_by_name_reason_and_remedy(case: str) -> None:
    choose, word = REFUSED[case]
    network = llama()
    with pytest.raises(ConfigError) as refusal:
        plan_layout(pack_model(network, choose).items(), network, widen=False)
    text = str(refusal.value)
    assert word in text and ".weight (" in text and "quantize" in text and "safetensors" in text


@pytest.mark.parametrize("case", REFUSED)
def test_wider_codes_hold_it_exactly_when_asked(case: str, tmp_path: Path, tokens: Tensor) -> None:
    network = llama()
    tensors = pack_model(network, REFUSED[case][0])
    folder = written(tmp_path / "out", network, tensors, widen=True)
    assert plan_layout(tensors.items(), network, widen=True).widened
    ours, theirs = reference_model(network, tensors), opened(folder)
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, ours(tokens).logits)
    for name, weight in ours.named_parameters():
        assert torch.equal(theirs.get_parameter(name), weight), name


def test_a_zero_point_beyond_the_codes_is_refused_or_widened() -> None:
    network = llama()
    tensors = pack_model(network, {"proj": ("u4g64",)})
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = tensors[name]
    assert isinstance(tensor, PackedTensor) and tensor.parts[0].zeros is not None
    tensor.parts[0].zeros[0, 0] = 17
    with pytest.raises(ConfigError, match=r"down_proj.weight \(u4g64\).*zero points"):
        plan_layout(tensors.items(), network, widen=False)
    layout = plan_layout(tensors.items(), network, widen=True)
    assert layout.strategy == "block" and layout.widened == (name,) and layout.schemes[name].bits == 5


def test_a_convolution_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(8, 16, 3))
    tensors = {"0.weight": packed(torch.empty(16, 8, 3, 3), "u4g32")}
    with pytest.raises(ConfigError, match=r"0.weight \(u4g32\).*Conv2d; use --format safetensors"):
        plan_layout(tensors.items(), network, widen=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**31))
def test_bits_are_packed_as_compressed_tensors_packs_them(bits: int, rows: int, columns: int, seed: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    random = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 1 << bits, (rows, columns), generator=random, dtype=torch.uint8)
    theirs = pack_to_int32((values.to(torch.int16) - (1 << (bits - 1))).to(torch.int8), bits)
    assert torch.equal(pack_bits(values, bits), theirs)


def test_as_bfloat16_reports_the_rounding() -> None:
    exact, error = as_bfloat16(torch.tensor([0.0, 1.0, -2.5]))
    assert error == 0 and exact.dtype == torch.bfloat16
    _, error = as_bfloat16(torch.tensor([1.0, 1.0 + 2**-9]))
    assert error == pytest.approx(2**-9 / (1 + 2**-9))
    counts, error = as_bfloat16(torch.tensor([3, 4]))
    assert counts.dtype == torch.int64 and error == 0


def test_shards_bound_memory_and_transformers_reads_their_index(tmp_path: Path) -> None:
    network = llama(tied=False)
    with ShardWriter(tmp_path, shard_bytes=20_000) as shards:
        for name, weight in network.named_parameters():
            shards.add({name: weight.detach()})
    write_config(network.config.to_dict(), tmp_path)
    assert len(list(tmp_path.glob("model-0*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    again = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path))
    for name, weight in network.named_parameters():
        assert torch.equal(again.get_parameter(name), weight)


def test_a_shard_writer_never_writes_a_name_twice_and_names_nothing_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="twice"), ShardWriter(tmp_path) as shards:
        shards.add({"twice": torch.ones(2)})
        shards.add({"twice": torch.ones(2)})
    assert not list(tmp_path.glob("model*"))
