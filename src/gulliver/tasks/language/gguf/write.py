"""A model as one GGUF file, which llama.cpp and what is built on it open; tokenizer and chat template are in it.

With type "exact" every weight gets the smallest GGUF type that holds it bit for bit, found by encoding, decoding and
comparing. Candidates for packed weights are the block types with one float16 scale d (and minimum m) for 32 columns,

    Q4_0, Q5_0, Q8_0    value = d · level        Q4_1, Q5_1    value = d · code + m

whose d would be our f · s. That has up to 16 significant bits and float16 holds 11, so most packed weights fit none of
them, nor bfloat16, and become F32: exact, and several times larger than the packed file. A parent in bfloat16 becomes
BF16. The other types round as llama.cpp does, and the relative error is reported. Norms and biases are always F32.

Memory: one tensor at a time. Two passes: the header comes first in the file and must know every type.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from gulliver.core.context import Context
from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.records import Origin
from gulliver.core.store.artifact import Artifact
from gulliver.nets.weights import canonical_names
from gulliver.runtime import reference
from gulliver.runtime.blocks import BlockRows
from gulliver.runtime.formats import KEPT_BITS
from gulliver.runtime.network import load_network
from gulliver.runtime.packed import PackedTensor
from gulliver.tasks.language.gguf.architectures import REMEDY, Architecture, architecture_of, permute
from gulliver.tasks.language.gguf.config import ROPE_FACTORS
from gulliver.tasks.language.gguf.metadata import add_architecture, add_tokenizer, rope_factors

FILE = "model.gguf"
BLOCK = 32
ENTRY_BYTES, SOURCE_BYTES = 96, 512
"""What a tensor's entry and its alignment take, about, and what is said of where the model comes from."""
ROWS = 4096
"""Rows whose error is computed at a time."""
TYPES = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0}
BLOCK_TYPES = {Type.Q4_0: (4, 8), Type.Q4_1: (4, 0), Type.Q5_0: (5, 16), Type.Q5_1: (5, 0), Type.Q8_0: (8, 128)}
"""Types of blocks of 32 from the smallest on -> (bits of a code, the code of zero; 0 where a minimum is stored)."""
FILE_TYPES = {Type.F32: "ALL_F32", Type.F16: "MOSTLY_F16", Type.BF16: "MOSTLY_BF16", Type.Q8_0: "MOSTLY_Q8_0"}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: where it comes from, and its type and shape there."""

    source: str
    name: str
    type: Type
    shape: tuple[int, ...]
    packed: bool

    @property
    def size_bytes(self) -> int:
        return type_bytes(self.type, self.shape)


@dataclass
class Rounding:
    """How far the file's values are from the model's, in squares summed over everything that was written."""

    weights: float = 0.0
    errors: float = 0.0
    worst: float = 0.0
    worst_name: str = ""

    def add(self, name: str, exact: np.ndarray, kept: np.ndarray) -> None:
        """Count a tensor's values, float32 [rows, …], and what the file gives for them, of the same shape."""
        errors = weights = 0.0
        for start in range(0, len(exact), ROWS):
            before, after = (values[start : start + ROWS].astype(np.float64) for values in (exact, kept))
            weights += float(np.square(before).sum())
            errors += float(np.square(after - before).sum())
        self.weights, self.errors = self.weights + weights, self.errors + errors
        relative = math.sqrt(errors / weights) if weights else 0.0
        if relative > self.worst:
            self.worst, self.worst_name = relative, name

    @property
    def relative(self) -> float:
        """Root of the mean squared error, divided by that of the weights."""
        return math.sqrt(self.errors / self.weights) if self.weights else 0.0


