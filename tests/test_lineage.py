"""What an artifact was made from, by role: recorded by the call, shown, and asked by the audit; cards that keep up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.progress import Progress
from gulliver.core.store.artifact import Artifact, copy_artifact, verify
from gulliver.core.store.store import Store
from gulliver.pipeline import resolve, steps
from gulliver.pipeline.call import Call, call
from gulliver.pipeline.run import run_recipe
from gulliver.pipeline.steps import Step

BLEND = Step(
    "blend",
    "toys.blend:run",
    "toys.blend:Config",
    needs=("model",),
    makes=("model",),
    several=("model",),
    help="the mean of some models",
)
TEACH = Step(
    "teach",
    "toys.shrink:run",
    "toys.shrink:Config",
    needs=("model", "parent"),
    optional=("dataset", "samples"),
    makes=("model",),
    compresses=True,
    help="make it like its parent",
)
READ = Step("read", "toys.words:run", "toys.words:Config", needs=(), makes=("dataset",), reads=("data",), help="data")
Run = Callable[..., Artifact]


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "STEPS", (*toys.TABLE, BLEND, TEACH, READ))


@pytest.fixture
def made(store: Store, quiet: Progress) -> Run:
    def make(name: str, config: dict[str, Any] | None = None, **inputs: Any) -> Artifact:
        return call(name, config or {}, inputs, store=store, progress=quiet)

    return make


# ---- roles -----------------------------------------------------------------------------------------------------------
def test_a_call_records_its_inputs_by_role(made: Run, store: Store) -> None:
    first, second = made("make"), made("make", {"weights": 32})
    student = made("teach", model=first, parent=second)
    assert student.inputs == {"model": (first.id,), "parent": (second.id,)}
    assert store.runs()[-1].inputs == {"model": [first.id], "parent": [second.id]}
    assert made("teach", model=second, parent=first).id != student.id, "who was teacher is part of what it is"
    verify(student)


def test_several_artifacts_in_one_role_keep_their_order(made: Run, store: Store, quiet: Progress) -> None:
    first, second = made("make"), call("make", {}, {}, store=store, seed=1, progress=quiet)
    both = made("blend", model=[first, second.id])
    assert both.inputs == {"model": (first.id, second.id)}
    assert made("blend", model=(second, first)).inputs == {"model": (second.id, first.id)}
    assert made("blend", model=first).inputs == {"model": (first.id,)}
    log: list[Call] = []
    call("blend", {}, {"model": [first, second]}, store=store, progress=quiet, log=log)
    call("blend", {}, {"model": [second, first]}, store=store, progress=quiet, log=log)
    assert [entry.reused for entry in log] == [True, True]
    with pytest.raises(ConfigError, match="holds the same model twice"):
        made("blend", model=[first, first.id])
    with pytest.raises(ConfigError, match="needs the input 'model'"):
        made("blend", model=[])
    with pytest.raises(ConfigError, match="input model of step 'shrink' must be one model, not several"):
        made("shrink", model=[first, second])


def test_several_inputs_from_the_command_line_and_a_recipe(
    command: Callable[..., tuple[int, str, str]], store: Store, tmp_path: Path
) -> None:
    ids = [json.loads(command("make", "--seed", str(seed), "--json")[1])["id"] for seed in (0, 1)]
    code, out, err = command("blend", *ids, "--json")
    assert code == 0, err
    both = json.loads(out)["id"]
    shown = json.loads(command("show", both, "--json")[1])
    assert shown["inputs"] == {"model": ids} and shown["parents"] == ids
    assert shown["lineage"][0]["inputs"] == {"model": ids}
    assert f"model {ids[0][:12]}, model {ids[1][:12]}" in command("show", both)[1]
    recipe = tmp_path / "life.toml"
    recipe.write_text(
        '[[step]]\nid = "a"\nuse = "make"\n[[step]]\nid = "b"\nuse = "make"\nseed = 1\n'
        '[[step]]\nid = "both"\nuse = "blend"\ninputs = { model = ["a", "b"] }\n'
    )
    calls = run_recipe(recipe, store=store, progress=Progress(quiet=True)).calls
    assert [entry.reused for entry in calls] == [True] * 3 and calls[-1].artifact.id == both


# ---- what the audit asks ---------------------------------------------------------------------------------------------
def test_a_model_is_compared_with_its_teacher_or_what_it_came_from(made: Run, store: Store) -> None:
    base, teacher = made("make"), made("make", {"weights": 32})
    small = made("shrink", model=base)
    assert resolve.original(small, store) == base
    assert resolve.original(made("shrink", {"bits": 2}, model=small), store) == base
    assert resolve.original(made("teach", model=small, parent=teacher), store) == teacher
    assert resolve.original(base, store) is None
    assert resolve.original(made("blend", model=[small]), store) == base


def test_the_data_of_a_model_are_not_what_a_model_wrote(made: Run, store: Store, tmp_path: Path) -> None:
    texts = [tmp_path / "own.txt", tmp_path / "given.txt"]
    for text in texts:
        text.write_text(text.name)
    own, given = (made("read", {"data": str(text), "task": "toy"}) for text in texts)
    base = made("make")
    student = made("teach", model=base, parent=base, samples=own, dataset=given)
    assert resolve.data_for(student, None, store) == given
    assert resolve.data_for(made("shrink", model=student), None, store) == given
    assert resolve.data_for(made("teach", {"bits": 2}, model=base, parent=base, samples=own), None, store) is None
    assert resolve.data_for(base, None, store) is None


def test_artifacts_that_recorded_no_roles_are_still_understood(made: Run, store: Store, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words")
    data, base = made("read", {"data": str(text), "task": "toy"}), made("make")
    small = made("shrink", model=base)

    def as_format_1(parents: list[str]) -> Artifact:
        from artifact_samples import rewrite

        from gulliver.core.store.artifact import open_artifact

        folder = copy_artifact(small, tmp_path / "old").path

        def change(body: dict[str, Any]) -> None:
            del body["inputs"]
            body.update(format=1, parents=parents)

        rewrite(open_artifact(folder), change)
        return copy_artifact(open_artifact(folder), store.artifacts_folder / open_artifact(folder).id)

    old = as_format_1([small.id, base.id, data.id])
    assert resolve.original(old, store) == base and resolve.data_for(old, None, store) == data
    assert store.lineage(old.id)[0]["parents"] == [small.id, base.id, data.id]


# ---- cards that keep up ----------------------------------------------------------------------------------------------
def _metrics(model: Artifact) -> list[str]:
    return [row["metric"] for row in json.loads((model.path / "evidence.json").read_text())["evidence"]]


def test_card_and_evidence_are_written_whenever_evidence_is_recorded(made: Run, store: Store) -> None:
    base = made("make")
    small = made("shrink", model=base)
    assert not (small.path / "evidence.json").exists()
    made("measure", model=small)
    assert _metrics(small) == ["size_bytes", "perplexity_ratio"]
    card = (small.path / "README.md").read_text()
    assert "perplexity" in card and small.id[:12] in card
    made("measure", {"windows": 9}, model=small)
    assert len(_metrics(small)) == 4 and (small.path / "README.md").read_text() != card
    verify(small)
    (small.path / "evidence.json").unlink()
    made("measure", {"windows": 9}, model=small)
    assert not (small.path / "evidence.json").exists(), "what is found again records nothing"
    assert not (base.path / "evidence.json").exists(), "a model that nothing was measured about has no card"


def test_a_copy_keeps_what_was_known_when_it_was_made(made: Run, tmp_path: Path) -> None:
    small = made("shrink", model=made("make"))
    made("measure", model=small)
    copy = copy_artifact(small, tmp_path / "out")
    made("measure", {"windows": 9}, model=small)
    assert (len(_metrics(copy)), len(_metrics(small))) == (2, 4)
    assert len(_metrics(copy_artifact(small, tmp_path / "out"))) == 4, "copying again renews it"


def test_a_copy_that_the_user_names_keeps_up_and_never_takes_evidence_back(
    made: Run, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = made("shrink", model=made("make"))
    made("measure", model=small)
    copy, older = copy_artifact(small, tmp_path / "out"), copy_artifact(small, tmp_path / "older")
    named = resolve.resolve_any(str(copy.path), store)
    made("measure", {"windows": 9}, model=named)
    assert len(_metrics(copy)) == len(_metrics(small)) == 4
    assert (copy.path / "README.md").read_text() == (small.path / "README.md").read_text()
    assert resolve.resolve_any(str(older.path), store) == small
    assert (len(_metrics(older)), len(_metrics(small))) == (2, 4), "an older folder says less, and the store keeps more"

    (older.path / "evidence.json").unlink()
    (older.path / "evidence.json").mkdir()
    call("measure", {"windows": 3}, {"model": small}, store=store, progress=Progress())
    assert f"the card of {small.id[:12]} was not renewed" in capsys.readouterr().err
    assert len(_metrics(small)) == 6


def test_a_model_outside_the_store_gets_no_card(made: Run, store: Store, tmp_path: Path) -> None:
    elsewhere = Store(tmp_path / "elsewhere")
    outside = call("make", {}, {}, store=elsewhere, progress=Progress(quiet=True))
    made("measure", model=outside)
    assert len(store.evidence(outside.id)) == 2 and not (outside.path / "evidence.json").exists()


def test_a_card_that_cannot_be_written_is_told_and_fails_nothing(
    made: Run, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(*_: Any) -> None:
        raise ArtifactError("plan.json is damaged")

    monkeypatch.setattr("gulliver.report.card.write_card", damaged)
    model = made("make")
    call("measure", {}, {"model": model}, store=store, progress=Progress())
    assert f"the card of {model.id[:12]} was not renewed: plan.json is damaged" in capsys.readouterr().err
    assert len(store.evidence(model.id)) == 2


def test_a_damaged_copy_in_the_store_is_not_taken_for_a_whole_folder(made: Run, store: Store, tmp_path: Path) -> None:
    model = made("make")
    whole = copy_artifact(model, tmp_path / "whole")
    name = next(name for name in model.files if name.endswith(".safetensors"))
    data = model.file(name).read_bytes()
    model.file(name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="differs"):
        resolve.resolve_any(str(whole.path), store)
