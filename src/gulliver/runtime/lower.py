"""Lowering: a model folder to a static native program.

Nothing is repacked: the native code reads tiles as they lie in the file. What cannot be lowered raises NotLowered
with the reason, and runs on the reference backend.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gulliver.core.errors import ArtifactError, BudgetError
from gulliver.core.store.manifest import read_json
from gulliver.nets.files import ITEM_BYTES, Stored, not_finite, stored_tensors
from gulliver.runtime.formats import ALIGNMENT, KEPT_BITS, SIDE_BYTES, TILE_ROWS, Format
from gulliver.runtime.packing import is_packed, order_of_use, read_packing
from gulliver.runtime.rope import UnknownRope, frequencies, number, rope_parameters

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM")
ACTIVATIONS = {"silu": False, "gelu_pytorch_tanh": True}
"""Activation of the gate -> whether it is GELU's tanh form (the other is SiLU)."""
_HEAD_DIM = {"Qwen3ForCausalLM": 128, "Gemma3ForCausalLM": 256}
"""Where a config does not say it, and it is not the hidden size over the heads."""
_WINDOW = 4096  # keys that a layer with a window sees where a config does not say it; null: no window
_KINDS = {"BF16": 0, "F16": 1, "F32": 2}
_INFINITY = {"BF16": (16, 0x7F80), "F16": (16, 0x7C00), "F32": (32, 0x7F800000)}
"""Type -> its bits, and infinity as an integer of so many."""
CHECK_BYTES = 2**18  # so many are in a core's cache when they are looked at again
MAX_CONFIG_BYTES = 16 * 2**20
MAX_LAYERS = 10_000
MAX_WIDTH = 2**18  # most numbers of a layer's input or output; several times what the largest models have
MAX_LENGTH = 2**24  # most tokens of a vocabulary or a context


class NotLowered(Exception):
    """The model has something the native backend does not; the message says what, to follow "because"."""


@dataclass(frozen=True)
class DecoderConfig:
    """What the native program needs to know of a config."""

    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    positions: int
    epsilon: float
    gelu: bool
    attention_scale: float
    embedding_scale: float
    windows: tuple[int, ...]  # keys a layer sees, 0: all
    layer_rope: tuple[int, ...]  # which of `ropes` a layer uses
    ropes: tuple[NDArray[np.float32], ...]  # frequencies, [head_dim / 2] each
    tied: bool

    @property
    def gemma(self) -> bool:
        return self.architecture == "Gemma3ForCausalLM"

    @property
    def norm_offset(self) -> float:
        """Added to a stored norm: Gemma stores its norms' weights less one."""
        return 1.0 if self.gemma else 0.0


def read_config(folder: Path) -> DecoderConfig:
    """The config of a model folder. NotLowered for another architecture, ArtifactError for a damaged file."""
    path = folder / "config.json"
    if not path.is_file():
        raise ArtifactError(f"{folder} has no config.json; it is not a model folder")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ArtifactError(f"{path} has {path.stat().st_size} bytes; at most {MAX_CONFIG_BYTES} are allowed")
    config = read_json(path.read_bytes(), "config.json")
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} is not a JSON object; it is damaged")
    names = config.get("architectures") or []
    architecture = names[0] if isinstance(names, list) and len(names) == 1 else str(names)
    if architecture not in ARCHITECTURES:
        raise NotLowered(f"its architecture is {str(architecture)[:80]}")
    try:
        return _decoder_config(config, architecture)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ArtifactError(f"{path}: a value of {architecture} is missing or invalid: {error!r}") from error
    except UnknownRope as error:
        raise NotLowered(str(error)) from error