def write_gguf(model: Artifact, folder: Path, kind: str, ctx: Context) -> dict[str, Any]:
    """Write `folder`/model.gguf with weights of type `kind` ("exact" or a key of TYPES).

    Returns facts for the artifact's config. ConfigError when GGUF has no place for the architecture, a tensor or the
    tokenizer; ArtifactError for a damaged model.
    """
    network: Any = load_network(model.path, empty=True)
    row = architecture_of(network)
    with ctx.progress.stage("plan types", unit="tensor") as bar:
        entries = []
        for entry in _plan(model.path, network, row, kind):
            entries.append(entry)
            bar.advance()
    writer = gguf.GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[row.name])
    try:
        _add_source(writer, model, network, entries, ctx)
        facts: dict[str, Any] = {"context_length": add_architecture(writer, network, row)}
        facts["pre_tokenizer"] = add_tokenizer(writer, model.path, network.config)
        rounding = _write(writer, model, network, row, entries, ctx)
    finally:
        writer.close()
    counts = Counter(entry.type.name for entry in entries)
    _tell(ctx, kind, entries, rounding)
    return {
        **facts,
        "types": dict(sorted(counts.items())),
        "relative_error": rounding.relative,
        "worst_relative_error": rounding.worst,
        "worst_tensor": rounding.worst_name,
    }


def beside_gguf(folder: Path) -> int:
    """About how many bytes a file of the model in a folder has beside its weights: names, tokenizer, chat template.

    ConfigError, before any weight is read, for a model that no file of few bits holds.
    """
    try:
        network: Any = load_network(folder, empty=True)
        row = architecture_of(network)
        table = gguf.get_tensor_name_map(row.name, network.config.num_hidden_layers)
        names = [name for name, _ in network.named_parameters()]
        vectors = sum(one.numel() for one in network.parameters() if one.dim() == 1)  # in 32 bits, where ours have 16
        for name, parameter in network.named_parameters():
            _place(table, row, name)
            if parameter.dim() == 2 and parameter.shape[1] % BLOCK:
                told = f"{name} has rows of {parameter.shape[1]} numbers"
                raise ConfigError(f"{told}, and GGUF's types of few bits hold them by blocks of {BLOCK}")
        with tempfile.TemporaryDirectory() as scratch:
            writer = gguf.GGUFWriter(Path(scratch) / FILE, gguf.MODEL_ARCH_NAMES[row.name])
            add_architecture(writer, network, row)
            add_tokenizer(writer, folder, network.config)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
            return (Path(scratch) / FILE).stat().st_size + SOURCE_BYTES + len(names) * ENTRY_BYTES + 2 * vectors
    except ConfigError as error:
        raise ConfigError(str(error).removesuffix(REMEDY)) from None


def _tell(ctx: Context, kind: str, entries: list[Entry], rounding: Rounding) -> None:
    """One line about what the file costs: bytes where it is exact, error where it is not."""
    total = sum(entry.size_bytes for entry in entries)
    if kind != "exact":
        error = f"relative error of the weights {rounding.relative:.2e}, at most {rounding.worst:.2e}"
        ctx.progress.print(f"gguf: {total / 1e6:.1f} MB of {kind} weights, {error} ({rounding.worst_name or 'none'})")
        return
    packed = [entry for entry in entries if entry.packed]
    wide = sum(entry.type == Type.F32 for entry in packed)
    line = f"gguf: {total / 1e6:.1f} MB, every weight exact"
    if wide:
        small = sum(type_bytes(Type.Q8_0 if len(entry.shape) > 1 else entry.type, entry.shape) for entry in entries)
        line += (
            f"; {wide} of {len(packed)} packed weights fit no smaller GGUF type exactly and are F32. "
            f"With --type q8_0 it has about {small / 1e6:.1f} MB and is not exact"
        )
    ctx.progress.print(line)


# ---- what goes where ----------------------------------------------------------------------------------------------
def _plan(folder: Path, network: Any, row: Architecture, kind: str) -> Iterator[Entry]:
    """Every tensor to be written, in the order of `reference.read_stored`."""
    names = canonical_names(network)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    buffers = {name for name, _ in network.named_buffers()}
    table = gguf.get_tensor_name_map(row.name, network.config.num_hidden_layers)
    seen: set[str] = set()
    for name, tensor in reference.read_stored(folder):
        if name in buffers or names.get(name) in seen:
            continue
        if name not in names:
            raise ArtifactError(f"the weight file holds {name!r}, which this architecture has no place for")
        if tuple(tensor.shape) != shapes[names[name]]:
            raise ArtifactError(f"{name} has shape {list(tensor.shape)}, but config.json makes it another")
        seen.add(names[name])
        target = _place(table, row, names[name])
        yield Entry(name, target, _type_of(tensor, kind), tuple(tensor.shape), isinstance(tensor, PackedTensor))
    missing = sorted(set(shapes) - seen)
    if missing:
        raise ArtifactError(f"{folder} holds no weights for {missing[0]} ({len(missing)} tensors missing)")


