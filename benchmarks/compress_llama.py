"""A Llama with random weights, written tensor by tensor: as large as one likes, with little memory and no torch."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from compress_common import write_atomic

SHARD_BYTES = 500_000_000
CHUNK = 2_000_000
STANDARD_DEVIATION = 0.02
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Shape:
    """Sizes of the network. The defaults make 1.33 B parameters with a vocabulary of 49,152."""

    layers: int = 24
    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 16


def write_llama(folder: Path, parent: Path, shape: Shape, seed: int = 0) -> int:
    """Write config, bf16 shards and the parent's tokenizer; returns the number of parameters. Nothing if it is there.

    The config is written last, so a folder that has one is whole.
    """
    known = json.loads((parent / "config.json").read_text(encoding="utf-8"))
    tensors = list(_tensors(shape, known["vocab_size"]))
    parameters = sum(math.prod(size) for _, size in tensors)
    if (folder / "config.json").exists():
        return parameters
    folder.mkdir(parents=True, exist_ok=True)
    random, places = np.random.default_rng(seed), {}
    shards = _shards(tensors)
    for index, shard in enumerate(shards, 1):
        name = f"model-{index:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, shard, random)
        places |= {tensor: name for tensor, _ in shard}
    total = {"metadata": {"total_size": 2 * parameters}, "weight_map": places}
    write_atomic(folder / "model.safetensors.index.json", json.dumps(total, indent=1))
    for name in TOKENIZER_FILES:
        if (parent / name).exists():
            shutil.copyfile(parent / name, folder / name)
    write_atomic(folder / "config.json", json.dumps(_config(shape, known), indent=1))
    return parameters


def _config(shape: Shape, parent: dict) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        **{name: parent[name] for name in ("vocab_size", "bos_token_id", "eos_token_id") if name in parent},
    }


def _tensors(shape: Shape, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor."""
    yield "model.embed_tokens.weight", (vocabulary, shape.hidden)
    for layer in range(shape.layers):
        front = f"model.layers.{layer}"
        for name in ("q", "k", "v", "o"):
            yield f"{front}.self_attn.{name}_proj.weight", (shape.hidden, shape.hidden)
        yield f"{front}.mlp.gate_proj.weight", (shape.intermediate, shape.hidden)
        yield f"{front}.mlp.up_proj.weight", (shape.intermediate, shape.hidden)
        yield f"{front}.mlp.down_proj.weight", (shape.hidden, shape.intermediate)
        yield f"{front}.input_layernorm.weight", (shape.hidden,)
        yield f"{front}.post_attention_layernorm.weight", (shape.hidden,)
    yield "model.norm.weight", (shape.hidden,)


def _shards(tensors: list[tuple[str, tuple[int, ...]]]) -> list[list[tuple[str, tuple[int, ...]]]]:
    shards, held = [[]], 0
    for name, size in tensors:
        if shards[-1] and held + 2 * math.prod(size) > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append((name, size))
        held += 2 * math.prod(size)
    return shards


def _write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], random: np.random.Generator) -> None:
    """One safetensors file: length of the header, header, then the values of each tensor, a chunk at a time."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, size in tensors:
        end = offset + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, size in tensors:
            left = math.prod(size)
            while left:
                count = min(left, CHUNK)
                ones = len(size) == 1  # norms start at one
                values = np.ones(count) if ones else STANDARD_DEVIATION * random.standard_normal(count, dtype="f4")
                file.write((values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes())  # cut to bfloat16
                left -= count
