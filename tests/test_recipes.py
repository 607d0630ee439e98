"""Each shipped recipe runs from end to end at toy size, and a second run does no work."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from toy_language import write_model, write_text

from gulliver.core.errors import GateRefused
from gulliver.core.progress import Progress
from gulliver.core.store.artifact import verify
from gulliver.core.store.store import Store
from gulliver.pipeline.recipe import load
from gulliver.pipeline.run import run_recipe

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True)
class Toy:
    """What is replaced in a recipe to make it small; every old text must be there."""

    changes: tuple[tuple[str, str], ...]
    refused: tuple[str, str]
    """A change that makes one of its gates refuse."""


TOYS = {
    "language-fit": Toy(
        changes=(
            ('"catalog:smollm2-135m-instruct"', '"{model}"'),
            ('"catalog:shakespeare"', '"{text}"'),
            ('"84MB"', '"{most}"'),
            ("84_000_000", "{most}"),
            ("at_most = 1.15", "at_most = 2.0"),
        ),
        refused=("at_most = 2.0", "at_most = 0.5"),
    ),
    "vision-digits": Toy(
        changes=(("steps = 300", "steps = 40"), ("at_most = 0.03", "at_most = 0.5")),
        refused=("at_least = 0.5", "at_least = 0.95"),
    ),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("toy")
    model = write_model(folder / "model")
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return {"model": model, "text": write_text(folder / "text.txt"), "most": weights // 2}


def test_every_shipped_recipe_is_tried_and_valid() -> None:
    assert {path.stem for path in RECIPES.glob("*.toml")} == set(TOYS)
    for path in RECIPES.glob("*.toml"):
        recipe = load(path)
        assert recipe.name == path.stem
        assert f"gulliver run recipes/{path.name}" in path.read_text(encoding="utf-8")


def shown(report: Path) -> tuple[str, list[str], set[str]]:
    """(the verdict of a page, the metrics of its gates, their outcomes)."""
    text = report.read_text(encoding="utf-8")
    verdict = re.findall(r"<strong>([A-Z ]+)</strong>", text)
    gates = text.split("<h2>Gates</h2>")[1].split("<h2>")[0]
    rules = re.findall(r'<th scope="row"[^>]*>([^<]+) at (?:most|least) ', gates)
    assert len(verdict) == 1
    return (
        verdict[0],
        [rule.replace(" ", "_") for rule in rules],
        set(re.findall(r"<b class=[^>]*>([A-Z ]+)</b>", gates)),
    )


@pytest.mark.parametrize("name", sorted(TOYS))
def test_a_recipe_runs_and_its_second_run_does_no_work(
    name: str, places: dict[str, object], store: Store, quiet: Progress, tmp_path: Path
) -> None:
    toy = TOYS[name]
    text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    for old, new in toy.changes:
        assert old in text
        text = text.replace(old, new.format(**places))
    path = tmp_path / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    first = run_recipe(path, store=store, progress=quiet)
    assert [verdict.outcome for verdict in first.verdicts] == ["PASS"] * len(first.verdicts)
    assert first.verdicts
    assert first.report is not None
    assert shown(first.report) == (
        "PASS",
        [verdict.metric.removesuffix("_bytes") for verdict in first.verdicts],
        {"PASS"},
    )
    for entry in first.calls:
        verify(entry.artifact)
    models = [entry.artifact for entry in first.calls if entry.artifact.kind == "model"]
    assert models[-1].weight_bytes < models[0].weight_bytes
    second = run_recipe(path, store=store, progress=quiet)
    assert all(entry.reused for entry in second.calls)
    assert [entry.artifact.id for entry in second.calls] == [entry.artifact.id for entry in first.calls]
    assert toy.refused[0] in text
    path.write_text(text.replace(*toy.refused), encoding="utf-8")
    with pytest.raises(GateRefused):
        run_recipe(path, store=store, progress=quiet)
    outcome, _, outcomes = shown(first.report)
    assert outcome == "REFUSED" and "FAIL" in outcomes
    assert "does not meet the limit" in first.report.read_text(encoding="utf-8")
