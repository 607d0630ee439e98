"""What a GGUF file says: architecture, rotary embedding, tokenizer; and what it cannot say is refused."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gguf_samples import (
    GEMMA,
    NETWORKS,
    TEXT,
    exported,
    fields,
    llama,
    model_folder,
    rope,
    sentence_piece,
    tensors,
    trained,
)
from language_samples import write_causal
from safetensors.torch import load_file
from tokenizers import Regex, models, normalizers, pre_tokenizers
from toy_language import sentences

from gulliver.core.errors import ConfigError
from gulliver.core.store.store import Store
from gulliver.tasks import get_task
from gulliver.tasks.language.gguf.metadata import NO_MERGE
from gulliver.tasks.language.gguf.pre_tokenizers import LLAMA3, QWEN2, TEKKEN
from gulliver.tasks.language.gguf.read import convert_gguf
from gulliver.tasks.text.tokenizer import load_tokenizer


def test_the_file_says_what_the_model_is(store: Store, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "small-giant", "llama", rms_norm_eps=3e-5)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    said = fields(exported(store, folder))
    expected = {
        "general.architecture": "llama",
        "general.name": "small-giant",
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": len(load_tokenizer(folder)),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {key: said.get(key) for key in expected} == expected
    assert said["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(3e-5)
    assert said["tokenizer.ggml.tokens"][0] == "<|end|>" and said["tokenizer.ggml.token_type"][:2] == [3, 1]


def test_the_same_model_gives_the_same_file(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    first, second = (exported(Store(tmp_path / name), folder) for name in ("one", "two"))
    assert first.id == second.id


def test_a_sliding_window_that_llama_cpp_lacks_ends_the_context(store: Store, tmp_path: Path) -> None:
    made = exported(store, model_folder(tmp_path / "model", "mistral", sliding_window=40))
    assert made.config["context_length"] == 40 and fields(made)["llama.context_length"] == 40


def test_gemma_norms_and_windows(store: Store, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "gemma3_text", **GEMMA)
    made, weights = exported(store, folder), load_file(folder / "model.safetensors")
    held, said = tensors(made), fields(made)
    for theirs, ours in {
        "blk.0.attn_norm": "layers.0.input_layernorm",
        "blk.0.post_attention_norm": "layers.0.post_attention_layernorm",
        "blk.0.ffn_norm": "layers.0.pre_feedforward_layernorm",
        "blk.0.post_ffw_norm": "layers.0.post_feedforward_layernorm",
        "blk.0.attn_q_norm": "layers.0.self_attn.q_norm",
        "output_norm": "norm",
    }.items():
        assert np.array_equal(held[f"{theirs}.weight"][1], weights[f"model.{ours}.weight"].numpy() + np.float32(1))
    assert said["gemma3.attention.sliding_window"] == 8 and said["gemma3.rope.freq_base"] == 1e6
    assert said["gemma3.rope.freq_base_swa"] == 10000 and "gemma3.attention.sliding_window_pattern" not in said


def test_llama_3_factors_come_back(store: Store, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", *NETWORKS["llama 3"][:1], **NETWORKS["llama 3"][1])
    again = tmp_path / "again"
    again.mkdir()
    convert_gguf(exported(store, folder).file("model.gguf"), again)
    ours, theirs = (get_task("language").load(path).model.rotary_emb.inv_freq for path in (folder, again))
    torch.testing.assert_close(ours, theirs)
    second = exported(store, again)  # what was read from a GGUF is written as it was
    assert np.allclose(
        tensors(second)["rope_freqs.weight"][1], tensors(exported(store, folder))["rope_freqs.weight"][1]
    )


# ---- tokenizer ----------------------------------------------------------------------------------------------------
def split(pattern: str) -> Any:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
RULES: dict[str, dict[str, Any]] = {
    "gpt-2": {},
    "smollm": {"pre": DIGITS},
    "qwen2": {"pre": split(QWEN2), "normalizer": normalizers.NFC()},
    "llama-bpe": {"pre": split(LLAMA3), "ignore_merges": True},
    "smaug-bpe": {"pre": split(LLAMA3)},
    "tekken": {"pre": split(TEKKEN), "ignore_merges": True},
}


@pytest.mark.parametrize("name", RULES)
def test_the_rules_that_cut_text_get_their_name_and_llama_cpp_cuts_alike(
    name: str, store: Store, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "model", tokenizer=trained(**RULES[name]))
    made = exported(store, folder)
    assert made.config["pre_tokenizer"] == name == fields(made)["tokenizer.ggml.pre"]
    text = f"<|end|>{TEXT}<|end|>\n"
    theirs = llama(made, vocab_only=True).tokenize(text.encode(), add_bos=False, special=True)
    assert theirs == load_tokenizer(folder)(text)["input_ids"]


def test_bytes_need_no_merges(store: Store, tmp_path: Path) -> None:
    made = exported(store, write_causal(tmp_path / "model"))
    assert fields(made)["tokenizer.ggml.merges"] == [NO_MERGE]
    theirs = llama(made, vocab_only=True).tokenize(TEXT.encode(), add_bos=False)
    assert theirs == list(TEXT.encode())


def test_scores_join_as_the_pairs_do(store: Store, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", tokenizer=sentence_piece())
    made = exported(store, folder)
    said, tokenizer = fields(made), load_tokenizer(folder)
    assert said["tokenizer.ggml.model"] == made.config["pre_tokenizer"] == "llama"
    assert said["tokenizer.ggml.add_bos_token"] and said["tokenizer.ggml.add_space_prefix"]
    assert said["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    score = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.scores"], strict=True))
    line = sentences(1, seed=9).strip()
    parts = list("▁" + line.replace(" ", "▁"))
    while True:
        joins = [
            (score.get(left + right, -math.inf), -at) for at, (left, right) in enumerate(itertools.pairwise(parts))
        ]
        best, at = max(joins)
        if best == -math.inf:
            break
        parts[-at : -at + 2] = ["".join(parts[-at : -at + 2])]
    assert parts == tokenizer.convert_ids_to_tokens(tokenizer(line, add_special_tokens=False)["input_ids"])
    theirs = llama(made, vocab_only=True).tokenize(TEXT.encode(), add_bos=True)
    assert theirs == tokenizer(TEXT)["input_ids"]


def test_unused_embeddings_and_added_tokens(store: Store, tmp_path: Path) -> None:
    tokenizer = trained()
    tokenizer.add_tokens(["<tool>", "<|look|>"])
    size = len(tokenizer)
    said = fields(exported(store, model_folder(tmp_path / "model", tokenizer=tokenizer, vocab_size=size + 2)))
    unused = [f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert said["tokenizer.ggml.tokens"][size - 2 :] == ["<tool>", "<|look|>", *unused]
    assert said["tokenizer.ggml.token_type"][size - 2 :] == [4, 3, 5, 5]


# ---- refusals -----------------------------------------------------------------------------------------------------
def broken_pairs() -> Any:
    """Merges that no SentencePiece model has: one way to split a token is left out."""
    tokenizer = sentence_piece()
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    results = [left + right for left, right in raw["model"]["merges"]]
    raw["model"]["merges"].pop(next(at for at, token in enumerate(results) if results.count(token) > 1))
    core = tokenizers.Tokenizer.from_str(json.dumps(raw))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


def unigram() -> Any:
    core = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], 0, False))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="b")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4}, "GPT2LMHeadModel"),
    "another activation": ({"hidden_act": "gelu"}, "'gelu'"),
    "rotary embedding of a growing text": (rope(rope_type="dynamic", factor=2.0), "'dynamic'"),
    "yarn with its own factor": (
        rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.0),
        "attention_factor",
    ),
    "gemma with another scale": (GEMMA | {"model_type": "gemma3_text", "query_pre_attn_scalar": 64}, "64"),
    "qwen3 with biases": ({"model_type": "qwen3", "attention_bias": True}, "o_proj.bias"),
    "another rule to cut": ({"tokenizer": trained(pre_tokenizers.Sequence([split("a+b"), DIGITS]))}, "a\\+b"),
    "another normalizer": ({"tokenizer": trained(normalizer=normalizers.Lowercase())}, "Lowercase"),
    "unigram": ({"tokenizer": unigram()}, "Unigram"),
    "merges of no SentencePiece model": ({"tokenizer": broken_pairs()}, "SentencePiece"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_refused_with_its_reason_and_remedy(case: str, store: Store, tmp_path: Path) -> None:
    options, told = REFUSED[case]
    folder = model_folder(tmp_path / "model", **{"model_type": "llama", **options})
    with pytest.raises(ConfigError, match=rf"(?s){told}.*use --format safetensors"):
        exported(store, folder)
