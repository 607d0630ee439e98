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
from language_samples import CAUSAL, VOCABULARY, write_causal, write_encoder
from safetensors.torch import load_file, save_file
from test_packed import random_part

from gulliver.core.errors import ConfigError
from gulliver.core.records import Packing
from gulliver.core.store.manifest import PACKING
from gulliver.runtime.batching.engine import Engine, Request, Sampling
from gulliver.runtime.decoder import StepBatch
from gulliver.runtime.formats import Format
from gulliver.runtime.packed import PackedTensor
from gulliver.runtime.reference import packing_entry, stored_form
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
        assert sum(len(held.tokens) for held in decoder._held.values()) <= 128
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
