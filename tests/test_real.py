"""The main job on the real SmolLM2, with the commands that a user types: pull, fit, verify, export, open elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

MODEL = "catalog:smollm2-135m-instruct"
SIZE = 84_000_000
PARAMETERS = 134_515_008
TEXT = """The lighthouse stood on a rock two miles from the harbour. Every evening the keeper climbed the stairs,
lit the lamp, and wrote the time and the state of the sea in his book. In forty years he had missed two evenings."""


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

    plain = home / "plain"
    gulliver(home, "export", shown["id"], "--format", "safetensors", "--out", plain)
    parent = gulliver(home, "pull", MODEL)
    kept, given = loss_of(plain), loss_of(Path(parent["path"]))
    assert 0.9 < kept / given < 1.1
    with safe_open(next(plain.glob("*.safetensors")), "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def loss_of(folder: Path) -> float:
    """Mean loss per token of `TEXT` by transformers alone."""
    tokens = torch.tensor([transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]])
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(network(input_ids=tokens, labels=tokens).loss)
