"""Weights that another tool quantized, as plain tensors: what is stored for each, and the arithmetic to read it.

    value = (code - zero) · scale

with one scale (and zero point) for a tensor, a row, a block of rows and columns, or a group of columns. Codes are
float8 values, bytes, or integers of b bits packed along a dimension into int32 words, value i at bit i · b. The product
is computed in float32 and rounded once, to the scales' type where that has 16 bits, else to the type that the config
names: what the tool itself computes with.

The formats: compressed-tensors (https://github.com/vllm-project/compressed-tensors), GPTQ (Frantar et al. 2022,
arXiv 2210.17323; AutoGPTQ stores zero - 1), AWQ (Lin et al. 2023, arXiv 2306.00978; eight columns of a word in the
order 0 2 4 6 1 3 5 7), FP8 with inverse scales per block (DeepSeek-V3, arXiv 2412.19437), MXFP4 (OCP Microscaling
Formats 1.0: 32 values of 4 bits share a power of two).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gulliver.core.errors import ArtifactError
from gulliver.nets.files import Stored, not_finite
from gulliver.nets.kinds import Quantization
from gulliver.nets.weights import all_finite, read_tensor

UNPACK_ROWS = 1024
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of each nibble of a word, from the lowest
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
CODES = ("F8_E4M3", "F8_E5M2", "I8", "U8")
SPARE = (
    *("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point"),
    *("activation_scale", "input_scale_ub", "q_scale", "k_scale", "v_scale"),
)
"""Leaves that say how activations or the cache would be quantized: not used in full precision."""

Pieces = Mapping[str, Tensor]
Rule = Callable[[Pieces, Quantization], Tensor]  # stored pieces by role -> the weight, float32


@dataclass(frozen=True)
class Recipe:
    """How one plain tensor is read: the stored names by role, and the rule; without a rule it is stored as it is."""

    pieces: Mapping[str, str]
    rule: Rule | None = None


def recipes(stored: Mapping[str, Stored], scheme: Quantization | None) -> dict[str, Recipe]:
    """Name of every plain tensor -> how it is read. ArtifactError for codes without what explains them."""
    found: dict[str, Recipe] = {}
    used: set[str] = set()
    for name in stored if scheme is not None else ():
        for leaf, plain, others, rule in _rules(scheme):
            if not name.endswith(leaf) or (leaf == ".weight" and stored[name].dtype not in CODES):
                continue
            stem = name.removesuffix(leaf)
            pieces = {role: stem + suffix for role, suffix in others.items() if stem + suffix in stored}
            if "scale" in pieces:
                found[stem + plain] = Recipe({"codes": name, **pieces}, rule)
                used |= {name, *pieces.values()}
                break
    for name, tensor in stored.items():
        leaf = name.rpartition(".")[2]
        if name in used or (scheme is not None and leaf in SPARE):
            continue
        if scheme is not None and (tensor.dtype in CODES[:2] or leaf in ("qweight", "weight_packed")):
            told = f"{name} in {tensor.path} is {tensor.dtype} and has no scale beside it"
            raise ArtifactError(f"{told}; download it again")
        found[name] = Recipe({"codes": name})
    return found


def _rules(scheme: Quantization | None) -> Iterator[tuple[str, str, dict[str, str], Rule]]:
    """How names end: (that of the codes, that of the plain tensor, those of what explains the codes, by role), rule."""
    method = "" if scheme is None else scheme.method
    weight = ".weight"
    if method in ("fp8", "fbgemm_fp8", "modelopt"):
        yield weight, weight, {"scale": ".weight_scale_inv"}, _scaled
        yield weight, weight, {"scale": ".weight_scale"}, _scaled
        for part in (".gate_up_proj", ".down_proj"):  # experts in one tensor
            yield part, part, {"scale": f"{part}_scale_inv"}, _scaled
    elif method == "compressed-tensors":
        more = {role: f".weight_{role}" for role in ("scale", "zero_point", "g_idx", "shape")}
        yield ".weight_packed", weight, more, _packed
        yield weight, weight, more, _scaled
    elif method == "gptq":
        yield ".qweight", weight, {"scale": ".scales", "zero_point": ".qzeros", "g_idx": ".g_idx"}, _gptq
    elif method == "awq":
        yield ".qweight", weight, {"scale": ".scales", "zero_point": ".qzeros"}, _awq
    elif method == "mxfp4":
        yield "_blocks", "", {"scale": "_scales"}, _mxfp4


def read(recipe: Recipe, stored: Mapping[str, Stored], scheme: Quantization | None, dtype: torch.dtype) -> Tensor:
    """The plain tensor of a recipe, of any shape; `dtype` is that of a dequantized one whose scales have 32 bits.

    ArtifactError for a damaged file, pieces that do not fit together, and a value that is not finite.
    """
    pieces = {role: read_tensor(stored, name) for role, name in recipe.pieces.items()}
    name, path = recipe.pieces["codes"], stored[recipe.pieces["codes"]].path
    if recipe.rule is None or scheme is None:
        return pieces["codes"]
    try:
        value = recipe.rule(pieces, scheme)
    except (ValueError, RuntimeError, IndexError, TypeError, ZeroDivisionError) as error:
        shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in pieces.items())
        told = f"{name} in {path} cannot be dequantized ({shapes}): {str(error).splitlines()[0]}"
        raise ArtifactError(f"{told}; download it again") from None
    if not all_finite(value):
        raise not_finite(name, path)
    scale = pieces["scale"]
    return value.to(scale.dtype if scale.dtype in (torch.float16, torch.bfloat16) else dtype)


# ---- the rules ------------------------------------------------------------------------------------------------------
def _scaled(pieces: Pieces, scheme: Quantization) -> Tensor:
    """Codes [..., rows, columns] that are numbers already, times their scales."""
    codes = pieces["codes"].float()
    blocks = _blocks(scheme)
    if "zero_point" in pieces and pieces["zero_point"].numel():
        codes = codes - _spread(pieces["zero_point"].float(), codes.shape, blocks, pieces.get("g_idx"))
    return codes * _spread(_numbers(pieces["scale"]), codes.shape, blocks, pieces.get("g_idx"))


def _packed(pieces: Pieces, scheme: Quantization) -> Tensor:
    """compressed-tensors' integers: words int32 [rows, words], stored with 2^(b-1) added to codes and zero points."""
    *lead, rows, columns = (int(size) for size in pieces["shape"])
    words = pieces["codes"].reshape(-1, pieces["codes"].shape[-1])
    bits = _bits(words.shape[-1], columns, scheme)
    codes = unpack_bits(words, bits, columns).reshape(*lead, rows, columns).float()
    scale, blocks = _numbers(pieces["scale"]), _blocks(scheme)
    if "zero_point" not in pieces or not pieces["zero_point"].numel():
        zero = torch.tensor(float(1 << (bits - 1)))
    elif pieces["zero_point"].dtype == torch.int32 and pieces["zero_point"].shape != scale.shape:
        zero = unpack_bits(pieces["zero_point"].T.contiguous(), bits, rows).T.float()
    else:
        zero = pieces["zero_point"].float() + (1 << (bits - 1))
    order = pieces.get("g_idx")
    return (codes - _spread(zero, codes.shape, blocks, order)) * _spread(scale, codes.shape, blocks, order)


