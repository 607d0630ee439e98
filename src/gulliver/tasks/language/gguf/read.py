"""A GGUF file (or its parts) as a Hugging Face layout folder: config, tokenizer, weights; two tensors in memory.

Which parameter a tensor is, gguf's own table of names says, asked with the names of the empty network. What differs
besides: llama.cpp's order of the rows of q and k (architectures.py); norms that hold 1 + w; experts, whose gates and
ups transformers keeps in one tensor; and gpt-oss, which transformers keeps transposed, gates and ups taking turns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from torch import Tensor, nn

from gulliver.core.errors import ArtifactError
from gulliver.core.foreign import foreign
from gulliver.core.records import PackedPart, PackedWeight, Packing
from gulliver.core.store.manifest import rows_of
from gulliver.nets.quiet import quiet
from gulliver.nets.weights import Room, empty_parameters
from gulliver.runtime.formats import ALIGNMENT, TILE_ROWS, Format
from gulliver.runtime.packing import order_of_use
from gulliver.runtime.shards import write_tensors
from gulliver.tasks.family import Converted
from gulliver.tasks.language.gguf.architectures import unpermute
from gulliver.tasks.language.gguf.config import (
    FACTORS,
    LONG_FACTORS,
    READ,
    ROPE_FACTORS,
    SHORT_FACTORS,
    Reading,
    checked,
    rope_factor_tensors,
)
from gulliver.tasks.language.gguf.decode import decode, dtype_of, not_finite, raw_blocks
from gulliver.tasks.language.gguf.header import Header, TensorInfo
from gulliver.tasks.language.gguf.kept import format_of, holds, keep
from gulliver.tasks.language.gguf.tokenizer import write_tokenizer
from gulliver.tasks.text.network import write_config

NEAR = 0.2
"""Two tensors whose difference is below this share of their size are one tensor, rounded twice."""


def convert_gguf(path: Path, folder: Path) -> Converted:
    """Write config.json, the tokenizer's files and model.safetensors of the GGUF at `path` into `folder`.

    ArtifactError for a damaged file, another architecture, or a tensor that has no place.
    """
    with foreign(f"{path} cannot be converted", remedy="; the file is damaged, or of a kind that is not known here"):
        return _converted(path, folder)


def _converted(path: Path, folder: Path) -> Converted:
    header, options = checked(path)
    row = READ[header.metadata["general.architecture"]]
    note = _settle_head(header, options)
    options["rope_parameters"] = _with_factors(header, options["rope_parameters"])
    options |= write_tokenizer(header, folder)
    network = _empty(header, options)
    places = list(_places(header, network, row))
    largest = Counter[torch.dtype]()
    for place in places:
        largest[place.dtype] += math.prod(place.shape)
    write_config(network.config, folder, largest.most_common(1)[0][0])
    _write_weights(places, folder)
    sizes = Counter[str]()
    for tensor in header.tensors.values():
        sizes[tensor.type.name] += tensor.length
    return Converted(
        format=f"GGUF {sizes.most_common(1)[0][0]}",
        files=header.files,
        name=name_of(header),
        weights=sum(parameter.numel() for parameter in network.parameters()),
        note=note,
    )


def _write_weights(places: Sequence[Place], folder: Path) -> None:
    """model.safetensors, and packing.json where weights stay packed; two tensors are in memory at a time."""
    order = sorted(places, key=lambda place: order_of_use(place.name))
    kept = {place.name: fmt for place in order if (fmt := place.kept_as()) is not None}
    packing = {
        place.name: PackedWeight(
            shape=place.shape,
            parts=(PackedPart(format=kept[place.name].name, rows=place.matrix[0]),),
            inputs=place.inputs,
        )
        for place in order
        if place.name in kept
    }
    rows: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    for place in sorted(order, key=lambda place: place.name not in kept):
        if place.name in kept:
            rows[f"{place.name}.tiles.0"] = (torch.uint8, place.tiled(kept[place.name]))
        else:
            rows[place.name] = (place.dtype, place.shape)
    names = [f"{place.name}.tiles.0" if place.name in kept else place.name for place in order]
    tensors = _one_ahead(place.tiles if place.name in kept else place.read for place in order)
    with open(folder / "model.safetensors", "wb") as stream:
        write_tensors(stream, rows, zip(names, tensors, strict=True), alignment=ALIGNMENT)
    if packing:
        Packing(tensors=packing).write(folder)


def _one_ahead(work: Iterable[Callable[[], Tensor]]) -> Iterator[Tensor]:
    """What each of `work` gives, in order; the next is made while one is used."""
    with ThreadPoolExecutor(1) as pool:
        before = None
        for one in work:
            after = pool.submit(one)
            if before is not None:
                yield before.result()
            before = after
        if before is not None:
            yield before.result()


def name_of(header: Header) -> str | None:
    """What the file itself calls its model: its name, or its family and size; None when it says neither."""
    meta = {key: value for key, value in header.metadata.items() if isinstance(value, str) and value.strip()}
    parts = [meta.get(f"general.{key}", "") for key in ("basename", "size_label", "finetune", "version")]
    given = meta.get("general.name", "-".join(part for part in parts if part) if parts[0] else "")
    found = " ".join("".join(one if one.isprintable() else " " for one in given).split())
    return found[:100] or None


# ---- config ---------------------------------------------------------------------------------------------------------
def _with_factors(header: Header, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding's config with the divisors that the file stores as tensors."""
    found = {
        name: decode(tensor, torch.float32).flatten().tolist() for name, tensor in rope_factor_tensors(header).items()
    }
    if not found:
        return dict(rope)
    both = found.get(ROPE_FACTORS)
    return {**rope, "short_factor": found.get(SHORT_FACTORS, both), "long_factor": found.get(LONG_FACTORS, both)}


