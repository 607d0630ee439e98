"""The native path against transformers: every architecture, plain and packed, chunked, batched, rewound and shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_decoders import CONFIGS, pack_decoder, write_decoder
from transformers import AutoConfig, AutoModelForCausalLM

from gulliver.core.errors import ArtifactError, BudgetError, ConfigError, KernelError
from gulliver.runtime import decode
from gulliver.runtime.decode import native_reason, open_decoder
from gulliver.runtime.decoder import Decoder, StepBatch
from gulliver.runtime.reference import read_tensors

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))

BOUND = 0.05
"""Most that logits may differ from the reference's: root mean square, in standard deviations of the reference's logits.

Activations and cache have 8 bits; random weights carry the error of every layer on, where trained ones damp it.
"""
GREEDY_GAP = 8 * BOUND
"""Most that the reference may prefer its own greedy token to ours, in the same unit."""
TOKENS = 100


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of each random model, plain ("llama") and packed ("llama-packed")."""
    root = tmp_path_factory.mktemp("decoders")
    found = {}
    for name in CONFIGS:
        dtype = torch.bfloat16 if name in ("llama", "qwen3") else torch.float16 if name == "mistral" else torch.float32
        found[name] = write_decoder(root / name, name, dtype)
        found[f"{name}-packed"] = pack_decoder(root / f"{name}-packed", found[name])
    return found


def expected(folder: Path, tokens: list[int]) -> np.ndarray:
    """transformers' logits [tokens, vocabulary] in float32."""
    with torch.no_grad():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), attn_implementation="eager"
        ).float()
        missing, unexpected = model.load_state_dict(dict(read_tensors(folder)), strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
        return model.eval()(torch.tensor([tokens])).logits[0].numpy()


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.square(found - wanted).mean()) / wanted.std())


def tokens_of(seed: int, count: int = TOKENS, vocabulary: int = 203) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocabulary, count).tolist()


def batch_of(rows: list[tuple[int, int, int]], blocks: list[list[int]], wanted: list[int]) -> StepBatch:
    """Rows are (token, position, sequence)."""
    ints = lambda values: np.array(values, np.int32)  # noqa: E731
    tokens, positions, sequences = zip(*rows, strict=True)
    return StepBatch(ints(tokens), ints(positions), ints(sequences), ints(blocks), ints(wanted))


def logits_of(decoder: Decoder, tokens: list[int], chunk: int, first_block: int = 0) -> np.ndarray:
    """Logits of every token, the sequence fed in chunks."""
    blocks = [list(range(first_block, first_block + len(tokens) // decoder.block_tokens + 1))]
    found = []
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        rows = [(token, start + index, 0) for index, token in enumerate(part)]
        found.append(decoder.step(batch_of(rows, blocks, list(range(len(part))))).copy())
    return np.concatenate(found)


def native(folder: Path, **options: Any) -> Decoder:
    chosen: dict[str, Any] = {"threads": 2, "cache_tokens": 1024} | options
    return open_decoder(folder, backend="native", **chosen)


@pytest.mark.parametrize("name", [name + kind for name in CONFIGS for kind in ("", "-packed")])
def test_logits_and_greedy_tokens_are_the_references(models: dict[str, Path], name: str) -> None:
    tokens = tokens_of(7)
    wanted = expected(models[name], tokens)
    found = logits_of(native(models[name]), tokens, chunk=37)
    assert difference(found, wanted) < BOUND
    agreed = found.argmax(1) == wanted.argmax(1)
    gaps = wanted.max(1) - np.take_along_axis(wanted, found.argmax(1)[:, None], 1)[:, 0]
    assert agreed.mean() > 0.9 and gaps.max() < GREEDY_GAP * wanted.std()


def test_the_bound_notices_a_wrong_model(models: dict[str, Path]) -> None:
    tokens = tokens_of(7)
    wanted = expected(models["mistral"], tokens)
    shifted = logits_of(native(models["mistral"]), tokens[:50] + tokens[51:] + [0], chunk=100)
    assert difference(shifted[:50], wanted[:50]) < BOUND < difference(shifted[50:], wanted[50:])


@pytest.mark.parametrize("name", ["llama-packed", "gemma3", "qwen2-packed"])
def test_chunks_and_threads_change_nothing(models: dict[str, Path], name: str) -> None:
    tokens = tokens_of(3)
    whole = logits_of(native(models[name], threads=1), tokens, chunk=100)
    for threads, chunk in ((1, 1), (2, 1), (3, 16), (2, 33)):
        np.testing.assert_allclose(logits_of(native(models[name], threads=threads), tokens, chunk), whole, atol=2e-4)


def test_sequences_in_one_step_do_not_disturb_each_other(models: dict[str, Path]) -> None:
    decoder = native(models["llama-packed"])
    texts = [tokens_of(seed, 40) for seed in range(5)]
    alone = [logits_of(decoder, text, chunk=40, first_block=3 * number) for number, text in enumerate(texts)]
    blocks = [[20 + number, 30 + number, 40 + number] for number in range(5)]
    for position in range(40):
        rows = [(text[position], position, number) for number, text in enumerate(texts)]
        found = decoder.step(batch_of(rows, blocks, [0, 2, 4])).copy()
        for row, number in enumerate((0, 2, 4)):
            np.testing.assert_allclose(found[row], alone[number][position], atol=2e-4)


def test_two_sequences_share_blocks_and_one_is_rewound(models: dict[str, Path]) -> None:
    decoder = native(models["llama-packed"])
    start, first, second = tokens_of(1, 32), tokens_of(2, 9), tokens_of(4, 9)
    logits_of(decoder, start, chunk=32)  # fills blocks 0 and 1
    for tail, block in ((first, 5), (second, 6)):
        rows = [(token, 32 + index, 0) for index, token in enumerate(tail)]
        found = decoder.step(batch_of(rows, [[0, 1, block]], [8]))
        np.testing.assert_allclose(found[0], logits_of(native(models["llama-packed"]), start + tail, 41)[-1], atol=2e-4)
    rows = [(token, 36 + index, 0) for index, token in enumerate(second[4:])]  # other tokens at positions 36 to 40
    again = decoder.step(batch_of(rows, [[0, 1, 5]], [4]))
    mixed = start + first[:4] + second[4:]
    np.testing.assert_allclose(again[0], logits_of(native(models["llama-packed"]), mixed, 41)[-1], atol=2e-4)


@pytest.mark.parametrize("isa", ["avx512-vnni", "avx2-vnni", "avx2", "neon", "plain"])
def test_instruction_sets_agree(models: dict[str, Path], isa: str) -> None:
    from gulliver.runtime import _native

    here = {name for name, available, _ in _native.instruction_sets() if available}
    if isa not in here:
        with pytest.raises(ConfigError, match=isa):
            native(models["qwen3-packed"], isa=isa)
        return
    tokens = tokens_of(5)
    decoder = native(models["qwen3-packed"], isa=isa)
    assert decoder.backend == isa
    wanted = logits_of(native(models["qwen3-packed"]), tokens, chunk=100)
    assert difference(logits_of(decoder, tokens, chunk=100), wanted) < BOUND


def test_an_unknown_instruction_set_is_refused_with_the_list(models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="plain"):
        native(models["llama"], isa="sse9")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"tokens": [203]}, "vocabulary"),
        ({"tokens": [-1]}, "vocabulary"),
        ({"positions": [192]}, "context"),
        ({"positions": [-1]}, "context"),
        ({"sequences": [1]}, "blocks"),
        ({"positions": [40]}, "few blocks"),
        ({"blocks": [[64]]}, "no such cache block"),
        ({"wanted": [1]}, "wanted"),
        ({"wanted": [0, 0]}, "wanted"),
    ],
)
def test_a_wrong_batch_is_refused(models: dict[str, Path], change: dict[str, Any], what: str) -> None:
    good: dict[str, Any] = {"tokens": [3], "positions": [0], "sequences": [0], "blocks": [[0]], "wanted": [0]}
    decoder = native(models["llama"])
    with pytest.raises(KernelError, match=what):
        decoder.step(StepBatch(**{key: np.array(value, np.int32) for key, value in (good | change).items()}))
    assert np.isfinite(decoder.step(StepBatch(**{key: np.array(value, np.int32) for key, value in good.items()}))).all()


