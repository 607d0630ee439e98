"""GGUF files become the folder they were made from: names, the order of q and k rows, rotary scaling, tokenizer."""

from __future__ import annotations

import json
import math

import gguf
import numpy as np
import pytest
import torch
import transformers
from language_samples import SMALL, VOCABULARY, write_causal
from safetensors.torch import load_file

from gulliver.core.errors import ArtifactError
from gulliver.tasks import converter, get_task
from gulliver.tasks.language.gguf.architectures import unpermute
from gulliver.tasks.language.gguf.read import convert_gguf

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_LAYER = {
    **{"attn_norm": "input_layernorm", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm"},
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in ("q", "k", "v")},
    **{f"attn_{part}_norm": f"self_attn.{part}_norm" for part in ("q", "k")},
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}

HEADS = {"attn_q": SMALL["num_attention_heads"], "attn_k": SMALL["num_key_value_heads"]}


def permute(weights, heads):
    """llama.cpp's own order of rows (convert_hf_to_gguf.py, LlamaModel.permute)."""
    shape = weights.shape
    return weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def write_gguf(path, folder, architecture="llama", quantized=None, extra=(), change=None):
    """The model in `folder` as a GGUF file, as llama.cpp's converter writes it."""
    raw = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_freq_base(50000.0)
    writer.add_key_length(raw.get("head_dim") or 8)
    add_tokenizer(writer, folder)
    names = {ours: theirs for theirs, ours in (TOP | IN_LAYER).items()}
    for name, tensor in load_file(folder / "model.safetensors").items():
        parts = name.split(".")
        leaf, inner = parts[-1], ".".join(parts[3:-1]) if parts[1] == "layers" else ".".join(parts[:-1])
        prefix = f"blk.{parts[2]}." if parts[1] == "layers" else ""
        values = tensor.float().numpy()
        if architecture == "llama" and names[inner] in HEADS:
            values = permute(values, HEADS[names[inner]])
        add_tensor(writer, f"{prefix}{names[inner]}.{leaf}", values, quantized)
    for name, values in extra:
        writer.add_tensor(name, values)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer, name, values, quantized):
    if quantized is None or values.ndim == 1 or values.shape[1] % 32:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, gguf.quantize(values, quantized), raw_dtype=quantized)


def add_tokenizer(writer, folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens[0] = "ab"  # in place of the zero byte: a merge needs its result
    tokens[256] = "<|endoftext|>"  # transformers adds it where it is missing
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(256)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("llama-tied", "llama"), ("llama-untied", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
)
def test_a_model_survives_the_round_trip(tmp_path, name, architecture):
    source = write_causal(tmp_path / "source", name, rope_parameters={"rope_type": "default", "rope_theta": 50000.0})
    task, convert = converter(write_gguf(tmp_path / "model.gguf", source, architecture))
    folder = tmp_path / "folder"
    folder.mkdir()
    convert(tmp_path / "model.gguf", folder)
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    assert task == "language" and set(before) == set(after)
    assert all(torch.equal(after[key], before[key]) for key in before)
    first, second = get_task("language").load(source), get_task("language").load(folder)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(first(input_ids=tokens).logits, second(input_ids=tokens).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == 256 and len(tokenizer) == VOCABULARY
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert "is_local" not in (folder / "tokenizer_config.json").read_text()
    assert str(tmp_path) not in (folder / "config.json").read_text()


@pytest.mark.parametrize("shape", [(32,), (32, 5)])
def test_the_order_of_rows_is_undone(shape):
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    assert np.array_equal(unpermute(torch.from_numpy(permute(values, 4)), 4).numpy(), values)
    assert not np.array_equal(permute(values, 4), values)


def test_rotary_factors_divide_the_frequencies(tmp_path):
    source = write_causal(tmp_path / "source")
    factors = np.array([1.0, 2.0, 4.0, 8.0], dtype=np.float32)
    convert_gguf(write_gguf(tmp_path / "model.gguf", source, extra=[("rope_freqs.weight", factors)]), tmp_path)
    rotary = get_task("language").load(tmp_path).model.rotary_emb
    plain = 1.0 / (50000.0 ** (torch.arange(0, 8, 2) / 8))
    torch.testing.assert_close(rotary.inv_freq, plain / torch.from_numpy(factors))
    assert rotary.attention_scaling == 1.0


def scaled(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def test_linear_rotary_scaling_is_kept(tmp_path):
    convert_gguf(write_gguf(tmp_path / "model.gguf", write_causal(tmp_path / "source"), change=scaled), tmp_path)
    rotary = get_task("language").load(tmp_path).model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, 1.0 / (50000.0 ** (torch.arange(0, 8, 2) / 8)) / 4)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"architecture": "mamba"}, "mamba"),
        ({"extra": [("blk.0.ssm_a", np.zeros(4, dtype=np.float32))]}, "no place for"),
        ({"extra": [("../../weight", np.zeros(4, dtype=np.float32))]}, "no place for"),
        ({"extra": [("rope_freqs.weight", np.full(4, np.nan, dtype=np.float32))]}, "not finite"),
        ({"change": lambda writer: writer.add_expert_count(8)}, "expert_used_count"),
        ({"change": lambda writer: writer.add_uint16("split.count", 3)}, "split into 3 files"),
        ({"change": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)}, "rotary"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path, options, told):
    path = write_gguf(tmp_path / "model.gguf", write_causal(tmp_path / "source"), **options)
    with pytest.raises(ArtifactError, match=told):
        convert_gguf(path, tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 40, 4000, -200])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = write_gguf(tmp_path / "model.gguf", write_causal(tmp_path / "source"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="GGUF"):
        convert_gguf(path, tmp_path)
