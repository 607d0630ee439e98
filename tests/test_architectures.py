"""Networks of eight shapes through the whole chain, as benchmarks/architectures.py takes every causal architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gulliver.core.progress import Progress
from gulliver.core.store.store import Store
from gulliver.pipeline.resolve import resolve_data

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SHAPES = {
    "mixtral": "experts fused to stacks",
    "gpt2": "transposed linears",
    "mamba2": "a state space",
    "lfm2": "convolutions between attention layers",
    "deepseek_v3": "latent attention",
    "gemma2": "sliding windows and soft caps",
    "recurrent_gemma": "a recurrence",
    "bloom": "a residual that a layer adds itself",
}
MOST_AT_16_BITS = 0.35


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import architectures

    return architectures


@pytest.mark.parametrize("kind", SHAPES)
def test_networks_of_every_shape_pass_the_whole_chain(kind: str, sweep: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(sweep.TEXT)
    store = Store(tmp_path / "store")
    row = sweep.chain(kind, tmp_path, resolve_data(tmp_path / "text.txt", store, progress=Progress(quiet=True)), store)
    assert row["failed"] is None, row
    assert row["packed"] > 0 and row["share_at_16_bits"] < MOST_AT_16_BITS and row["kl_divergence"] < 0.1


def test_every_causal_type_has_a_row(sweep: Any) -> None:
    import json

    results = json.loads(sweep.RESULTS.read_text(encoding="utf-8"))
    if results["transformers"] != sweep.transformers.__version__:
        pytest.skip("another transformers is installed than the sweep ran on")
    assert set(results["architectures"]) == set(sweep.auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_the_page_shows_the_results(sweep: Any, tmp_path: Path) -> None:
    import json

    page = tmp_path / "models.md"
    page.write_text(sweep.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    results = json.loads(sweep.RESULTS.read_text(encoding="utf-8"))
    sweep.draw(results["architectures"], results["wider"], page)
    assert page.read_text(encoding="utf-8") == sweep.PAGE.read_text(encoding="utf-8")
