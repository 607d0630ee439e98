"""The Python API over toy steps: the same names and the same answers as the command line."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import toys

import gulliver
from gulliver.cli import options
from gulliver.core.errors import ArtifactError, ConfigError, DataError
from gulliver.core.progress import Progress
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.store import Store
from gulliver.pipeline import api, steps
from gulliver.pipeline.call import call
from gulliver.pipeline.steps import Step


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy steps, with measurements called as the audit calls them, and a step that makes a dataset."""
    make, shrink, measure = toys.TABLE
    rows = (
        make,
        shrink,
        replace(shrink, name="quantize"),
        replace(measure, name="quality", needs=("model", "dataset")),
        replace(measure, name="speed"),
        Step(
            "read",
            "toys.words:run",
            "toys.words:Config",
            needs=(),
            makes=("dataset",),
            reads=("data",),
            help="a toy dataset",
        ),
    )
    monkeypatch.setattr(steps, "STEPS", rows)


pytestmark = pytest.mark.usefixtures("table")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_a_step_is_a_function(home: Path, quiet: Progress) -> None:
    make, shrink = api.step_function("make"), api.step_function("shrink")
    model = make(32, home=home, progress=quiet, seed=3)
    assert (model.config["weights"], model.seed) == (32, 3)
    assert make(weights=32, home=home, progress=quiet, seed=3) == model
    small = shrink(model, bits=2, home=home, progress=quiet)
    assert shrink(model=model.id[:8], bits=2, home=home, progress=quiet) == small
    assert small.parents == (model.id,)
    assert shrink.__name__ == "shrink"
    assert shrink.__doc__ == "Keep some of it. Inputs: model."
    with pytest.raises(ConfigError, match="takes at most 1 inputs by position: model"):
        shrink(model, 2, home=home)
    with pytest.raises(ConfigError, match="did you mean 'bits'"):
        shrink(model, bit=2, home=home)
    with pytest.raises(ConfigError, match="needs the input 'model'"):
        shrink(home=home)


def _life(store: Store, quiet: Progress, text: Path) -> tuple[Artifact, Artifact, Artifact]:
    text.write_text("some words")
    model = call("make", {}, {}, store=store, progress=quiet)
    small = call("shrink", {}, {"model": model}, store=store, progress=quiet)
    return model, small, call("quantize", {"bits": 2}, {"model": small}, store=store, progress=quiet)


def test_audit_compares_with_what_no_compressing_step_made(store: Store, quiet: Progress, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    model, small, smaller = _life(store, quiet, text)
    found = api.audit(smaller.id, text, store=store, progress=quiet)
    assert [item.metric for item in found] == ["perplexity_ratio"] * 2 + ["size_bytes"] * 2
    assert {item.parent_id for item in found if item.metric == "perplexity_ratio"} == {model.id, None}
    assert all(item.artifact_id == smaller.id for item in found)
    named = api.audit(smaller, text, small, store=store, progress=quiet)
    assert small.id in {item.parent_id for item in named}
    with pytest.raises(DataError, match="made without data"):
        api.audit(smaller, store=store, progress=quiet)


def test_show_verify_and_list(store: Store, quiet: Progress, tmp_path: Path) -> None:
    model, small, smaller = _life(store, quiet, tmp_path / "text.txt")
    shown = api.show(smaller.id[:10], store=store)
    assert [row["id"] for row in shown["lineage"]] == [smaller.id, small.id, model.id]
    json.dumps(shown)
    assert api.verify(model.path) == api.verify(model.id, store=store) == model
    assert {artifact.id for artifact in api.list_artifacts(store=store)} == {model.id, small.id, smaller.id}
    import shutil

    shutil.rmtree(model.path)
    assert api.show(smaller, store=store)["lineage"][-1] == {"id": model.id, "missing": True}
    with pytest.raises(ArtifactError, match="`gulliver list`"):
        api.verify(model.id, store=store)


def test_the_audit_command_prints_what_it_measured(
    command: Callable[..., tuple[int, str, str]], store: Store, quiet: Progress, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    _, small, _ = _life(store, quiet, text)
    code, out, err = command("audit", small.id, "--data", text, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["artifact"] == small.id
    assert {item["metric"] for item in document["evidence"]} == {"size_bytes", "perplexity_ratio"}
    assert "perplexity_ratio" in command("audit", small.id, "--data", text)[1]
    assert command("audit", small.id)[0] == 2


def test_data_is_read_for_the_task_of_the_model(store: Store, quiet: Progress, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    model, _, _ = _life(store, quiet, text)
    row = steps.find("quality")
    found = api.resolve_inputs(row, {"dataset": str(text), "model": model.id}, {}, store, quiet)
    assert found["dataset"].task == "toy"
    again = api.resolve_inputs(row, {"dataset": found["dataset"].id, "model": model}, {}, store, quiet)
    assert again["dataset"] == found["dataset"]


@pytest.mark.parametrize("name", ["audit", "bench", "fit"])
def test_a_function_takes_the_options_of_its_command(name: str) -> None:
    takes = inspect.signature(getattr(gulliver, name)).parameters
    for field, about in options.__dict__[f"{name.capitalize()}Options"].model_fields.items():
        assert field in takes, (name, field)
        if field != "out":  # the command line always writes a folder
            default = inspect.Parameter.empty if about.is_required() else about.default
            assert takes[field].default == default, (name, field)