def _empty(header: Header, options: Mapping[str, Any]) -> nn.Module:
    """The network that the options describe, its parameters without data."""
    given = {key: value for key, value in options.items() if key != "model_type"}
    room = Room.of(len(header.tensors), sum(tensor.length for tensor in header.tensors.values()))
    with foreign(f"{header.path} describes no network"), quiet(), empty_parameters(room):
        config = transformers.AutoConfig.for_model(options["model_type"], **given)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _settle_head(header: Header, options: dict[str, Any]) -> str:
    """Whether a stored output head is the embedding again: equal ones are tied. Returns what there is to say of it."""
    embedding, head = header.tensors["token_embd.weight"], header.tensors.get("output.weight")
    if head is None or head.shape != embedding.shape:
        return ""
    rows = [replace_rows(tensor, 256) for tensor in (embedding, head)]
    one, other = (decode(tensor, torch.float32) for tensor in rows)
    apart = float((one - other).norm() / one.norm().clamp_min(1e-30))
    if apart > NEAR:
        return ""
    finer, coarser = sorted((head, embedding), key=lambda tensor: -tensor.length)
    if apart == 0.0 and torch.equal(decode(embedding, torch.bfloat16), decode(head, torch.bfloat16)):
        options["tie_word_embeddings"] = True
        return "output.weight repeats token_embd.weight; the two are one tensor now"
    told = f"{finer.name} ({finer.type.name}) is a finer copy of {coarser.name} ({coarser.type.name})"
    if finer.length == coarser.length:
        told = f"{head.name} ({head.type.name}) is nearly {embedding.name} ({embedding.type.name})"
    return f"{told}, {apart:.1%} apart; both are kept, as the file's own engine computes with both"


def replace_rows(tensor: TensorInfo, count: int) -> TensorInfo:
    """The first `count` rows of a tensor [rows, columns]."""
    rows = min(count, tensor.shape[0])
    return TensorInfo(
        tensor.name, tensor.type, (rows, *tensor.shape[1:]), tensor.path, tensor.offset,
        tensor.length // tensor.shape[0] * rows,
    )  # fmt: skip