def _gptq(pieces: Pieces, scheme: Quantization) -> Tensor:
    """GPTQ's integers: words int32 [inputs · b / 32, outputs]; the groups' zero points less one, but in version 2."""
    words, scale = pieces["codes"], pieces["scale"].float()
    bits = int(scheme.settings.get("bits", 4))
    if "g_idx" in pieces:
        bits = words.shape[0] * 32 // pieces["g_idx"].numel()  # which "dynamic" settings may make another
    inputs, outputs = words.shape[0] * 32 // bits, words.shape[1]
    codes = unpack_bits(words.T.contiguous(), bits, inputs).float()  # [outputs, inputs]
    zeros = unpack_bits(pieces["zero_point"], bits, outputs).float()  # [groups, outputs]
    if str(scheme.settings.get("checkpoint_format", "gptq")).lower() != "gptq_v2":
        zeros = (zeros + 1) % (1 << bits)
    order = pieces.get("g_idx", torch.arange(inputs) // math.ceil(inputs / scale.shape[0])).long()
    return (codes - zeros.T[:, order]) * scale.T[:, order]


def _awq(pieces: Pieces, scheme: Quantization) -> Tensor:
    """AWQ's 4-bit integers in the layout "gemm": words int32 [inputs, outputs / 8]."""
    codes, zeros = _awq_codes(pieces["codes"]), _awq_codes(pieces["zero_point"])
    scale = pieces["scale"].float()
    size = math.ceil(codes.shape[0] / scale.shape[0])
    spread = torch.arange(codes.shape[0]) // size
    return ((codes - zeros[spread]) * scale[spread]).T.contiguous()


def _awq_codes(words: Tensor) -> Tensor:
    nibbles = unpack_bits(words, 4, words.shape[1] * 8).float().reshape(len(words), -1, 8)
    columns = torch.empty_like(nibbles)
    columns[:, :, list(AWQ_ORDER)] = nibbles
    return columns.reshape(len(words), -1)


def _mxfp4(pieces: Pieces, scheme: Quantization) -> Tensor:
    """Experts [experts, rows, groups, 16 bytes] with a power of two for each group -> [experts, columns, rows]."""
    blocks, exponents = pieces["codes"], pieces["scale"].to(torch.int32) - 127
    table = torch.tensor(FP4)
    pairs = torch.stack([table[(blocks & 15).int()], table[(blocks >> 4).int()]], -1).flatten(-2)
    return torch.ldexp(pairs, exponents[..., None]).flatten(-2).transpose(-2, -1).contiguous()


# ---- shared ---------------------------------------------------------------------------------------------------------
def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [rows, words] -> the first `count` unsigned integers of `bits` in each row, uint8 [rows, count]."""
    if words.dtype != torch.int32 or not 1 <= bits <= 8 or words.shape[1] * 32 < count * bits:
        raise ValueError(f"{count} codes of {bits} bits are not in {words.shape[1]} words of {words.dtype}")
    if bits in (4, 8):  # no code reaches over two bytes
        octets = words.reshape(-1).view(torch.uint8).reshape(len(words), -1)
        return (torch.stack([octets & 15, octets >> 4], -1).flatten(1) if bits == 4 else octets)[:, :count]
    found = []
    for rows in words.split(UNPACK_ROWS):
        stream = np.unpackbits(
            rows.reshape(-1).numpy().view(np.uint8).reshape(len(rows), -1),
            axis=1,
            count=count * bits,
            bitorder="little",
        )
        fields = stream.reshape(len(rows), count, bits)
        found.append(torch.from_numpy(np.packbits(fields, axis=2, bitorder="little")[:, :, 0]))
    return torch.cat(found)


def _bits(words: int, columns: int, scheme: Quantization) -> int:
    """The width of packed codes: of those that the config names, the one that fills so many words."""
    named = {int(weights.get("num_bits", 0)) for weights in _weights(scheme)}
    fitting = {bits for bits in named if 1 <= bits <= 8 and words == math.ceil(columns * bits / 32)}
    fitting = fitting or {bits for bits in named if bits and words == math.ceil(columns / (32 // bits))}
    if len(fitting) != 1:
        raise ValueError(f"{words} words for {columns} columns fit none of the config's widths {sorted(named)}")
    return fitting.pop()


def _weights(scheme: Quantization) -> Iterator[Mapping[str, Any]]:
    """How compressed-tensors' config says that weights are quantized, one mapping for each group of modules."""
    groups = scheme.settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping):
            yield group["weights"]


