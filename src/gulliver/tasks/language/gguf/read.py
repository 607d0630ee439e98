"""A GGUF file as a Hugging Face layout folder: config, tokenizer and bfloat16 weights, one tensor in memory at a time.

Llama-type architectures only. Reading undoes llama.cpp's order of the rows of q and k (architectures.py). Llama 3 files
carry `rope_freqs`, the divisors of the rotary frequencies, which transformers expresses as rope type "longrope" with
the same factors for short and long texts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from torch import Tensor

from gulliver.core.errors import ArtifactError
from gulliver.core.names import unknown
from gulliver.runtime.shards import write_tensors
from gulliver.tasks.language.gguf.architectures import ARCHITECTURES, ROPE_FACTORS, unpermute
from gulliver.tasks.text.network import write_config

READ = {row.read_as: name for name, row in ARCHITECTURES.items() if row.read_as}
"""GGUF architecture, which is also transformers' model type -> transformers' class."""

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_LAYER = {
    **{"attn_norm": "input_layernorm", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm"},
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in ("q", "k", "v")},
    **{f"attn_{part}_norm": f"self_attn.{part}_norm" for part in ("q", "k")},
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


def convert_gguf(path: Path, folder: Path) -> str:
    """Write config.json, the tokenizer's files and model.safetensors (bfloat16) of the GGUF at `path` into `folder`.

    Returns the format of most of its bytes, for example "GGUF Q4_1".
    ArtifactError for a damaged file, another architecture, experts, or a tensor that has no place.
    """
    reader = _open(path)
    config = _config(reader, path)
    write_config(config, folder, torch.bfloat16)
    _write_tokenizer(path, folder)
    tensors = {_name(tensor.name, path): tensor for tensor in reader.tensors if tensor.name != ROPE_FACTORS}
    rows = {name: (torch.bfloat16, tuple(map(int, reversed(tensors[name].shape)))) for name in sorted(tensors)}
    with open(folder / "model.safetensors", "wb") as stream:
        write_tensors(stream, rows, _values(tensors, config, path))
    sizes = Counter[str]()
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    return f"GGUF {sizes.most_common(1)[0][0]}"


def _open(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError, OverflowError, UnicodeDecodeError, TypeError) as error:
        raise ArtifactError(f"{path} is not a readable GGUF file: {error}; download it again") from error


def _values(tensors: dict[str, gguf.ReaderTensor], config: Any, path: Path) -> Iterator[tuple[str, Tensor]]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in tensors.items():
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError, KeyError) as error:
            raise ArtifactError(f"{path}: {tensor.name} has type {tensor.tensor_type.name}, unknown here") from error
        if not np.isfinite(values).all():
            raise ArtifactError(f"{path}: {tensor.name} holds values that are not finite; the file is damaged")
        part = tensor.name.split(".")[-2]
        if ARCHITECTURES[config.architectures[0]].permuted and part in heads:
            values = unpermute(values, heads[part])
        yield name, torch.from_numpy(np.require(values, np.float32, ["C", "W"])).to(torch.bfloat16)


def _name(name: str, path: Path) -> str:
    top, _, leaf = name.partition(".")
    if top in TOP and leaf in ("weight", "bias"):
        return f"{TOP[top]}.{leaf}"
    found = re.fullmatch(r"blk\.(\d{1,5})\.(\w+)\.(weight|bias)", name)
    if not found or found[2] not in IN_LAYER:
        raise ArtifactError(f"{path} holds a tensor {name!r} that a Llama-type model has no place for")
    return f"model.layers.{found[1]}.{IN_LAYER[found[2]]}.{found[3]}"


# ---- config -------------------------------------------------------------------------------------------------------
def _config(reader: gguf.GGUFReader, path: Path) -> Any:
    meta = _Metadata(reader, path)
    architecture = str(meta.get("general.architecture"))
    if architecture not in READ:
        raise ArtifactError(f"{path}: {unknown('GGUF architecture', architecture, READ)}")
    meta.prefix = architecture
    if meta.get("expert_count", 0):
        raise ArtifactError(f"{path} is a mixture of experts, which is not read from GGUF; use the original model")
    if int(meta.get("split.count", 1)) > 1:
        raise ArtifactError(f"{path} is one part of several; join them first (llama-gguf-split --merge)")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise ArtifactError(f"{path} holds no token_embd.weight; it is not a language model's file")
    heads, width = int(meta.get("attention.head_count")), int(meta.get("embedding_length"))
    head_dim = meta.get("attention.key_length", meta.get("rope.dimension_count", width // max(heads, 1)))
    options: dict[str, Any] = {
        "architectures": [READ[architecture]],
        "hidden_size": width,
        "intermediate_size": int(meta.get("feed_forward_length")),
        "num_hidden_layers": int(meta.get("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(meta.get("attention.head_count_kv", heads)),
        "head_dim": int(head_dim),
        "max_position_embeddings": int(meta.get("context_length")),
        "rms_norm_eps": float(meta.get("attention.layer_norm_rms_epsilon")),
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _rope(meta, tensors),
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        value = int(meta.get(f"tokenizer.ggml.{key}_token_id", -1))
        options[f"{role}_token_id"] = None if value < 0 else value
    if architecture == "llama":
        options["attention_bias"] = "blk.0.attn_q.bias" in tensors
        options["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if architecture == "mistral":
        options["sliding_window"] = meta.get("attention.sliding_window", None)
    return transformers.AutoConfig.for_model(architecture, **options)


class _Metadata:
    """The key-value pairs of a GGUF file."""

    def __init__(self, reader: gguf.GGUFReader, path: Path) -> None:
        self.fields, self.path, self.prefix = reader.fields, path, ""

    def get(self, key: str, default: Any = ...) -> Any:
        """The value of `key`, as it is or below the architecture's name; ArtifactError without a default."""
        for name in (key, f"{self.prefix}.{key}"):
            if name in self.fields:
                return self.fields[name].contents()
        if default is ...:
            raise ArtifactError(f"{self.path} does not say {key}; the file is damaged or too old")
        return default


def _rope(meta: _Metadata, tensors: dict[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(meta.get("rope.freq_base", 10000.0))}
    if ROPE_FACTORS in tensors:
        factors = [float(value) for value in tensors[ROPE_FACTORS].data]
        rope |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
        rope |= {"factor": 1.0, "attention_factor": 1.0}
        return rope | {"original_max_position_embeddings": int(meta.get("context_length"))}
    kind = meta.get("rope.scaling.type", "none")
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise ArtifactError(f"{meta.path} scales its rotary embedding by {kind!r}; known are 'linear' and 'yarn'")
    rope |= {"rope_type": kind, "factor": float(meta.get("rope.scaling.factor"))}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = int(meta.get("rope.scaling.original_context_length"))
    return rope


# ---- tokenizer ----------------------------------------------------------------------------------------------------
def _write_tokenizer(path: Path, folder: Path) -> None:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ArtifactError(f"{path} describes no tokenizer transformers can build: {error}") from error
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    raw = json.loads(config.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only"):  # where it was read from, not what it is
        raw.pop(key, None)
    config.write_text(json.dumps(raw, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
