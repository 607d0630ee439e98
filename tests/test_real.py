"""The main job on the real SmolLM2, with the commands that a user types: pull, fit, verify, export, open elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from gulliver.runtime.decode import native_reason, open_decoder
from gulliver.runtime.decoder import Decoder, StepBatch

MODEL = "catalog:smollm2-135m-instruct"
SIZE = 84_000_000
PARAMETERS = 134_515_008
REAL_GAP_BOUND = 0.5
"""Most nats by which the reference may prefer its own greedy token to the native path's."""
REAL_LOSS_BOUND = 0.02
"""Most nats per token by which the two paths' losses on a text may differ."""
TEXT = """The lighthouse stood on a rock two miles from the harbour. Every evening the keeper climbed the stairs,
lit the lamp, and wrote the time and the state of the sea in his book. In forty years he had missed two evenings."""
LONG_TEXT = f"""{TEXT} The first was the evening of the great storm, when the door had been blown from its hinges and
the stairs stood under water to the height of a man. The second he never spoke of. When the company sent a
young engineer to put in an electric lamp, the old man showed him the tower from the cellar to the roof,
made him tea, and asked how the new lamp would know that it was evening. There is a small glass eye, said
the engineer, which looks at the sky. And who looks at the sea? asked the keeper. The engineer thought
about this for some time. On his way back to the harbour, with the rock growing small behind the boat, he
saw that the lamp was lit already, though the sun had not yet touched the water, and he took out his own
book and wrote down the time."""


def gulliver(home: Path, *words: object) -> dict[str, Any]:
    """The JSON document of one command in a process of its own."""
    command = [sys.executable, "-m", "gulliver", *map(str, words), "--home", str(home), "--json"]
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(command, capture_output=True, text=True, env=online)
    if "could not be downloaded" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, f"{words[0]}: exit {done.returncode}\n{done.stderr[-2000:]}"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def fitted(home: Path) -> Path:
    """What `fit` leaves behind for the user."""
    budget = ["--size", SIZE, "--effort", "fast", "--max-drop", "10%"]
    gulliver(home, "fit", MODEL, *budget, "--data", "catalog:shakespeare", "--out", home / "out")
    return home / "out"


@pytest.mark.real
def test_fit_meets_its_budget_on_the_real_model_and_others_open_the_result(home: Path, fitted: Path) -> None:
    assert gulliver(home, "verify", fitted)["verified"]
    shown = gulliver(home, "show", fitted)
    weights = sum(path.stat().st_size for path in fitted.glob("*.safetensors"))
    assert shown["weight_bytes"] == weights and 0.98 * SIZE < weights <= SIZE
    evidence = {item["metric"]: item for item in shown["evidence"]}
    assert evidence["parameter_count"]["value"] == PARAMETERS
    assert evidence["kl_divergence"]["value"] > 0 and evidence["quality_loss"]["high"] < 0.1
    assert evidence["perplexity_vs_baseline"]["high"] < 0.5
    assert "84" in (fitted / "README.md").read_text() and "verdict" in (fitted / "report.html").read_text().lower()

    plain, unpacked = home / "plain", home / "unpacked"
    gulliver(home, "export", shown["id"], "--format", "safetensors", "--out", plain)
    parent = gulliver(home, "pull", MODEL)  # it stays in the blocks of its file
    gulliver(home, "export", parent["id"], "--format", "safetensors", "--out", unpacked)
    kept, given = loss_of(plain), loss_of(unpacked)
    assert 0.9 < kept / given < 1.1
    with safe_open(next(plain.glob("*.safetensors")), "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


@pytest.mark.real
@pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))
def test_the_native_path_writes_what_the_reference_writes(fitted: Path) -> None:
    """64 greedy tokens, given the same text so far, and the loss of a text: within a stated bound of the reference."""
    native, reference = open_decoder(fitted, backend="native"), open_decoder(fitted, backend="reference")
    tokenizer = transformers.AutoTokenizer.from_pretrained(fitted)
    tokens, text = (np.array(tokenizer(words)["input_ids"], np.int32) for words in (TEXT, LONG_TEXT))
    assert 200 < len(text) <= native.max_rows
    losses = [], []
    for decoder, kept in zip((native, reference), losses, strict=True):
        logits = torch.tensor(stepped(decoder, text, 0, range(len(text) - 1)))
        kept.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:], dtype=torch.long))))
    assert abs(losses[0][0] - losses[1][0]) < REAL_LOSS_BOUND

    agreed = 0
    for position in range(len(tokens), len(tokens) + 64):
        theirs = stepped(reference, tokens, position - 1, [0])[0]
        ours = stepped(native, tokens, position - 1, [0])[0]
        agreed += int(ours.argmax() == theirs.argmax())
        assert theirs.max() - theirs[ours.argmax()] < REAL_GAP_BOUND
        tokens = np.append(tokens, np.int32(theirs.argmax()))
    assert agreed >= 54  # where they differ, the two first choices are nearly equal: see above


def stepped(decoder: Decoder, tokens: np.ndarray, start: int, wanted: Sequence[int]) -> np.ndarray:
    """Logits of rows `wanted` of the tokens from position `start` on, as one step."""
    rows = np.arange(start, len(tokens), dtype=np.int32)
    blocks = np.arange(len(tokens) // decoder.block_tokens + 1, dtype=np.int32)[None]
    wanted_rows = np.array(wanted, np.int32)
    return decoder.step(StepBatch(tokens[rows], rows, np.zeros_like(rows), blocks, wanted_rows)).copy()


def loss_of(folder: Path) -> float:
    """Mean loss per token of `TEXT` by transformers alone."""
    tokens = torch.tensor([transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]])
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(network(input_ids=tokens, labels=tokens).loss)
