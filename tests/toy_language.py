"""A language model that tests can afford: a Llama of two blocks that learned a small grammar, and its text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WHO = ("the giant", "a sailor", "the queen", "an engineer", "the captain", "a child")
DOES = ("measures", "carries", "finds", "forgets", "mends", "counts")
WHAT = ("a small boat", "the long rope", "every island", "the old map", "two lanterns", "the harbour")


def sentences(count: int, seed: int = 0) -> str:
    """`count` sentences, three a line; what is done follows from who does it, so there is something to learn.

    Lines hardly recur, so a part that is held out holds others.
    """
    choose = random.Random(seed)
    parts = []
    for _ in range(count):
        who = choose.randrange(len(WHO))
        does = DOES[(who + choose.randrange(2)) % len(DOES)]
        parts.append(f"{WHO[who]} {does} {choose.choice(WHAT)}")
    return "".join(", ".join(parts[start : start + 3]) + ".\n" for start in range(0, count, 3))


def write_text(path: Path, count: int = 3000, seed: int = 1) -> Path:
    """A text file of the grammar."""
    path.write_text(sentences(count, seed), encoding="utf-8")
    return path


def write_model(folder: Path, steps: int = 120, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A Hugging Face folder: config, weights (tied embedding), tokenizer. Deterministic; a few seconds."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        **(sizes | changes),
    )
    model = LlamaForCausalLM(config)
    tokens = torch.tensor(tokenizer(sentences(2000))["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - 64, (8,), generator=generator)
        batch = torch.stack([tokens[start : start + 64] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(500).splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>")
