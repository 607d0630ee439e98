"""The reference decoder against transformers itself, for every architecture, alone and under the batching engine."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from language_samples import CAUSAL, SMALL, VOCABULARY, write_causal, write_encoder
from safetensors.torch import load_file, save_file
from test_packed import random_part

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.records import Packing
from gulliver.core.store.manifest import PACKING
from gulliver.runtime.batching.engine import Engine, Request, Sampling
from gulliver.runtime.decoder import StepBatch
from gulliver.runtime.formats import Format
from gulliver.runtime.packed import PackedTensor
from gulliver.runtime.reference import packing_entry, stored_form
from gulliver.runtime.reference_cache import Reader, Remembered
from gulliver.runtime.reference_decode import ReferenceDecoder
from gulliver.runtime.text.tokenizer import Text

PROMPTS = [[65, 66, 67], [1] * 20, list(range(100, 140)), [7]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_causal(tmp_path_factory.mktemp("models") / "llama")


def generated(folder: Path, prompt: list[int], count: int) -> list[int]:
    """What transformers' own generate answers, greedily."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    ids = torch.tensor([prompt])
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": count, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)
    return found[0, len(prompt) :].tolist()


def answers(folder: Path, prompts: list[list[int]], count: int, cache_tokens: int = 2048, **options: Any) -> list[Any]:
    engine = Engine(ReferenceDecoder(folder, cache_tokens=cache_tokens), Text(folder), **options)
    try:
        greedy = Sampling(temperature=0)
        asked = [Request(tuple(prompt), count, greedy, ignore_end=True) for prompt in prompts]
        return [[choice.id for piece in pieces for choice in piece.tokens] for pieces in engine.complete(asked)]
    finally:
        engine.close()


@pytest.mark.parametrize("name", [*CAUSAL, "mamba"])
def test_greedy_answers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    if name == "mamba":
        options = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
        config = transformers.MambaConfig(**options, eos_token_id=256, bos_token_id=0, pad_token_id=0)
        torch.manual_seed(0)
        folder = write_causal(tmp_path / "tokenizer")
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    else:
        folder = write_causal(tmp_path / "model", name)
    count = 12
    right = [generated(folder, prompt, count) for prompt in PROMPTS]
    assert answers(folder, PROMPTS, count) == right
    assert len({tuple(tokens) for tokens in right}) > 1


HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "num_dense_layers": 1,
    },
    "minimax": {"num_local_experts": 4, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "head_dim": 8},
}
"""Networks that remember by convolutions, states and linear attention: model_type -> what its config needs more."""


@pytest.mark.parametrize("kind", HYBRIDS)
def test_networks_of_any_memory_answer_as_they_do_from_the_beginning(kind: str, tmp_path: Path) -> None:
    folder = write_causal(tmp_path / kind)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SMALL | HYBRIDS[kind]))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)

    def from_the_beginning(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]

    right = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(8):
            tokens.append(int(from_the_beginning(tokens)[-1].argmax()))
        right.append(tokens[len(prompt) :])
    assert answers(folder, PROMPTS, 8) == right
    reader = Reader(model, VOCABULARY)
    text, tokens = Remembered(), list(range(1, 24))
    with torch.inference_mode():
        reader.read(text, tokens[:20], 1)
        reader.read(text, [7, 8, 9], 1)
        reader.shorten(text, 21)
        found = reader.read(text, tokens[20:], 2)
    assert torch.allclose(found, from_the_beginning([*tokens[:20], 7, *tokens[20:]])[-2:], atol=1e-4)


def test_a_network_without_a_memory_that_holds_is_read_from_the_beginning(llama: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(llama), dtype=torch.float32)
    assert Reader(model, VOCABULARY).keeps and Reader(model, VOCABULARY).crops
    forward = model.forward

    def forgets(input_ids: torch.Tensor, past_key_values: Any = None, **options: Any) -> Any:
        return forward(input_ids=input_ids, **options)

    model.forward = forgets
    assert not Reader(model, VOCABULARY).keeps

    def fails(input_ids: torch.Tensor, **options: Any) -> Any:
        raise IndexError("list index out of range")

    model.forward = fails
    with pytest.raises(ArtifactError, match="cannot read text: list index out of range"):
        Reader(model, VOCABULARY)