def _place(table: gguf.TensorNameMap, row: Architecture, name: str) -> str:
    """What a tensor is called in the file."""
    target = table.get_name(name, try_suffixes=(".weight", ".bias"))
    part = target.split(".")[-2] if target else ""
    if target is None or (target.endswith(".bias") and part not in row.biases):
        raise ConfigError(f"GGUF has no place for {name} in this architecture{REMEDY}")
    return target


def _type_of(tensor: PackedTensor | Tensor, kind: str) -> Type:
    if len(tensor.shape) == 1:
        return Type.F32
    if kind == "exact":
        return exact_type(tensor)
    return Type.F16 if kind == "q8_0" and tensor.shape[1] % BLOCK else TYPES[kind]


def exact_type(tensor: PackedTensor | Tensor) -> Type:
    """The smallest GGUF type that holds a weight [rows, columns] bit for bit; the one that it is stored in, if any."""
    if isinstance(tensor, PackedTensor) and isinstance(tensor.parts[0], BlockRows):
        return Type[tensor.parts[0].format.kind]
    values = _values(tensor)
    if isinstance(tensor, PackedTensor) and tensor.shape[1] % BLOCK == 0:
        blocks = blocks_of(tensor)
        for kind in BLOCK_TYPES:
            stored = encode_blocks(*blocks, kind)
            if stored is not None and np.array_equal(gguf.dequantize(stored, kind), values):
                return kind
    exact = torch.from_numpy(values)
    for kind, dtype in ((Type.BF16, torch.bfloat16), (Type.F16, torch.float16)):
        if torch.equal(exact.to(dtype).float(), exact):
            return kind
    return Type.F32


def _values(tensor: PackedTensor | Tensor) -> np.ndarray:
    """float32 values."""
    return (tensor.dequantize() if isinstance(tensor, PackedTensor) else tensor.float()).numpy()