def test_weights_beyond_the_memory_limit_are_read_anew_and_give_the_same(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "current_rss_bytes", lambda: 10**8)
    tokens = tokens_of(3)
    wanted = logits_of(native(models["llama-packed"]), tokens, chunk=50)
    with pytest.raises(BudgetError, match=r"allow \d+ MB") as refusal:
        native(models["llama-packed"], cache_tokens=128, max_ram_bytes=10**8)
    assert refusal.value.nearest is not None
    smallest = refusal.value.nearest["max_ram_bytes"]
    decoder = native(models["llama-packed"], cache_tokens=128, max_ram_bytes=smallest)
    assert "read again at each step" in decoder.why
    np.testing.assert_allclose(logits_of(decoder, tokens, chunk=50), wanted, atol=2e-4)
    with pytest.raises(BudgetError):
        native(models["llama-packed"], cache_tokens=128, max_ram_bytes=smallest - 1)
    whole = native(models["llama-packed"], cache_tokens=128, max_ram_bytes=smallest + 10**6)
    assert "read again" not in whole.why


def test_a_memory_limit_makes_the_cache_smaller(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "current_rss_bytes", lambda: 10**8)
    free = open_decoder(models["llama"], backend="native", slots=16)
    size = sum(path.stat().st_size for path in models["llama"].glob("*.safetensors"))
    others = 10**8 + decode.SPARE_BYTES + decode.step_bytes(decode.read_config(models["llama"]), slots=16)
    limited = open_decoder(models["llama"], backend="native", slots=16, max_ram_bytes=others + size + 200_000)
    assert 0 < limited.cache_blocks < free.cache_blocks


def test_a_first_step_may_want_no_logits(models: dict[str, Path]) -> None:
    assert native(models["llama"]).step(batch_of([(3, 0, 0)], [[0]], [])).shape == (0, 203)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("architectures", ["FalconForCausalLM"], "Falcon"),
        ("hidden_act", "relu", "relu"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}, "yarn"),
        ("head_dim", 18, "18"),
    ],
)
def test_what_cannot_be_lowered_says_why(
    models: dict[str, Path], tmp_path: Path, key: str, value: Any, reason: str
) -> None:
    folder = copy_with(models["llama"], tmp_path / "model", **{key: value})
    with pytest.raises(ConfigError, match=reason):
        native(folder)


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": 80}, {"vocab_size": 204}, {"num_hidden_layers": 4}, {"hidden_size": None}, {"hidden_size": -4}],
    ids=str,
)
def test_a_config_that_does_not_fit_the_weights_is_an_error(
    models: dict[str, Path], tmp_path: Path, change: dict
) -> None:
    with pytest.raises((ArtifactError, ConfigError)):
        native(copy_with(models["llama-packed"], tmp_path / "model", **change))


def test_a_file_cut_short_is_an_error(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_with(models["llama-packed"], tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="download or make it again"):
        native(folder)


def copy_with(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a model folder whose config has other values."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder
