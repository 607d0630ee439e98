"""Tiny random decoders of every architecture that the native path knows, plain and packed, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

from gulliver.core.records import Packing
from gulliver.runtime.formats import Format
from gulliver.runtime.packed import PackedTensor, RowGroup
from gulliver.runtime.reference import packing_entry, stored_form

SIZES: dict[str, Any] = {
    "vocab_size": 203,
    "hidden_size": 72,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 192,
    "head_dim": 20,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama3": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=24),
    "qwen2": lambda: Qwen2Config(**{**SIZES, "hidden_size": 120}),
    "qwen3": lambda: Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, sliding_window=24, layer_types=KINDS),
}  # fmt: skip
FORMATS = ("c2g32", "u3g64", "c3g32", "u4g128", "c4g64", "c5g32", "u5g32", "c6g32", "u6g64", "u8g64", "c4g32")


def write_decoder(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A random model of architecture `name` in `folder`; norms and biases are random too."""
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            parameter.data += torch.randn_like(parameter) * 0.1
        elif parameter_name.endswith("bias"):
            parameter.data = torch.randn_like(parameter) * 0.3
        else:
            parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    model.to(dtype).save_pretrained(folder)
    return folder


def random_packed(rows: int, columns: int, formats: list[str], seed: int) -> PackedTensor:
    """A weight with random codes in parts of these formats; values have about the size that networks have."""
    dice = torch.Generator().manual_seed(seed)
    row_part = torch.randint(0, len(formats), (rows,), generator=dice).to(torch.uint8) if len(formats) > 1 else None
    parts = []
    for index, text in enumerate(formats):
        fmt = Format.parse(text)
        count = rows if row_part is None else int((row_part == index).sum())
        draw = lambda low, high, *shape: torch.randint(low, high, shape, generator=dice)  # noqa: E731
        groups = fmt.groups(columns)
        scales = draw(60, 256, count, groups).to(torch.uint8)
        codes = draw(0, fmt.levels, count, columns).to(torch.uint8)
        zeros = codebook = None
        if fmt.kind == "uniform":
            zeros = draw(fmt.levels // 3, 2 * fmt.levels // 3 + 1, count, groups).to(torch.uint8)
            spread = fmt.levels / 3.5
        else:
            codebook = draw(-128, 128, fmt.levels).sort().values.to(torch.int8)
            spread = 74.0
        factors = (torch.rand(count, generator=dice) + 0.5) / (160.0 * spread * columns**0.5)
        parts.append(RowGroup(fmt, codes, scales, factors.bfloat16(), zeros, codebook))
    return PackedTensor((rows, columns), parts, row_part)


def pack_decoder(folder: Path, source: Path) -> Path:
    """The model in `source` with random packed weights of all formats; an embedding has three parts."""
    from safetensors.torch import load_file

    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    stored, entries = {}, {}
    for number, (name, tensor) in enumerate(sorted(load_file(source / "model.safetensors").items())):
        if tensor.dim() != 2:
            stored[name] = tensor
            continue
        formats = ["c6g32", "c5g32", "u4g64"] if "embed" in name else [FORMATS[number % len(FORMATS)]]
        packed = random_packed(*tensor.shape, formats, number)
        stored |= stored_form(name, packed)
        entries[name] = packing_entry(packed)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    Packing(tensors=entries).write(folder)
    return folder
