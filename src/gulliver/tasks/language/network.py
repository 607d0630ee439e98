"""Language networks: from and to a Hugging Face layout folder, with or without weights.

Two kinds are told apart by their config: causal language models (logits over a vocabulary) and sentence encoders
(one vector per text: the mean of the last hidden states over real tokens, as in Sentence-BERT, 2019, arXiv 1908.10084).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from gulliver.core.errors import ConfigError
from gulliver.nets.weights import aliases
from gulliver.runtime.network import is_encoder as is_encoder
from gulliver.runtime.network import load_network as load_network
from gulliver.runtime.network import read_config as read_config
from gulliver.tasks.base import Batch

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "generation_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
"""Files that travel with the weights: the tokenizer's and a sentence encoder's."""

BYTE_VOCABULARY = 257
"""A fresh network reads bytes; id 256 ends a text."""


def build_network(size: int, seed: int) -> nn.Module:
    """A fresh Llama that reads bytes: `size` layers + 1, width 32 · (size + 1), random weights from `seed`."""
    width = 32 * (size + 1)
    config = transformers.LlamaConfig(
        vocab_size=BYTE_VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 3,
        num_hidden_layers=size + 1,
        num_attention_heads=max(1, width // 32),
        num_key_value_heads=max(1, width // 32),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=BYTE_VOCABULARY - 1,
        architectures=["LlamaForCausalLM"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.source_folder = ""
    model.is_sentence_encoder = False
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
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    source = getattr(model, "source_folder", "")
    if source:
        copy_companions(Path(source), folder)
    else:
        from gulliver.tasks.language.text import write_byte_tokenizer

        write_byte_tokenizer(folder)


def write_config(config: Any, folder: Path, dtype: torch.dtype) -> None:
    """config.json with `dtype` and without machine-dependent entries, so that equal models have equal files."""
    raw = json.loads(config.to_json_string(use_diff=True))
    for key in ("_name_or_path", "_model_name_or_path", "_commit_hash", "transformers_version", "torch_dtype"):
        raw.pop(key, None)
    raw["dtype"] = str(dtype).removeprefix("torch.")
    text = json.dumps(raw, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer's and the encoder's files that `source` has."""
    for name in COMPANIONS:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)


# ---- outputs ------------------------------------------------------------------------------------------------------
def encode(model: nn.Module, batch: Batch) -> Tensor:
    """Sentence embeddings, float32 [batch, width], length one: mean of last hidden states over real tokens."""
    hidden = model(input_ids=batch["tokens"], attention_mask=batch["mask"]).last_hidden_state.float()
    mask = batch["mask"].unsqueeze(-1).to(hidden.dtype)
    pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(pooled, dim=-1)


def final_hidden(model: nn.Module, tokens: Tensor) -> Tensor:
    """What the output head of a causal model reads, [batch, tokens, width]."""
    base: Callable[..., Any] = model.base_model  # type: ignore[assignment]
    return base(input_ids=tokens, use_cache=False).last_hidden_state


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits of a causal model, [batch, tokens, vocab]."""
    return model(input_ids=tokens, use_cache=False).logits


def head_weight(model: nn.Module) -> Tensor:
    """The output head's matrix, [vocab, width]; a leaf or whatever the module's `weight` gives."""
    return model.get_output_embeddings().weight  # type: ignore[operator]


_PLAIN_HEAD: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def has_plain_head(model: nn.Module) -> bool:
    """Whether logits are exactly `hidden @ head.T`: no bias, scaling or soft cap. Asked of the network itself, once."""
    if model not in _PLAIN_HEAD:
        _PLAIN_HEAD[model] = _probe_head(model)
    return _PLAIN_HEAD[model]


def _probe_head(model: nn.Module) -> bool:
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or model.base_model is model:
        return False
    tokens = torch.arange(4).remainder(model.config.vocab_size)[None]  # type: ignore[union-attr]
    training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        expected = torch.nn.functional.linear(final_hidden(model, tokens), head.weight)
        plain = torch.equal(expected, logits_of(model, tokens))
    model.train(training)
    return plain


def require_causal(model: nn.Module, what: str) -> None:
    """ConfigError when `model` is a sentence encoder."""
    if getattr(model, "is_sentence_encoder", False):
        raise ConfigError(f"{what} needs a causal language model; this one is a sentence encoder")


def greedy(model: nn.Module, tokens: Tensor, max_new_tokens: int) -> list[int]:
    """The most likely continuation of `tokens` int64 [1, n], at most `max_new_tokens` or until the text's end."""
    require_causal(model, "generating text")
    ends = model.config.eos_token_id  # type: ignore[union-attr]
    stops = set(ends) if isinstance(ends, list) else {ends}
    past, found = None, []
    with torch.no_grad():
        for _ in range(max_new_tokens):
            output = model(input_ids=tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, token = output.past_key_values, int(output.logits[0, -1].argmax())
            if token in stops:
                break
            found.append(token)
            tokens = torch.tensor([[token]])
    return found
