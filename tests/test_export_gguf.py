"""GGUF: the file holds the model's own values, and llama.cpp computes the same with it.

What needs llama.cpp itself is skipped where `llama-cpp-python` is not installed; all else is always tested.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from gguf_samples import CONTEXT, NETWORKS, TEXT, exported, llama, model_folder, tensors
from hypothesis import given
from hypothesis import strategies as st
from language_samples import write_encoder
from safetensors.torch import load_file
from test_export import packed
from toy_language import sentences, write_model

from gulliver.core.errors import ConfigError
from gulliver.core.progress import Progress
from gulliver.core.store.artifact import verify
from gulliver.core.store.store import Store
from gulliver.pipeline.call import call
from gulliver.runtime.reference import read_stored
from gulliver.tasks import exporter, get_task
from gulliver.tasks.language.gguf.architectures import permute
from gulliver.tasks.language.gguf.read import convert_gguf
from gulliver.tasks.language.gguf.write import BLOCK_TYPES, TYPES, encode_blocks, exact_type
from gulliver.tasks.text.tokenizer import load_tokenizer


@pytest.mark.parametrize("name", NETWORKS)
def test_llama_cpp_computes_what_we_compute(name: str, store: Store, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", NETWORKS[name][0], **NETWORKS[name][1])
    engine = llama(exported(store, folder), logits_all=True)
    tokens = load_tokenizer(folder)(TEXT)["input_ids"][:CONTEXT]
    assert engine.tokenize(TEXT.encode(), add_bos=False)[:CONTEXT] == tokens
    engine.eval(tokens)
    with torch.no_grad():
        ours = get_task("language").load(folder)(input_ids=torch.tensor([tokens])).logits[0]
    theirs = torch.from_numpy(np.array(engine.scores[:CONTEXT]))
    assert (theirs - ours).abs().max() < 0.02 * ours.std()  # a wrong rotary base, window or norm is above 0.3


@pytest.mark.parametrize("name", ["llama, tied", "llama, biases", "qwen2", "qwen3"])
def test_a_bfloat16_parent_comes_back_bit_for_bit(name: str, store: Store, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", NETWORKS[name][0], **NETWORKS[name][1])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    made = exported(store, folder)
    assert set(made.config["types"]) == {"BF16", "F32"} and made.config["relative_error"] == 0
    again = tmp_path / "again"
    again.mkdir()
    convert_gguf(made.file("model.gguf"), again)
    before, after = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
    assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert load_tokenizer(again)(sentences(5))["input_ids"] == load_tokenizer(folder)(sentences(5))["input_ids"]


def test_packed_weights_are_exact_and_their_cost_is_told(language: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = language.quantize(bits=4, group_size=32)
    made = call("export", {"format": "gguf"}, {"model": model}, store=language.store)
    assert "With --type q8_0" in capsys.readouterr().err
    assert set(made.files) == {"model.gguf"} and made.weight_bytes == made.files["model.gguf"].size_bytes
    verify(made)
    held = tensors(made)
    for name, tensor in read_stored(model.path):
        values = (tensor if isinstance(tensor, torch.Tensor) else tensor.dequantize()).float().numpy()
        target = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2).get_name(name, (".weight",))
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        assert np.array_equal(held[target][1], permute(values, heads) if heads else values), name
    assert len(held) == made.config["types"]["F32"] and made.config["relative_error"] == 0


@pytest.mark.parametrize(("kind", "most"), [("f32", 0.0), ("f16", 5e-4), ("bf16", 4e-3), ("q8_0", 2e-2)])
def test_a_type_on_request_rounds_as_llama_cpp_does_and_says_how_much(
    kind: str, most: float, language: Any, tmp_path: Path
) -> None:
    made = exported(language.store, language.model, kind)
    weights = load_file(language.model.path / "model.safetensors")
    found, values = tensors(made)["blk.1.ffn_up.weight"], weights["model.layers.1.mlp.up_proj.weight"].float().numpy()
    assert found[0] == TYPES[kind]
    kept = gguf.dequantize(gguf.quantize(values, TYPES[kind]), TYPES[kind])
    assert np.array_equal(found[1], kept)
    assert {held for name, (held, _) in tensors(made).items() if "norm" in name} == {Type.F32}
    error = made.config["relative_error"]
    assert (error == 0) == (most == 0) and error <= made.config["worst_relative_error"] <= most
    assert (made.config["worst_tensor"] == "") == (most == 0)


def test_rows_that_fill_no_block_are_float16_in_q8_0(store: Store, tmp_path: Path) -> None:
    held = tensors(exported(store, model_folder(tmp_path / "model"), "q8_0"))
    assert held["blk.0.ffn_down.weight"][0] == Type.F16 and held["blk.0.ffn_up.weight"][0] == Type.Q8_0


def test_a_value_beyond_float16_is_refused(store: Store, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[0].mlp.up_proj.weight.data[3, 3] = 1e6
    model.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"up_proj.weight.*beyond F16; use --type bf16"):
        exported(store, folder, "f16")
    assert exported(store, folder, "exact").config["relative_error"] == 0


SMALLEST = {
    (-8, 7): Type.Q4_0,
    (-3, 12): Type.Q4_1,
    (-16, 15): Type.Q5_0,
    (3, 34): Type.Q5_1,
    (-128, 127): Type.Q8_0,
}


@pytest.mark.parametrize("span", SMALLEST)
def test_the_smallest_type_that_fits_is_found(span: tuple[int, int]) -> None:
    name = "u8g64"
    tensor = packed(torch.empty(6, 128), name, seed=2)
    part = tensor.parts[0]
    assert part.zeros is not None
    part.factors.fill_(2.0**-9)  # a power of two leaves 8 significant bits, which float16 holds
    part.codes = (part.codes.int() % (span[1] - span[0] + 1)).to(torch.uint8)
    part.codes[0, :2] = torch.tensor([0, span[1] - span[0]])
    part.zeros.fill_(max(0, -span[0]))
    if span[0] > 0:
        part.codes += span[0]
    assert exact_type(tensor) == SMALLEST[span]
    part.factors.fill_(1.0859375 * 2.0**-9)  # 8 bits times 8 bits are 16
    assert exact_type(tensor) == Type.F32


def test_parts_of_two_formats_are_put_together() -> None:
    tensor = packed(torch.empty(6, 128), "c4g64", "u6g32", seed=2)
    for part in tensor.parts:
        part.factors.fill_(2.0**-9)
    assert exact_type(tensor) == Type.Q8_0


@given(st.sampled_from(sorted(BLOCK_TYPES)), st.integers(0, 2**32 - 1), st.booleans())
def test_what_is_encoded_is_decoded_exactly_or_refused(kind: Type, seed: int, coarse: bool) -> None:
    random = np.random.default_rng(seed)
    bits, zero = BLOCK_TYPES[kind]
    low = -zero if zero else int(random.integers(-100, 100))
    levels = random.integers(low, low + (1 << bits), (2, 64)).astype(np.int16)
    scales = random.integers(0, 8 if coarse else 1 << 12, (2, 2)).astype(np.float32) / 4096
    stored = encode_blocks(levels, scales, None, kind)
    if stored is not None:
        assert np.array_equal(gguf.dequantize(stored, kind), levels * scales.repeat(32, 1))
    assert stored is not None or not coarse or zero == 0
    assert encode_blocks(levels + np.int16(1 << bits), scales, None, kind) is None or zero == 0


def test_an_encoder_and_options_of_other_formats_are_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format gguf is for language models"):
        exported(store, write_encoder(tmp_path / "encoder"))
    model = call("pull", {"source": str(write_model(tmp_path / "toy", steps=0))}, {}, store=store)
    for config, told in (
        ({"format": "gguf", "widen": True}, "widen is for compressed-tensors"),
        ({"format": "safetensors", "type": "q8_0"}, "type is for gguf"),
        ({"format": "onnx"}, "onnx"),
    ):
        with pytest.raises(ConfigError, match=told):
            call("export", config, {"model": model}, store=store, progress=Progress(quiet=True))


# ---- the real model -----------------------------------------------------------------------------------------------
@pytest.mark.real
@pytest.mark.parametrize(("kind", "most"), [("exact", 0.005), ("f16", 0.005), ("q8_0", 0.01)])
def test_llama_cpp_has_our_perplexity_on_the_real_model(kind: str, most: float, store: Store) -> None:
    """With q8_0 llama.cpp rounds activations to 8 bits, too, which costs more than the weights' rounding does."""
    shared: dict[str, Any] = {"store": store, "progress": Progress(quiet=True)}
    model = call("pull", {"source": "catalog:smollm2-135m-instruct"}, {}, **shared)
    data = call("read", {"data": "catalog:shakespeare"}, {}, **shared)
    text = "".join(example["text"] for example in get_task("language").rows(data.path, "eval"))[:20000]
    tokens = load_tokenizer(model.path)(text)["input_ids"]
    engine = llama(exported(store, model, kind), n_ctx=512, n_batch=512, n_ubatch=512, logits_all=True)
    assert engine.tokenize(text.encode(), add_bos=False) == tokens
    network, losses = get_task("language").load(model.path), []
    for start in range(0, 4 * 512, 512):
        window = tokens[start : start + 512]
        engine.reset()
        engine.eval(window)
        with torch.no_grad():
            ours = network(input_ids=torch.tensor([window])).logits[0]
        theirs = torch.from_numpy(np.array(engine.scores[: len(window)]))
        loss = torch.nn.functional.cross_entropy
        target = torch.tensor(window[1:])
        losses.append((loss(theirs[:-1], target).item(), loss(ours[:-1].float(), target).item()))
    theirs_mean, ours_mean = (sum(column) / len(losses) for column in zip(*losses, strict=True))
    assert abs(math.exp(theirs_mean - ours_mean) - 1) < most


def test_a_model_of_another_family_is_refused() -> None:
    with pytest.raises(ConfigError, match="gguf is for language models; this is a vision model: use --format safeten"):
        exporter("gguf", "vision")