def test_preemption_and_drafts_change_nothing(llama: Path) -> None:
    right = [generated(llama, prompt, 60) for prompt in PROMPTS]
    assert answers(llama, PROMPTS, 60, cache_tokens=160, lookup_rows=16) == right
    assert answers(llama, PROMPTS, 60, lookup=False) == right


def test_a_position_may_be_written_again(llama: Path) -> None:
    decoder = ReferenceDecoder(llama, cache_tokens=64)
    blocks = np.array([[2, 0, 1]], np.int32)

    def step(tokens: list[int], first: int) -> np.ndarray:
        count = len(tokens)
        places = np.arange(first, first + count, dtype=np.int32)
        zeros = np.zeros(count, np.int32)
        wanted = np.array([count - 1], np.int32)
        return decoder.step(StepBatch(np.array(tokens, np.int32), places, zeros, blocks, wanted))[0]

    tokens = random.Random(0).choices(range(256), k=20)
    step(tokens, 0)
    wrong = step([1, 2, 3], 20)
    step([9], 20)
    again = step([2, 3], 21)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(llama), dtype=torch.float32)
    with torch.no_grad():
        right = model(torch.tensor([[*tokens, 9, 2, 3]])).logits[0, -1].numpy()
    assert np.abs(again - right).max() < 1e-4
    assert np.abs(wrong - right).max() > 1e-3
    with pytest.raises(AssertionError, match="position 30"):
        step([1], 30)


def test_all_wanted_rows_come_in_order(llama: Path) -> None:
    decoder = ReferenceDecoder(llama, cache_tokens=64)
    batch = StepBatch(
        np.array([1, 2, 3, 4, 5], np.int32),
        np.array([0, 1, 2, 0, 1], np.int32),
        np.array([0, 0, 0, 1, 1], np.int32),
        np.array([[0], [1]], np.int32),
        np.array([0, 2, 3], np.int32),
    )
    logits = decoder.step(batch)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(llama), dtype=torch.float32)
    with torch.no_grad():
        first = model(torch.tensor([[1, 2, 3]])).logits[0].numpy()
        second = model(torch.tensor([[4, 5]])).logits[0].numpy()
    assert np.abs(logits - np.stack([first[0], first[2], second[0]])).max() < 1e-4


def test_what_an_ended_sequence_held_is_forgotten(llama: Path) -> None:
    engine = Engine(ReferenceDecoder(llama, cache_tokens=128), Text(llama), slots=2)
    decoder: Any = engine.decoder
    for seed in range(5):
        engine.complete([Request((seed,) * 30, 40, Sampling(seed=seed), ignore_end=True)])
        assert sum(len(held.text.tokens) for held in decoder._held.values()) <= 128
        blocks = [block for held in decoder._held.values() for block in held.blocks]
        assert len(blocks) == len(set(blocks))
    engine.close()


def test_packed_weights_are_unpacked(llama: Path, tmp_path: Path) -> None:
    name, tensors = "model.layers.0.mlp.up_proj.weight", load_file(llama / "model.safetensors")
    rows, columns = tensors[name].shape
    small = PackedTensor((rows, columns), [random_part(Format.parse("u4g32"), rows, columns, 1)])
    shutil.copytree(llama, tmp_path / "packed", ignore=shutil.ignore_patterns("*.safetensors"))
    others = {other: tensor for other, tensor in tensors.items() if other != name}
    save_file(others | stored_form(name, small), tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    Packing(tensors={name: packing_entry(small)}).write(tmp_path / "packed")
    shutil.copytree(tmp_path / "packed", tmp_path / "plain", ignore=shutil.ignore_patterns("*.safetensors", PACKING))
    save_file(tensors | {name: small.dequantize()}, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    right = generated(tmp_path / "plain", PROMPTS[0], 12)
    assert answers(tmp_path / "packed", PROMPTS[:1], 12) == [right]
    assert right != generated(llama, PROMPTS[0], 12)


def test_the_facts_of_a_decoder(llama: Path, tmp_path: Path) -> None:
    decoder = ReferenceDecoder(llama, cache_tokens=100, why="because the architecture is new")
    assert (decoder.vocabulary, decoder.positions, decoder.cache_blocks) == (VOCABULARY, 128, 7)
    assert decoder.backend == "reference" and "because the architecture is new" in decoder.why
    decoder.close()
    with pytest.raises(ConfigError, match="no language model head"):
        ReferenceDecoder(write_encoder(tmp_path / "encoder"))
