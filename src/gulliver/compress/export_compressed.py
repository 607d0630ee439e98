"""Packed weights as compressed-tensors (https://github.com/vllm-project/compressed-tensors), bit for bit.

Its `pack-quantized` scheme stores, per Linear or Embedding, integer codes of b = 1…8 bits packed along each row, a
scale and an integer zero point per group of columns, and reads value = (code - zero) · scale in the scale's type. Ours
is value = f · s · (code - zero) with a bfloat16 f and an 8-bit s: f · s has 16 significant bits and (code - zero) at
most 8, so with float32 scales f · s every product is exact and both readers agree to the last bit.

What the format lacks, and what is done about it:

- Groups must divide the columns: the group size becomes gcd(columns, group_size), with scales repeated.
- Codebooks, zero points beyond the codes' range and rows of different widths have no place. Each is refused, or, when
  asked to `widen`, stored in wider codes: a codebook entry is itself an 8-bit code around a zero point of 128.
- A model whose zero points are all in the middle, and whose values are float16 numbers (as `fit --for vllm` and `--for
  transformers` make them), is written symmetric: float16 scales, no zero points, each tensor with a width of its own.
- transformers 5 opens a packed Embedding, or packed zero points, only where all tensors share one scheme and are
  dequantized while loading. A model of one scheme is written that way (strategy "group", the common W4A16 form, which
  `dequantize` in the config asks for). A model with several widths gets the strategy "block" with blocks of one row,
  whose zero points are plain bytes, and must leave its embeddings dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gulliver.core.errors import ConfigError
from gulliver.nets.weights import aliases
from gulliver.runtime.packed import PackedTensor, RowGroup

PACK_ROWS = 4096
CODEBOOK_ZERO = 128
MAX_BITS = 8


@dataclass(frozen=True, order=True)
class Scheme:
    """Codes of `bits` with one scale and zero point for `group_size` columns."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class Layout:
    """How a model is written: a scheme per packed tensor, one strategy for all, and which tensors got wider codes."""

    strategy: str  # "group": all schemes are one; "block": several; "symmetric": groups without zero points
    schemes: Mapping[str, Scheme]
    widened: tuple[str, ...]


@dataclass(frozen=True)
class _Need:
    """The narrowest scheme that holds a tensor, and why that is wider than its own codes ("" when it is not)."""

    scheme: Scheme
    reason: str
    formats: str
    embedding: bool
    symmetric: bool


# ---- planning -----------------------------------------------------------------------------------------------------
def plan_layout(tensors: Iterable[tuple[str, PackedTensor | Tensor]], network: nn.Module, widen: bool) -> Layout:
    """The smallest layout that holds every packed tensor exactly. ConfigError names the tensor that has none.

    Packed weights are [rows, columns]. `network` has the model's modules (its parameters may hold no data); `widen`
    permits codes wider than a tensor has.
    """
    needs = {name: _need(name, tensor, network) for name, tensor in tensors if isinstance(tensor, PackedTensor)}
    assert needs, "plan_layout needs a model with packed tensors"
    for name, need in needs.items():
        if need.reason and not widen:
            raise _refusal(name, need.formats, need.reason)
    widened = {name for name, need in needs.items() if need.reason}
    schemes = {name: need.scheme for name, need in needs.items()}
    if all(need.symmetric and not need.embedding for need in needs.values()):
        return Layout("symmetric", schemes, ())
    if len({scheme.bits for scheme in schemes.values()}) > 1:
        embedding = next((name for name, need in needs.items() if need.embedding), None)
        if embedding is None:
            return Layout("block", schemes, tuple(sorted(widened)))
        if not widen:
            widths = sorted({scheme.bits for scheme in schemes.values()})
            reason = (
                "transformers opens a packed embedding only when every packed tensor has the same number of bits, "
                f"and this model has {', '.join(map(str, widths))}"
            )
            raise _refusal(embedding, needs[embedding].formats, reason)
    top = max(scheme.bits for scheme in schemes.values())
    widened |= {name for name, scheme in schemes.items() if scheme.bits < top}
    common = gcd(*(scheme.group_size for scheme in schemes.values()))
    schemes = dict.fromkeys(schemes, Scheme(top, common))
    return Layout("group", schemes, tuple(sorted(widened)))


def _need(name: str, tensor: PackedTensor, network: nn.Module) -> _Need:
    """What a packed tensor needs. ConfigError when no integer scheme holds it."""
    formats = ", ".join(dict.fromkeys(part.format.name for part in tensor.in_tiles))
    owner, _, leaf = name.rpartition(".")
    module = network.get_submodule(owner)
    if leaf != "weight" or not isinstance(module, nn.Linear | nn.Embedding) or len(tensor.shape) != 2:
        raise ConfigError(
            f"{name} ({formats}) cannot be expressed: compressed-tensors packs the weight of a Linear or an Embedding, "
            f"and this is a {type(module).__name__}; use --format safetensors"
        )
    group_size = gcd(tensor.shape[1], *(part.format.group_size for part in tensor.in_tiles))
    bits = max(
        MAX_BITS if part.zeros is None else max(part.format.bits, int(part.zeros.max()).bit_length())
        for part in tensor.in_tiles
    )
    reason, embedding = _too_narrow(tensor, bits), isinstance(module, nn.Embedding)
    symmetric = not reason and all(_is_symmetric(part) for part in tensor.in_tiles)
    return _Need(Scheme(bits, group_size), reason, formats, embedding, symmetric)


