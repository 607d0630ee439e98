"""The nearest feasible point meets every limit that was set; figures that would do are on the safe side."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gulliver.core.evidence.evidence import Evidence, measured
from gulliver.core.evidence.gate import Budget, Verdict
from gulliver.core.records import Point
from gulliver.pipeline.feasible import figures_that_would_do, nearest_larger

SPEED = "decode_tokens_per_s"
FRONTIER = tuple(Point(size_bytes=size, predicted_drop=drop) for size, drop in ((40, 0.1), (60, 0.038), (80, 0.01)))
ROUNDS = (Point(size_bytes=50, predicted_drop=0.06, measured_drop=0.05),)


def judged(budget: Budget, **values: tuple[float, float, float]) -> list[Verdict]:
    """The budget's verdicts on measurements (value, low, high) by metric; the size is 50 bytes."""
    rows = {"size_bytes": (50.0, 50.0, 50.0), **values}
    evidence = [measured(name, *row, n=9).filled(artifact_id="a") for name, row in rows.items()]
    return [gate.judge(evidence, "a") for gate in budget.gates()]


@pytest.mark.parametrize(("limit", "size"), [(0.05, 80), (0.0545, 60), (0.0001, None)])
def test_a_drop_is_kept_by_its_upper_bound(limit: float, size: int | None) -> None:
    budget = Budget(50, max_drop=limit)
    verdicts = judged(budget, quality_loss=(0.05, 0.045, 0.055))
    found = nearest_larger(budget, verdicts, ROUNDS, FRONTIER)
    assert (found and found.size_bytes) == size
    assert figures_that_would_do(verdicts) == "--max-drop 5.5%"


def test_a_larger_model_must_still_be_fast_enough() -> None:
    for speed, size in ((60, 80), (70, None)):
        budget = Budget(50, max_drop=0.03, min_tokens_per_s=speed, speed_metric=SPEED)
        verdicts = judged(budget, quality_loss=(0.05, 0.045, 0.055), decode_tokens_per_s=(105.0, 100.0, 110.0))
        found = nearest_larger(budget, verdicts, ROUNDS, FRONTIER)
        assert (found and found.size_bytes) == size


def test_what_a_size_does_not_change_has_no_nearest_size() -> None:
    budget = Budget(50, max_ram_bytes=1000, min_tokens_per_s=200, speed_metric=SPEED)
    verdicts = judged(budget, compress_peak_ram_bytes=(2.5e6, 2.5e6, 2.5e6), decode_tokens_per_s=(123.4, 119.96, 130.0))
    assert nearest_larger(budget, verdicts, ROUNDS, FRONTIER) is None
    assert figures_that_would_do(verdicts) == "--ram 3MB --speed 119"


def test_a_size_alone_that_was_missed_is_the_one_that_was_reached() -> None:
    budget = Budget(49)
    assert nearest_larger(budget, judged(budget), ROUNDS, FRONTIER) == ROUNDS[0]
    assert figures_that_would_do(judged(budget)) == "--size 50B"


def test_a_baseline_that_is_not_beaten_is_no_matter_of_size() -> None:
    budget = Budget(50, max_drop=0.1)
    verdicts = judged(budget, quality_loss=(0.05, 0.045, 0.055), perplexity_vs_baseline=(1.1, 1.0, 1.2))
    assert [one.outcome for one in verdicts] == ["FAIL", "FAIL"]
    assert nearest_larger(budget, verdicts, ROUNDS, FRONTIER) is None and figures_that_would_do(verdicts) == ""


def test_what_was_not_measured_tells_nothing() -> None:
    budget = Budget(50, max_drop=0.01)
    verdicts = judged(budget)
    assert nearest_larger(budget, verdicts, ROUNDS, FRONTIER) is None and figures_that_would_do(verdicts) == ""
    nan: Evidence = measured("quality_loss", float("nan"))
    lost = [replace(verdict, evidence=nan if verdict.metric == "quality_loss" else None) for verdict in verdicts]
    assert nearest_larger(budget, lost, ROUNDS, FRONTIER) is None and figures_that_would_do(lost) == ""
