"""Tiny language models of several architectures, and datasets of text, for tests."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import transformers
from toy_language import sentences

from gulliver.core.store.artifact import Artifact, create
from gulliver.tasks.text.tokenizer import write_byte_tokenizer

VOCABULARY = 257
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}

CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", SMALL | {"tie_word_embeddings": True}),
    "llama-untied": ("llama", SMALL | {"tie_word_embeddings": False}),
    "mistral-sliding": ("mistral", SMALL | {"sliding_window": 8}),
    "qwen2": ("qwen2", SMALL),
    "qwen3": ("qwen3", SMALL | {"head_dim": 8}),
    "gemma2": ("gemma2", SMALL | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gpt2": ("gpt2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("gpt_neox", {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}),
    "opt": ("opt", SMALL | {"word_embed_proj_dim": 32, "ffn_dim": 48, "pad_token_id": 1}),
    "phi": ("phi", SMALL),
}
"""Name -> (model_type, config): tied and untied heads, biases, sliding windows, soft caps, learned positions."""


def write_causal(folder: Path, name: str = "llama-tied", seed: int = 0, **changes: Any) -> Path:
    """A random tiny model of the architecture, float32, with a byte tokenizer."""
    model_type, options = CAUSAL[name]
    config = transformers.AutoConfig.for_model(model_type, **(options | changes))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # far from zero, so that a weight left out would be seen
        parameter.data += 0.05 * torch.randn_like(parameter)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


def write_encoder(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random tiny BERT sentence encoder with a word-piece tokenizer of letters."""
    letters = "abcdefghijklmnopqrstuvwxyz."
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **(sizes | changes))
    torch.manual_seed(seed)
    model = transformers.BertModel(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    core = transformers.BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)})
    core.save_pretrained(folder)
    (folder / "modules.json").write_text("[]")
    return folder


def write_dataset(folder: Path, train: list[str], held_out: list[str]) -> Artifact:
    """A dataset artifact with these texts."""
    rows = [{"text": text, "split": "train", "source": "a"} for text in train]
    rows += [{"text": text, "split": "eval", "source": "b"} for text in held_out]
    step = {"name": "read", "version": 1}
    with create(folder, kind="dataset", task="language", step=step, config={}) as writer:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), writer.path / "examples.parquet")
        return writer.commit()


@functools.cache
def text(count: int, seed: int) -> str:
    """`count` sentences of the toy grammar."""
    return sentences(count, seed)