def _blocks(scheme: Quantization) -> list[tuple[int, int]]:
    """The sizes of blocks, (rows, columns), that the config names."""
    found = [scheme.settings.get("weight_block_size")]
    found += [weights.get("block_structure") for weights in _weights(scheme)]
    found += [[1, weights["group_size"]] for weights in _weights(scheme) if int(weights.get("group_size") or 0) > 0]
    return [(int(one[0]), int(one[1])) for one in found if isinstance(one, list | tuple) and len(one) == 2]


def _numbers(scale: Tensor) -> Tensor:
    """Scales as float32; bytes are exponents of two, biased by 127."""
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()


def _spread(
    values: Tensor, shape: Collection[int], blocks: Collection[tuple[int, int]], order: Tensor | None = None
) -> Tensor:
    """`values` (one; one a row; or [..., row blocks, column blocks]) for every code of `shape`: broadcast to it.

    `order` int [columns] is the group of each column, where groups are not neighbours.
    """
    *_, rows, columns = shape
    if values.numel() == 1:
        return values.reshape(())
    while values.dim() < len(shape):
        values = values.unsqueeze(-1)
    if order is not None and order.numel() == columns and bool((order >= 0).all()):
        return values[..., order.long()]
    down, across = values.shape[-2:]
    fitting = [one for one in blocks if math.ceil(rows / one[0]) == down and math.ceil(columns / one[1]) == across]
    height, width = fitting[0] if fitting else (math.ceil(rows / down), math.ceil(columns / across))
    if math.ceil(rows / height) != down or math.ceil(columns / width) != across:
        raise ValueError(f"scales {list(values.shape)} do not divide {list(shape)}")
    tall = values.repeat_interleave(height, -2)[..., :rows, :] if down > 1 else values
    return tall.repeat_interleave(width, -1)[..., :columns] if across > 1 else tall