def _is_symmetric(part: RowGroup) -> bool:
    """Whether zero points are in the middle of the codes, and scales, and their products with levels, float16 numbers.

    They are where a row's factor is a power of two from 2^-24 to 16, and a scale's code times a level has 11 bits.
    """
    middle = part.format.levels // 2
    if part.zeros is None or not bool((part.zeros == middle).all()) or middle * int(part.scales.max()) > 2048:
        return False
    mantissas, exponents = torch.frexp(part.factors.float())
    return bool(((mantissas == 0.5) & (exponents > -24) & (exponents <= 5)).all())


def _too_narrow(tensor: PackedTensor, bits: int) -> str:
    """Why the tensor's own codes will not do, or ""."""
    if any(part.format.kind == "codebook" for part in tensor.in_tiles):
        return "it holds integers with a scale and a zero point, and has no place for a codebook"
    own = {part.format.bits for part in tensor.in_tiles}
    if len(own) > 1:
        return f"all rows of a tensor have codes of one width, and these have {', '.join(map(str, sorted(own)))} bits"
    return f"its zero points have the codes' {max(own)} bits, and these reach beyond" if bits > max(own) else ""


def _refusal(name: str, formats: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{name} ({formats}) cannot be expressed in compressed-tensors: {reason}. Pack the model in one format "
        '(`quantize` with kind = "uniform" and no plan), export it with --widen (the same values in wider codes), or '
        "use --format safetensors"
    )


# ---- writing ------------------------------------------------------------------------------------------------------
def compressed_tensors(name: str, tensor: PackedTensor, layout: Layout) -> dict[str, Tensor]:
    """What holds `name` ("….weight", [rows, columns]) on disk.

    `…_packed` int32 [rows, words], `…_scale` float32 [rows, groups], `…_shape` int64 [2], and `…_zero_point`: packed
    int32 [words of rows, groups] with the strategy "group", int8 [rows, groups] with "block". With "symmetric" there
    are none, and scales are float16.
    """
    scheme = layout.schemes[name]
    rows, columns = tensor.shape
    groups = columns // scheme.group_size
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales = torch.empty(rows, groups)
    zeros = torch.empty(rows, groups, dtype=torch.uint8)
    for index, part in enumerate(tensor.in_tiles):
        where = slice(None) if tensor.row_part is None else tensor.row_part == index
        codes[where], scales[where], zeros[where] = _integers(part, scheme)
    held = {f"{name}_packed": pack_bits(codes, scheme.bits), f"{name}_shape": torch.tensor([rows, columns])}
    if layout.strategy == "symmetric":
        return held | {f"{name}_scale": scales.half()}
    if layout.strategy == "group":
        stored = pack_bits(zeros.T.contiguous(), scheme.bits).T.contiguous()
    else:
        stored = (zeros.to(torch.int16) - (1 << (scheme.bits - 1))).to(torch.int8)
    return held | {f"{name}_scale": scales, f"{name}_zero_point": stored}


def _integers(part: RowGroup, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """A part's values exactly: codes uint8 [rows, columns], scales float32 and zero points uint8 [rows, groups]."""
    columns = part.codes.shape[1]
    group_of = torch.arange(0, columns, scheme.group_size) // part.format.group_size
    scales = (part.factors.float()[:, None] * part.scales.float())[:, group_of]
    if part.format.kind == "codebook":
        assert part.codebook is not None
        table = (part.codebook.to(torch.int16) + CODEBOOK_ZERO).to(torch.uint8)
        return table[part.codes.int()], scales, torch.full(scales.shape, CODEBOOK_ZERO, dtype=torch.uint8)
    assert part.zeros is not None
    return part.codes, scales, part.zeros[:, group_of]


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns] below 2^bits -> int32 [rows, ceil(columns · bits / 32)], value i at bit i · bits."""
    packed = []
    for rows in values.split(PACK_ROWS):
        fields = np.unpackbits(rows.numpy()[:, :, None], axis=2, count=bits, bitorder="little")
        stream = np.packbits(fields.reshape(len(rows), -1), axis=1, bitorder="little")
        padded = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 4)))
        packed.append(torch.from_numpy(padded.view("<i4").astype(np.int32)))
    return torch.cat(packed)


def compressed_config(layout: Layout, network: nn.Module) -> dict[str, Any]:
    """`quantization_config` for config.json."""
    names, one = aliases(network), layout.strategy == "group"
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in sorted(layout.schemes.items()):
        groups.setdefault(scheme, []).extend(alias.removesuffix(".weight") for alias in names[name])
    packed = {module for modules in groups.values() for module in modules}
    kinds = {type(network.get_submodule(module)).__name__ for module in packed}
    matrices = nn.Linear | nn.Embedding
    dense = [path for path, module in network.named_modules() if path not in packed and isinstance(module, matrices)]
    groups_of_scheme = {}
    for index, (scheme, modules) in enumerate(sorted(groups.items())):
        blocks = layout.strategy == "block"
        size = {"block_structure": [1, scheme.group_size]} if blocks else {"group_size": scheme.group_size}
        symmetric, strategy = layout.strategy == "symmetric", "block" if blocks else "group"
        weights = {"num_bits": scheme.bits, "type": "int", "symmetric": symmetric, "strategy": strategy, **size}
        groups_of_scheme[f"group_{index}"] = {
            "targets": sorted(kinds) if one else modules,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": dense,
        "config_groups": groups_of_scheme,
        **({"dequantize": True} if one else {}),
    }
