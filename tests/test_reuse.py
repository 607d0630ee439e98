"""A memory limit and what was made before: a call never returns what was made beyond its limit, and never refuses for

what an earlier call took. Both orders, in one home, as users call it.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toys.shrink
from compress_samples import Lab, contents

import gulliver
from gulliver.compress import options
from gulliver.core import memory
from gulliver.core.context import PEAK, Context
from gulliver.core.errors import BudgetError, ConfigError
from gulliver.core.progress import Progress
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.store import Store
from gulliver.data.options import SampleOptions
from gulliver.pipeline import fitting as fits
from gulliver.pipeline.call import Call, call, resolved

FEW = {"examples": 8, "batch_size": 4, "family": {"tokens": 32}, "gradient_examples": 4}


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each step is told that it held, in bytes; the last one counts."""
    taken = [500_000_000]
    monkeypatch.setattr(memory, "peak_rss_bytes", lambda: taken[-1])
    return taken


@pytest.fixture
def shrunk(toy_table: None, store: Store, quiet: Progress) -> Any:
    """Calls the step `shrink` under a limit; returns what was done."""
    model = call("make", {}, {}, store=store, progress=quiet)

    def shrink(limit: int | None, **config: Any) -> Call:
        log: list[Call] = []
        call("shrink", {"max_ram_bytes": limit, **config}, {"model": model}, store=store, progress=quiet, log=log)
        return log[0]

    return shrink


# ---- one step ------------------------------------------------------------------------------------------------------
def test_a_limit_is_not_met_by_what_took_more(shrunk: Any, held: list[int]) -> None:
    free = shrunk(None)
    held.append(200_000_000)
    limited = shrunk(300_000_000)
    assert (free.reused, limited.reused) == (False, False)
    assert (free.peak_rss_bytes, limited.peak_rss_bytes) == (500_000_000, 200_000_000)
    assert free.artifact == limited.artifact, "the limit decides nothing here, so it makes the same model"
    again = shrunk(300_000_000)
    assert again.reused and again.peak_rss_bytes == 200_000_000


def test_a_limit_is_met_by_what_took_less(shrunk: Any, held: list[int]) -> None:
    free = shrunk(None)
    assert shrunk(500_000_000).reused and shrunk(None).reused
    held.append(100_000_000)
    assert not shrunk(499_999_999, bits=4).reused
    assert shrunk(None).peak_rss_bytes == 100_000_000 and free.peak_rss_bytes == 500_000_000


def test_an_unlimited_call_finds_what_was_made_within_a_limit(shrunk: Any, held: list[int]) -> None:
    limited = shrunk(600_000_000)
    assert shrunk(None).reused and not limited.reused


def test_a_step_stops_where_it_exceeds_its_limit(shrunk: Any, held: list[int]) -> None:
    for _ in range(2):
        with pytest.raises(BudgetError, match="reached 500 MB at block 0; the limit is 400 MB"):
            shrunk(400_000_000)
    held.append(300_000_000)
    assert shrunk(400_000_000).peak_rss_bytes == 300_000_000


def test_what_took_more_than_its_limit_is_refused_and_found_without_it(
    shrunk: Any, held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "check_ram", lambda *_: None)  # it came between two of the step's own looks
    for _ in range(2):
        with pytest.raises(BudgetError, match="reached 500 MB in step shrink; the limit is 400 MB"):
            shrunk(400_000_000)
    assert shrunk(None).reused
    held.append(300_000_000)
    assert not shrunk(400_000_000).reused


