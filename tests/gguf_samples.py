"""Tiny models, tokenizers and readers for tests of GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from language_samples import SMALL
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from toy_language import sentences

from gulliver.core.progress import Progress
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.store import Store
from gulliver.pipeline.call import call

CONTEXT = 48
TEXT = "In 1066 there  were 3  or 44 ships; don't ask, I'LL say été 漢字 🚀🚀.\r\n\r\n   \n\tThe end ==== 7\n"
TEXT += sentences(8, seed=4)


def trained(pre: Any = None, *, ignore_merges: bool = False, normalizer: Any = None) -> Any:
    """A byte-level tokenizer that cuts text by `pre` and learned some merges."""
    core = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    core.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([*sentences(300).splitlines(), *["1066 and 44 or 3  ships don't"] * 5], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", bos_token="<|end|>")


def sentence_piece() -> Any:
    """A tokenizer as transformers makes it of a SentencePiece model: every split of a token is a pair."""
    text = [line.replace(" ", "▁") for line in sentences(300).splitlines()]
    learner = tokenizers.Tokenizer(models.BPE())
    learner.train_from_iterator(text, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(token for token, _ in learned)]
    ids = {token: number for number, token in enumerate(pieces)}
    merges = [
        (token[:cut], token[cut:])
        for token, _ in learned
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    core = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def model_folder(folder: Path, model_type: str = "llama", tokenizer: Any = None, **options: Any) -> Path:
    """A random tiny network with a tokenizer that learned merges."""
    tokenizer = tokenizer or trained()
    shared = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | shared | options))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():  # far from zero, so that a weight left out would be seen
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def exported(store: Store, source: Path | Artifact, kind: str = "exact") -> Artifact:
    """The artifact that the step makes of a folder or a model."""
    shared: dict[str, Any] = {"store": store, "progress": Progress(quiet=True)}
    model = source if isinstance(source, Artifact) else call("pull", {"source": str(source)}, {}, **shared)
    return call("export", {"format": "gguf", "type": kind}, {"model": model}, **shared)


def fields(artifact: Artifact) -> dict[str, Any]:
    """Every key of the file."""
    reader = gguf.GGUFReader(artifact.file("model.gguf"))
    return {name: field.contents() for name, field in reader.fields.items()}


def tensors(artifact: Artifact) -> dict[str, tuple[Type, np.ndarray]]:
    """Type and values of every tensor of the file."""
    found = gguf.GGUFReader(artifact.file("model.gguf")).tensors
    return {
        tensor.name: (tensor.tensor_type, np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in found
    }


def llama(artifact: Artifact, **options: Any) -> Any:
    """llama.cpp with the file, one thread."""
    llama_cpp = pytest.importorskip("llama_cpp")
    shared = {"n_ctx": CONTEXT, "n_batch": CONTEXT, "n_ubatch": CONTEXT, "n_threads": 1, "n_threads_batch": 1}
    return llama_cpp.Llama(str(artifact.file("model.gguf")), verbose=False, **(shared | options))


def rope(**options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **options}}


GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 7}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "llama 3": (
        "llama",
        rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama, linear": ("llama", rope(rope_type="linear", factor=4.0)),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, yarn": ("qwen2", rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma3": ("gemma3_text", GEMMA | {"final_logit_softcapping": 3.0}),
    "gemma3, own pattern": (
        "gemma3_text",
        GEMMA | {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
    ),
}