def _decoder_config(config: Mapping[str, Any], architecture: str) -> DecoderConfig:
    gemma = architecture == "Gemma3ForCausalLM"
    hidden = number(config, "hidden_size", 1, MAX_WIDTH, whole=True)
    heads = number(config, "num_attention_heads", 1, MAX_WIDTH, whole=True)
    layers = number(config, "num_hidden_layers", 1, MAX_LAYERS, whole=True)
    head_dim = number(config, "head_dim", 1, MAX_WIDTH, _HEAD_DIM.get(architecture, hidden // heads), whole=True)
    kv_heads = number(config, "num_key_value_heads", 1, heads, heads, whole=True)
    key, usual = ("hidden_activation", "gelu_pytorch_tanh") if gemma else ("hidden_act", "silu")
    activation = str(config.get(key, usual))
    if activation not in ACTIVATIONS:
        raise NotLowered(f"its activation is {activation[:80]}")
    if gemma and (config.get("final_logit_softcapping") or config.get("attn_logit_softcapping")):
        raise NotLowered("it caps its logits")
    if gemma and config.get("use_bidirectional_attention"):
        raise NotLowered("it attends in both directions")
    if config.get("quantization_config"):
        raise NotLowered("its weights are packed by another tool")
    if head_dim % 4 or head_dim > 1024:
        raise NotLowered(f"a head has {head_dim} numbers, which is not a multiple of 4 up to 1024")
    if heads * head_dim > MAX_WIDTH or heads % kv_heads:
        told = f"{heads} heads of {head_dim} numbers and {kv_heads} of keys do not fit together"
        raise ArtifactError(f"config.json: {told}; it is damaged")
    windows = _windows(config, architecture, layers)
    ropes = rope_parameters(config, gemma=gemma)
    kinds = list(ropes)
    return DecoderConfig(
        architecture=architecture,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=number(config, "intermediate_size", 1, MAX_WIDTH, whole=True),
        vocabulary=number(config, "vocab_size", 1, MAX_LENGTH, whole=True),
        positions=number(config, "max_position_embeddings", 1, MAX_LENGTH, whole=True),
        epsilon=number(config, "rms_norm_eps", 0.0, 1.0, 1e-6),
        gelu=ACTIVATIONS[activation],
        attention_scale=1.0 / math.sqrt(number(config, "query_pre_attn_scalar", 1e-6, 1e9, 256) if gemma else head_dim),
        embedding_scale=math.sqrt(hidden) if gemma else 1.0,
        windows=windows,
        layer_rope=tuple(1 if window and len(kinds) > 1 else 0 for window in windows),
        ropes=tuple(frequencies(ropes[kind], head_dim) for kind in kinds),
        tied=bool(config.get("tie_word_embeddings", gemma)),
    )


def _windows(config: Mapping[str, Any], architecture: str, layers: int) -> tuple[int, ...]:
    """Keys that each layer sees, 0 for all."""
    window = 0
    if config.get("sliding_window", _WINDOW) is not None:
        window = number(config, "sliding_window", 0, 2**31 - 1, _WINDOW, whole=True)
    full, sliding = "full_attention", "sliding_attention"
    qwen = architecture.startswith("Qwen")
    kinds = config.get("layer_types")
    if architecture == "MistralForCausalLM":
        kinds = [sliding] * layers
    elif architecture == "LlamaForCausalLM" or (qwen and not config.get("use_sliding_window")):
        kinds = [full] * layers
    elif kinds is None and architecture == "Gemma3ForCausalLM":
        pattern = number(config, "sliding_window_pattern", 1, MAX_LAYERS, 6, whole=True)
        kinds = [full if (layer + 1) % pattern == 0 else sliding for layer in range(layers)]
    elif kinds is None:
        first = number(config, "max_window_layers", 0, MAX_LAYERS, 28, whole=True)
        kinds = [sliding if layer >= first else full for layer in range(layers)]
    if len(kinds) != layers or not set(kinds) <= {full, sliding}:
        raise NotLowered(f"it has {len(kinds)} layers of these kinds: {', '.join(sorted(set(map(str, kinds))))[:80]}")
    return tuple(window if kind == sliding else 0 for kind in kinds)


Arrays = dict[str, NDArray[np.uint8]]  # name of a stored tensor -> its bytes


def mapped(stored: Mapping[str, Stored]) -> tuple[Arrays, dict[Path, mmap.mmap]]:
    """The tensors where they lie in their files, read from the disk when they are used; and the maps of the files."""
    maps: dict[Path, mmap.mmap] = {}
    for path in {tensor.path for tensor in stored.values()}:
        with open(path, "rb") as stream:
            maps[path] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    files = {path: np.frombuffer(whole, np.uint8) for path, whole in maps.items()}
    return {name: files[at.path][at.offset : at.offset + at.length] for name, at in stored.items()}, maps


def read_into_huge_pages(stored: Mapping[str, Stored]) -> Arrays:
    """The tensors in memory of our own: each begins at a cache line, in pages of 2 MB where the kernel has them.

    One core reads such memory up to half faster than a mapped file: there are fewer address lookups, the prefetcher
    (which stops at the end of a page) seldom stops, and a load of 64 bytes never touches two cache lines.

    BudgetError when the system has too little memory.
    """
    places, size = {}, 0
    for name, tensor in sorted(stored.items(), key=lambda row: order_of_use(row[0])):
        places[name], size = size, size + -(-tensor.length // ALIGNMENT) * ALIGNMENT
    try:
        memory = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | getattr(mmap, "MAP_ANONYMOUS", 0))
    except OSError as error:
        told = f"the system gives no {size / 1e6:.0f} MB for the weights ({error}); free memory, or limit it with --ram"
        raise BudgetError(told) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    arrays = {name: whole[places[name] : places[name] + tensor.length] for name, tensor in stored.items()}
    with contextlib.ExitStack() as stack:
        paths = {tensor.path for tensor in stored.values()}
        files = {path: stack.enter_context(open(path, "rb", buffering=0)) for path in paths}
        for name, tensor in stored.items():
            stream, view, at = files[tensor.path], arrays[name].data, 0
            stream.seek(tensor.offset)
            while at < tensor.length and (count := stream.readinto(view[at : at + 2**26])):
                at += count
            if at != tensor.length:
                raise ArtifactError(f"{tensor.path} became shorter while it was read")
    return arrays


class Weights:
    """The tensors of a folder, mapped `in_place` or read into memory; each that is asked for is counted as used."""

    def __init__(self, folder: Path, *, in_place: bool) -> None:
        self.folder = folder
        self.stored = stored_tensors(folder)
        self.packing = read_packing(folder) if is_packed(folder) else {}
        if twice := sorted(set(self.packing) & set(self.stored)):
            raise ArtifactError(f"{twice[0][:200]!r} is stored both packed and plain; the files do not belong together")
        self.arrays, self.maps = mapped(self.stored) if in_place else (read_into_huge_pages(self.stored), {})
        self.used: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self.stored or name in self.packing

    def raw(self, name: str, shape: tuple[int, ...], dtypes: Collection[str]) -> NDArray[np.uint8]:
        """The bytes of a stored tensor, uint8 [length]. ArtifactError if it is missing, not finite, or of another shape

        or type.
        """
        if name not in self.stored:
            raise ArtifactError(f"the weight files of {self.folder} lack {name}; the model is damaged")
        stored = self.stored[name]
        if stored.shape != shape or stored.dtype not in dtypes:
            told = f"{name} is {stored.dtype} {list(stored.shape)}, not {' or '.join(dtypes)} {list(shape)}"
            raise ArtifactError(f"{told}; the model is damaged")
        self.used.add(name)
        if stored.dtype in _KINDS:
            if not all_finite(self.arrays[name], stored.dtype):
                raise not_finite(name, stored.path)
            self._give_back(stored)
        return self.arrays[name]

    def vector(self, name: str, length: int, *, plus: float = 0.0) -> NDArray[np.float32]:
        """A plain vector as float32 [length], `plus` added to every number. ArtifactError for another shape or type."""
        data = self.raw(name, (length,), _KINDS)
        return as_float32(data, self.stored[name].dtype) + np.float32(plus)

    def matrix(self, native: Any, name: str, rows: int, columns: int) -> int:
        """The native handle of a weight, packed or plain."""
        if name in self.packing:
            return self._packed(native, name, rows, columns)
        data, stored = self.raw(name, (rows, columns), _KINDS), self.stored[name]
        if data.ctypes.data % ITEM_BYTES[stored.dtype]:
            told = f"{name} is not aligned: it starts at byte {stored.offset} of its file"
            raise ArtifactError(f"{told}; write the file again with safetensors, or allow more memory")
        return native.plain(data.reshape(rows, -1), _KINDS[stored.dtype])

    def _packed(self, native: Any, name: str, rows: int, columns: int) -> int:
        entry = self.packing[name]
        formats = entry.parts
        if entry.shape != (rows, columns) or entry.inputs not in (None, 1):
            raise ArtifactError(f"{name} is packed as {list(entry.shape)}, config.json makes it [{rows}, {columns}]")
        self.used.add(name)
        if any(fmt.block for fmt, _ in formats):
            return native.plain(self._from_blocks(name, columns, formats).view(np.uint8), _KINDS["F32"])
        parts = []
        for index, (fmt, count) in enumerate(formats):
            size = (-(-count // TILE_ROWS), fmt.tile_bytes(columns))
            tiles = self.raw(f"{name}.tiles.{index}", size, ("U8",)).reshape(size)
            codebook = None
            if fmt.kind == "codebook":
                codebook = self.raw(f"{name}.codebook.{index}", (fmt.levels,), ("I8",)).copy().view(np.int8)
            self._check_factors(f"{name}.tiles.{index}", tiles, fmt, columns, count)
            parts.append((tiles, count, fmt.bits, fmt.group_size, codebook))
            if fmt.kind in KEPT_BITS:
                if len(formats) > 1:
                    raise NotLowered(f"{name} has kept blocks beside other parts")
                return native.kept(tiles, rows, columns, fmt.bits, fmt.group_size, fmt.kind == "minimum")
        part_of_row = None
        if len(parts) > 1:
            part_of_row = self.raw(f"{name}.rows", (rows,), ("U8",)).copy()
            counts = np.bincount(part_of_row, minlength=len(parts)).tolist()
            if counts != [count for _, count in formats]:
                raise ArtifactError(f"{name}.rows deals out {counts} rows; packing.json says otherwise")
        return native.packed(parts, columns, part_of_row)

    def _from_blocks(self, name: str, columns: int, formats: list[tuple[Format, int]]) -> NDArray[np.float32]:
        """The values [rows, columns] of a weight in GGUF's blocks, for which there are no kernels."""
        from gulliver.runtime.blocks import dequantized  # here, because other models have no use for it

        (fmt, rows), *others = formats
        if others or not fmt.holds(columns):
            raise ArtifactError(f"{name} does not fit into whole blocks of {fmt.name}; the model is damaged")
        size = (rows, fmt.packed_bytes(1, columns))
        return dequantized(self.raw(f"{name}.tiles.0", size, ("U8",)).reshape(size), fmt)

    def _check_factors(self, name: str, tiles: NDArray[np.uint8], fmt: Format, columns: int, rows: int) -> None:
        """ArtifactError for a factor of a row in use, or a float16 scale, that is not finite."""
        at = fmt.factors_at(columns)
        if fmt.kind in KEPT_BITS:
            sides = tiles[:, at - fmt.groups(columns) * TILE_ROWS * SIDE_BYTES[fmt.kind] : at].copy().view("<u2")
            if ((sides & 0x7C00) == 0x7C00).any():
                raise ArtifactError(f"{name} has a scale that is not finite; the model is damaged")
        factors = tiles[:, at : at + 32].copy().view("<u2").reshape(-1)[:rows]
        if ((factors & 0x7F80) == 0x7F80).any():
            raise ArtifactError(f"{name} has a row factor that is not finite; the model is damaged")
        self._give_back(self.stored[name])

    def _give_back(self, stored: Stored) -> None:
        """Let go of the pages of a mapped file that a check has read."""
        if stored.path in self.maps:
            start = stored.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self.maps[stored.path].madvise(mmap.MADV_DONTNEED, start, stored.offset + stored.length - start)


def all_finite(data: NDArray[np.uint8], dtype: str) -> bool:
    """Whether stored bytes [n · item bytes] of the type BF16, F16 or F32 are finite numbers alone.

    An exponent of all ones is the largest there is: of the positive ones as signed integers, of the negative ones as
    unsigned integers.
    """
    bits, infinity = _INFINITY[dtype]
    for start in range(0, len(data), CHECK_BYTES):
        part = data[start : start + CHECK_BYTES]
        positive, any_sign = part.view(f"<i{bits // 8}"), part.view(f"<u{bits // 8}")
        if positive.max() >= infinity or any_sign.max() >= infinity + (1 << (bits - 1)):
            return False
    return True


def as_float32(data: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Stored bytes [n · item bytes] of the type BF16, F16 or F32 as float32 [n]."""
    if dtype == "BF16":
        return (data.copy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.copy().view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def build(weights: Weights, config: DecoderConfig, native: Any) -> None:
    """Hand every weight to the native program. NotLowered when tensors are left over."""
    for rope in config.ropes:
        native.rope(rope, 1.0)
    for layer in range(config.layers):
        _layer(weights, config, native, layer)
    embedding = weights.matrix(native, "model.embed_tokens.weight", config.vocabulary, config.hidden)
    head = embedding
    if weights.has("lm_head.weight"):
        head = weights.matrix(native, "lm_head.weight", config.vocabulary, config.hidden)
    elif not config.tied:
        raise ArtifactError(f"the weight files of {weights.folder} lack lm_head.weight; the model is damaged")
    native.finish(embedding, weights.vector("model.norm.weight", config.hidden, plus=config.norm_offset), head)
    there = {*weights.stored, *weights.packing}
    left = sorted(name for name in there - weights.used if not name.endswith("rotary_emb.inv_freq"))
    if left:
        raise NotLowered(f"it has {left[0][:200]}, which the native backend does not use")


def _layer(weights: Weights, config: DecoderConfig, native: Any, layer: int) -> None:
    at, hidden, gemma = f"model.layers.{layer}.", config.hidden, config.gemma
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    rows = {"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": key}
    head_norms = config.architecture in ("Qwen3ForCausalLM", "Gemma3ForCausalLM")
    biases = config.architecture == "Qwen2ForCausalLM"

    def norm(name: str, length: int = hidden) -> NDArray[np.float32]:
        return weights.vector(f"{at}{name}.weight", length, plus=config.norm_offset)

    def matrix(name: str, rows: int, columns: int) -> int:
        return weights.matrix(native, f"{at}{name}.weight", rows, columns)

    native.layer(
        rope=config.layer_rope[layer],
        window=config.windows[layer],
        attention_norm=norm("input_layernorm"),
        mlp_norm=norm("pre_feedforward_layernorm" if gemma else "post_attention_layernorm"),
        qkv=[matrix(name, count, hidden) for name, count in rows.items()],
        out=matrix("self_attn.o_proj", hidden, query),
        gate_up=[matrix(name, config.intermediate, hidden) for name in ("mlp.gate_proj", "mlp.up_proj")],
        down=matrix("mlp.down_proj", hidden, config.intermediate),
        after_attention=norm("post_attention_layernorm") if gemma else None,
        after_mlp=norm("post_feedforward_layernorm") if gemma else None,
        query_norm=norm("self_attn.q_norm", config.head_dim) if head_norms else None,
        key_norm=norm("self_attn.k_norm", config.head_dim) if head_norms else None,
        bias=np.concatenate([weights.vector(f"{at}{name}.bias", count) for name, count in rows.items()])
        if biases
        else None,
    )