def test_scratch_that_took_more_than_the_limit_is_not_resumed(
    shrunk: Any, held: list[int], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(limit: int | None) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(toys.shrink, "save_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                shrunk(limit)
        (work,) = (store.home / "work").iterdir()
        return work

    work = killed(None)
    assert int((work / PEAK).read_text()) == 500_000_000
    written = (work / "block-0.npy").stat().st_mtime_ns
    assert killed(600_000_000) == work and (work / "block-0.npy").stat().st_mtime_ns == written, "it resumes"
    held.append(100_000_000)
    assert shrunk(200_000_000).peak_rss_bytes == 100_000_000, "made anew, within the limit"
    assert not work.exists()


def test_a_resumed_call_has_held_what_it_held_before_it_was_killed(
    shrunk: Any, held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(toys.shrink, "save_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            shrunk(None)
    held.append(100_000_000)
    assert shrunk(None).peak_rss_bytes == 500_000_000
    assert not shrunk(400_000_000).reused


# ---- calibrate: the limit decides what outputs count by -----------------------------------------------------------
@pytest.mark.parametrize("limited_first", [False, True])
def test_calibrate_with_and_without_a_limit(
    language: Lab, monkeypatch: pytest.MonkeyPatch, limited_first: bool
) -> None:
    config = {**FEW, "examples": 12 if limited_first else 16}
    limit = memory.current_rss_bytes() + 1_000_000_000
    monkeypatch.setattr(options, "BACKWARD_BYTES", limit)  # with the weights: just beyond the limit
    found: dict[int | None, Artifact] = {}
    for asked in (limit, None) if limited_first else (None, limit):
        given = config if asked is None else {**config, "max_ram_bytes": asked}
        found[asked] = language.step("calibrate", given, model=language.model, dataset=language.dataset)
    free, limited = found[None], found[limit]
    assert contents(free, "statistics.json")["sensitivity"] == "gradient" == free.config["sensitivity"]
    assert contents(limited, "statistics.json")["sensitivity"] == "power" == limited.config["sensitivity"]
    named = language.step(
        "calibrate", {**config, "sensitivity": "power"}, model=language.model, dataset=language.dataset
    )
    assert named == limited, "what auto came to is the same call as its name"
    runs = [run for run in language.store.runs() if run.artifact_id == limited.id]
    assert [run.config["sensitivity"] for run in runs] == ["auto"], "what was asked is recorded with the run"


def test_what_a_family_leaves_to_its_defaults_is_recorded_and_in_the_key(language: Lab) -> None:
    few = {"examples": 4, "gradient_examples": 4, "sensitivity": "power"}
    inputs = {"model": language.model, "dataset": language.dataset}
    made = language.step("calibrate", few, **inputs)
    tokens = made.config["family"]["tokens"]
    before = len(language.store.runs())
    assert language.step("calibrate", {**few, "tokens": tokens}, **inputs) == made
    assert len(language.store.runs()) == before, "a default that is written out changes nothing"
    assert (
        language.step("calibrate", {**few, "tokens": tokens // 2}, **inputs).config["family"]["tokens"] == tokens // 2
    )
    with pytest.raises(ConfigError, match="the language family: unknown option 'texts'"):
        language.step("calibrate", {**few, "texts": 8}, **inputs)


# ---- fit ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def asked(language: Lab, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`fit` of the toy language model at a size of its own, small efforts; returns the model and its recorded peaks."""
    quick: dict[str, Any] = {
        "sample": None,
        "calibrate": {"examples": 4, "gradient_examples": 4},
        "plan": {"probe_rows": 4, "gptq": False},
        "distill": None,
        "quality": {"share": 0.2},
    }

    def fit(size: int, ram: int | None, sensitivity: str = "auto") -> tuple[Artifact, list[float]]:
        calibrate = {**quick["calibrate"], "sensitivity": sensitivity}
        monkeypatch.setattr(fits, "EFFORTS", {**fits.EFFORTS, "fast": {**quick, "calibrate": calibrate}})
        made = gulliver.fit(
            language.model,
            size=size,
            ram=ram,
            data=language.dataset,
            effort="fast",
            store=language.store,
            progress=Progress(quiet=True),
        )
        peaks = [item for item in language.store.evidence(made.id) if item.metric == "compress_peak_ram_bytes"]
        return made, [item.value for item in peaks]

    return fit


@pytest.mark.parametrize(("sensitivity", "same"), [("power", True), ("auto", False)])
def test_fit_without_a_limit_does_not_make_a_limit_infeasible(
    asked: Any, language: Lab, monkeypatch: pytest.MonkeyPatch, sensitivity: str, same: bool
) -> None:
    size = 57_000 if same else 57_100
    block = bytearray(400_000_000)
    block[::4096] = b"x" * len(block[::4096])
    free, (peak,) = asked(size, None, sensitivity)
    del block
    limit = int(peak) - 100_000_000
    monkeypatch.setattr(options, "BACKWARD_BYTES", limit)
    limited, peaks = asked(size, limit, sensitivity)
    assert limited.weight_bytes <= size and peaks[-1] <= limit < peak
    assert (limited == free) == same and (peaks[0] == peak) == same, "the same model has the evidence of both runs"
    before = len(language.store.runs())
    assert asked(size, limit, sensitivity) == (limited, peaks)
    assert len(language.store.runs()) == before, "a second one does no work"


def test_fit_with_a_limit_and_then_without(asked: Any, language: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = memory.current_rss_bytes() + 600_000_000
    monkeypatch.setattr(options, "BACKWARD_BYTES", limit)
    limited, peaks = asked(58_000, limit)
    assert peaks[-1] <= limit
    free, _ = asked(58_000, None)
    steps = {run.step: run.config for run in language.store.runs()}
    assert steps["calibrate"]["sensitivity"] == "auto"
    sensitivities = {
        language.store.get(manifest["id"]).config["sensitivity"]
        for model in (limited, free)
        for manifest in language.store.lineage(model.id)
        if manifest["step"]["name"] == "calibrate"
    }
    assert sensitivities == {"power", "gradient"}, "each has the calibration of its own limit"
    assert free.weight_bytes <= 58_000


def test_the_family_is_that_of_the_models_whatever_their_role_is_called() -> None:
    given = {
        "notes": SimpleNamespace(kind="dataset", task="vision"),
        "models": (SimpleNamespace(kind="model", task="language"),) * 2,
    }
    assert resolved(SampleOptions(), given).family["tokens"] == 512
    assert "tokens" not in resolved(SampleOptions(), {"notes": given["notes"]}).family