# ---- which tensor is which ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Place:
    """A parameter of the network, and the tensors that it is made of.

    `heads`: rows lie in llama.cpp's order for so many heads; `offset` comes off the values; `turned`: the parameter is
    the transpose of what is stored, per expert.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[TensorInfo, ...]
    heads: int = 0
    offset: float = 0.0
    turned: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """What the values become: float32 where an offset comes off."""
        found = {dtype_of(source) for source in self.sources}
        return torch.float32 if self.offset or len(found) > 1 else found.pop()

    @property
    def inputs(self) -> int | None:
        """The dimension of the inputs of a stack of experts [experts, rows, columns]; None for a single matrix."""
        return 2 if len(self.shape) == len(self.sources[0].shape) == 3 else None

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the parameter as it is packed: a stack's matrices lie below each other."""
        rows = rows_of(self.shape, self.inputs)
        return rows, math.prod(self.shape) // rows

    def tiled(self, fmt: Format) -> tuple[int, int]:
        """(tiles, bytes of one) of the parameter in a format."""
        rows, columns = self.matrix
        return -(-rows // TILE_ROWS), fmt.tile_bytes(columns)

    def kept_as(self) -> Format | None:
        """The format in which the weight stays packed; None where it cannot, or would take more than 16 bits.

        That is so where a few rows leave most of a tile empty.
        """
        kinds = {source.type for source in self.sources}
        if len(kinds) > 1 or len(self.shape) < 2 or self.turned or self.offset:
            return None
        (kind,) = kinds
        fmt = format_of(kind)
        if fmt is None or math.prod(self.tiled(fmt)) >= 2 * math.prod(self.shape):
            return None
        return fmt if all(holds(kind, raw_blocks(source)) for source in self.sources) else None

    def tiles(self) -> Tensor:
        """The packed weight, uint8 [tiles, bytes of one]."""
        rows, columns = self.matrix
        kind = self.sources[0].type
        parts = [raw_blocks(source).reshape(self.shape[0], -1) for source in self.sources]  # gates, then ups, of each
        blocks = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        if self.heads:
            blocks = unpermute(torch.from_numpy(np.array(blocks)), self.heads).numpy()
        try:
            return keep(kind, blocks.reshape(rows, -1), columns)
        except ValueError:
            raise not_finite(self.sources[0]) from None

    def read(self) -> Tensor:
        """The parameter's values [rows, …], of its shape and dtype."""
        parts = [decode(source, self.dtype) for source in self.sources]
        if len(parts) == 2:
            values = torch.stack(parts, -1).flatten(-2) if self.turned and parts[0].dim() == 2 else self._joined(parts)
        else:
            values = parts[0].transpose(-1, -2) if self.turned and parts[0].dim() == 3 else parts[0]
        if self.heads:
            values = unpermute(values, self.heads)
        return (values - self.offset if self.offset else values).reshape(self.shape)

    def _joined(self, parts: list[Tensor]) -> Tensor:
        if self.turned:  # rows take turns: gate 0, up 0, gate 1, …; then columns become rows
            return torch.stack(parts, 2).flatten(1, 2).transpose(-1, -2)
        return torch.cat(parts, 1)


def _places(header: Header, network: nn.Module, row: Reading) -> Iterator[Place]:
    """Every parameter with what it is made of. ArtifactError for one that is missing, and for a tensor left over."""
    config: Any = network.config
    table = gguf.get_tensor_name_map(_architecture(header), config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if row.permuted else {}
    used: set[str] = set(FACTORS)
    if config.tie_word_embeddings:
        used.add("output.weight")
    persistent = network.state_dict(keep_vars=True)
    stored = [
        *network.named_parameters(),
        *((name, one) for name, one in network.named_buffers() if name in persistent),
    ]
    for name, parameter in stored:
        sources = _sources(header, table, name)
        used |= {source.name for source in sources}
        part = sources[0].name.split(".")[-2]
        turned = row.model_type == "gpt_oss" and ".experts." in name
        offset = row.norm_offset if name.endswith("norm.weight") else 0.0
        place = Place(name, tuple(parameter.shape), sources, heads.get(part, 0), offset, turned)
        if sum(math.prod(source.shape) for source in sources) != parameter.numel():
            shapes = " and ".join(str(list(source.shape)) for source in sources)
            told = f"{header.path}: {sources[0].name} has shape {shapes}, the metadata make it {list(parameter.shape)}"
            raise ArtifactError(f"{told}; the file is damaged")
        yield place
    left = [name for name in header.tensors if name not in used]
    if left:
        told = f"{header.path} holds a tensor {left[0][:200]!r} that a {type(network).__name__} has no place for"
        raise ArtifactError(f"{told} ({len(left)} such)")


def _architecture(header: Header) -> gguf.MODEL_ARCH:
    name = header.metadata["general.architecture"]
    names = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}
    return names.get(name, gguf.MODEL_ARCH.LLAMA)


def _sources(header: Header, table: gguf.TensorNameMap, name: str) -> tuple[TensorInfo, ...]:
    """The stored tensors that make up a parameter: one, or gates and ups."""
    layer = ".".join(name.split(".")[:3])
    leaf = "bias" if name.endswith("bias") and "expert_bias" not in name else "weight"
    number = layer.rpartition(".")[2]
    if name.endswith(("experts.gate_up_proj", "experts.gate_up_proj_bias")):
        pairs = [
            (f"blk.{number}.ffn_gate_exps.{leaf}", f"blk.{number}.ffn_up_exps.{leaf}"),
            (f"blk.{number}.ffn_gate_up_exps.{leaf}",),
        ]
    elif name.endswith(("experts.down_proj", "experts.down_proj_bias")):
        pairs = [(f"blk.{number}.ffn_down_exps.{leaf}",)]
    elif name.endswith("router.weight"):
        pairs = [(f"blk.{number}.ffn_gate_inp.weight",)]
    else:
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        pairs = [(found,), (f"{found}.weight",), (f"{found}.bias",)] if found else []
    for pair in pairs:
        if all(one in header.tensors for one in pair):
            return tuple(header.tensors[one] for one in pair)
    wanted = f" ({pairs[0][0]})" if pairs else ""
    raise ArtifactError(f"{header.path} holds no weights for {name}{wanted}; the file is damaged or of another kind")