def blocks_of(tensor: PackedTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A packed weight's levels int16 [rows, columns], scales and minimums float32 [rows, columns / 32].

    Values are the products of the first two, plus the minimum where there are minimums.
    """
    rows, columns = tensor.shape
    levels, scales = torch.empty(rows, columns, dtype=torch.int16), torch.empty(rows, columns // BLOCK)
    least = torch.zeros(rows, columns // BLOCK) if any(part.minimums is not None for part in tensor.in_tiles) else None
    for index, part in enumerate(tensor.in_tiles):
        where = slice(None) if tensor.row_part is None else tensor.row_part == index
        group = torch.arange(0, columns, BLOCK) // part.format.group_size
        scales[where] = (part.factors.float()[:, None] * part.scales.float())[:, group]
        if part.codebook is not None:
            levels[where] = part.codebook.to(torch.int16)[part.codes.int()]
        elif part.format.kind in KEPT_BITS:
            levels[where] = part.codes.to(torch.int16) - (part.format.levels // 2 if part.minimums is None else 0)
            if least is not None and part.minimums is not None:
                least[where] = (part.factors.float()[:, None] * part.minimums.float())[:, group]
        else:
            assert part.zeros is not None
            levels[where] = part.codes.to(torch.int16) - part.zeros.to(torch.int16)[:, part.group_of_column]
    return levels.numpy(), scales.numpy(), None if least is None else least.numpy()


def encode_blocks(levels: np.ndarray, scales: np.ndarray, minimums: np.ndarray | None, kind: Type) -> np.ndarray | None:
    """uint8 [rows, bytes] of a type of BLOCK_TYPES with these levels and scales [rows, …]; None when one does not fit.

    With minimums, levels are codes from 0 on.
    """
    bits, zero = BLOCK_TYPES[kind]
    blocks = levels.reshape(-1, BLOCK)
    low = blocks.min(1) if zero == 0 else np.full(len(blocks), -zero, np.int16)
    if minimums is not None:
        if zero:
            return None
        low = np.zeros(len(blocks), np.int16)
    if blocks.min() < low.min() or (blocks.max(1) - low >= 1 << bits).any():
        return None
    exact = np.where(blocks.any(1), scales.reshape(-1), 0)
    wanted = exact * low if minimums is None else minimums.reshape(-1)
    with np.errstate(over="ignore"):
        scale, least = exact.astype(np.float16), wanted.astype(np.float16)
    if (scale != exact).any() or (zero == 0 and (least != wanted).any()):
        return None
    head = [scale[:, None].view(np.uint8)]
    if kind == Type.Q8_0:
        pieces = [*head, blocks.astype(np.int8).view(np.uint8)]
    else:
        codes = (blocks - low[:, None]).astype(np.uint8)
        halves = (codes & 15).reshape(-1, 2, BLOCK // 2)
        head += [least[:, None].view(np.uint8)] if zero == 0 else []
        head += [np.packbits(codes >> 4, axis=1, bitorder="little")] if bits == 5 else []
        pieces = [*head, halves[:, 0] | (halves[:, 1] << 4)]
    return np.concatenate(pieces, axis=1).reshape(len(levels), -1)


def type_bytes(kind: Type, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in a file; a matrix whose columns do not fill blocks counts them as F16."""
    size, stored = gguf.GGML_QUANT_SIZES[Type.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind]
    return math.prod(shape) // size * stored


# ---- writing ------------------------------------------------------------------------------------------------------
def _add_source(writer: gguf.GGUFWriter, model: Artifact, network: Any, entries: list[Entry], ctx: Context) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    origin = _origin(model, ctx)
    source = re.sub(r"@[^/]*$|\.gguf$", "", origin.source if origin else "")
    writer.add_name(re.split(r"[:/]", source)[-1] or f"{network.config.model_type}-{model.id[:12]}")
    writer.add_description(f"exported by Gulliver from artifact {model.id}")
    if origin and origin.license:
        writer.add_license(origin.license)
    largest = max(entries, key=lambda entry: entry.size_bytes).type
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES.get(largest, "GUESSED")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _origin(model: Artifact, ctx: Context) -> Origin | None:
    """What `pull` wrote down about the first model of the lineage; None when it is not known."""
    for manifest in ctx.store.lineage(model.id):
        held = manifest.get("files", {})
        if manifest.get("kind") == "model" and Origin.name_in(held):
            return Origin.of(ctx.store.get(manifest["id"]))
    return None


def _write(
    writer: gguf.GGUFWriter, model: Artifact, network: Any, row: Architecture, entries: list[Entry], ctx: Context
) -> Rounding:
    """Header, then every tensor in the order of `entries`. Returns how much was rounded."""
    factors, rounding = rope_factors(network), Rounding()
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes, Type.F32)
    for entry in entries:
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.size_bytes, entry.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    places = {entry.source: entry for entry in entries}
    with ctx.progress.stage("export", total=len(entries), unit="tensor") as bar:
        for name, tensor in reference.read_stored(model.path):
            if name in places:
                writer.write_tensor_data(_encoded(tensor, places[name], row, network.config, rounding))
                bar.advance(note=name)
    return rounding


def _encoded(
    tensor: PackedTensor | Tensor, entry: Entry, row: Architecture, config: Any, rounding: Rounding
) -> np.ndarray:
    """A tensor's bytes in the file, rows in llama.cpp's order."""
    values = _values(tensor)
    if entry.name.endswith("_norm.weight") and row.norm_offset:
        values = values + np.float32(row.norm_offset)
    stored = None
    if isinstance(tensor, PackedTensor) and isinstance(tensor.parts[0], BlockRows):
        if Type[tensor.parts[0].format.kind] == entry.type:
            stored = tensor.parts[0].blocks.numpy()
    elif entry.type in BLOCK_TYPES and entry.packed:
        stored = encode_blocks(*blocks_of(tensor), entry.type)  # type: ignore[arg-type]
    if stored is None:
        with np.errstate(over="ignore"):
            stored = gguf.quantize(values, entry.type)
    kept = gguf.dequantize(stored, entry.type)
    if not np.isfinite(kept).all():
        raise ConfigError(f"{entry.source} holds values beyond {entry.type.name}; use --type bf16 or exact")
    rounding.add(entry.source, values, kept)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(entry.name.split(".")[-2])
    return permute(stored, heads) if row.permuted and heads else stored
