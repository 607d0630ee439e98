"""Networks that transformers knows: fresh ones, and their files: config, weights by their first names, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gulliver.core.records import NOT_COPIED
from gulliver.nets.files import copy_companions, plain_files
from gulliver.nets.weights import aliases
from gulliver.runtime.shards import write_file
from gulliver.tasks.text.tokenizer import BYTE_VOCABULARY, write_byte_tokenizer


def fresh_network(kind: Any, size: int, **more: Any) -> nn.Module:
    """A network of a class of transformers that reads bytes: `size` + 1 layers and heads, width 32 · (size + 1).

    Weights are random, float32; `more` is the rest of its config.
    """
    layers = size + 1
    sizes = {"hidden_size": 32 * layers, "intermediate_size": 96 * layers, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": layers, "vocab_size": BYTE_VOCABULARY}
    model = kind(kind.config_class(**sizes, architectures=[kind.__name__], dtype=torch.float32, **more))
    model.source_folder = ""
    return model


def save_network(model: nn.Module, folder: Path) -> None:
    """Write config.json, model.safetensors (canonical names, the parameters' dtype) and the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: model.get_parameter(name).detach().contiguous() for name in aliases(model)}
    persistent = set(model.state_dict(keep_vars=True))
    tensors |= {name: buffer.contiguous() for name, buffer in model.named_buffers() if name in persistent}
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    assert not empty, f"cannot save a network without weights: {empty[0]} holds no data"
    write_config(model.config, folder, next(tensors[name].dtype for name in tensors))
    write_file(folder / "model.safetensors", tensors)
    source = getattr(model, "source_folder", "")
    if source:
        if Path(source).resolve() != folder.resolve():
            copy_companions(plain_files(Path(source)), folder, ("config.json", *NOT_COPIED))
    else:
        write_byte_tokenizer(folder)


def write_config(config: Any, folder: Path, dtype: torch.dtype) -> None:
    """config.json with `dtype` and without machine-dependent entries, so that equal models have equal files."""
    raw = json.loads(config.to_json_string(use_diff=True))
    for key in ("_name_or_path", "_model_name_or_path", "_commit_hash", "transformers_version", "torch_dtype"):
        raw.pop(key, None)
    raw["dtype"] = str(dtype).removeprefix("torch.")
    text = json.dumps(raw, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
