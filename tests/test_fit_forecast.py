"""`fit --dry-run`: the quality that sizes would cost and the time it would take, before anything long is done."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from compress_samples import Lab
from fit_samples import at_home, fit, small_efforts

from gulliver.core.errors import BudgetError
from gulliver.core.records import FitResult
from gulliver.pipeline import smallest

__all__ = ["at_home", "small_efforts"]
DIGITS, SMALL = 60_000, 41_000


def test_a_dry_run_forecasts_and_makes_no_model(language: Lab) -> None:
    before = len(language.store.artifacts())
    report = fit(language, effort="normal", dry_run=True)
    made = language.store.artifacts()[before:]
    assert report.kind == "report" and not any(one.kind == "model" for one in made)
    found = FitResult.of(report)
    sizes = [point.size_bytes for point in found.frontier]
    drops = [point.predicted_drop for point in found.frontier]
    assert sizes == sorted(sizes) and len(sizes) > 3
    assert None not in drops and drops == sorted(drops, reverse=True)
    assert set(found.expected_seconds) == {"sample", "calibrate", "plan", "quantize", "quality"}
    assert all(seconds > 0 for seconds in found.expected_seconds.values())
    assert not found.infeasible
    page = (report.path / "report.html").read_text(encoding="utf-8")
    assert "DRY RUN" in page and "No model was made" in page and "Expected time" in page
    assert "Reached" not in page and "Size and quality" in page


def test_what_a_dry_run_predicts_is_near_what_is_measured(language: Lab) -> None:
    predicted = smallest.drop_at(FitResult.of(fit(language, SMALL, dry_run=True)).frontier, SMALL)
    made = fit(language, SMALL)
    metrics = {item.metric: item.value for item in language.store.evidence(made.id)}
    assert predicted / 3 < metrics["kl_divergence"] < 3 * predicted  # on a toy the loss itself is noise


def test_a_dry_run_of_a_classifier_says_that_only_measuring_tells(digits: Lab) -> None:
    found = FitResult.of(fit(digits, DIGITS, data=None, dry_run=True))
    assert found.frontier and all(point.predicted_drop is None for point in found.frontier)


def test_a_dry_run_needs_no_size_and_no_folder(language: Lab, at_home: Callable[..., tuple[int, str, str]]) -> None:
    words = ("fit", language.model.id, "--data", language.dataset.id)
    code, out, _ = at_home(*words, "--dry-run", "--json")
    document = json.loads(out)
    assert code == 0 and document["frontier"] and document["expected_seconds"]
    code, out, _ = at_home(*words, "--dry-run")
    assert code == 0 and "predicted quality loss" in out and "together" in out
    code, _, told = at_home(*words)
    assert code == 2 and "--out" in told and "--dry-run" in told


def test_a_dry_run_refuses_an_infeasible_size(language: Lab) -> None:
    with pytest.raises(BudgetError, match="nearest feasible"):
        fit(language, "1kB", dry_run=True)
