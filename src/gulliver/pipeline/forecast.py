"""What `fit` would cost: the quality that sizes are predicted to give up, and the time, before the long part.

A few examples are calibrated on and a plan is made from them, as `fit` does with many: that gives the curve in the loss
that is predicted. How long one of these examples took tells this machine's speed with this model, and each stage
takes so many times that (COSTS, from the runs in docs/log.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gulliver.core.errors import BudgetError, ConfigError
from gulliver.core.records import Plan, Point, StatisticsTable
from gulliver.core.store.artifact import Artifact, write_annotation
from gulliver.core.store.manifest import REPORT
from gulliver.pipeline.fitting import Fit
from gulliver.pipeline.outcome import infeasible, record
from gulliver.pipeline.smallest import FIRST_SHARE
from gulliver.report.gather import gather
from gulliver.report.html import page
from gulliver.tasks import get_task

FEW: Mapping[str, Mapping[str, Any]] = {
    "sample": {"count": 4, "held_out": 0, "family": {"tokens": 64}},
    "calibrate": {"examples": 8, "gradient_examples": 2},
    "plan": {"probe_rows": 4},
}
"""What the steps get here."""
BACKWARD = 2.0
"""What an example takes backward, in what it takes forward."""
COSTS: Mapping[str, float] = {
    "sample": 0.5,
    "calibrate": 0.8,
    "plan": 12.0,
    "quantize": 16.0,
    "distill": 4.0,
    "quality": 35.0,
}
"""What a stage takes, in examples calibrated on: for each example that it writes, reads or trains on, or once."""
OWN_QUALITY = 0.2
"""Measuring on the broad set, in what measuring on the user's data takes."""


def forecast(work: Fit, domain_only: bool, began: float) -> Artifact:
    """The report of a fit that makes no model. BudgetError when even the smallest size is larger than the budget."""
    if work.dataset is None and (domain_only or not get_task(work.parent.task).generates):
        raise ConfigError("a dry run needs data to calibrate on; add --data (text files or catalog:NAME)")
    if work.dataset is None:
        work.samples = work.step("sample", FEW["sample"], model=work.parent)
    calibration = work.step("calibrate", FEW["calibrate"], model=work.parent, **work.data)
    work.tell_cost_of_limit(calibration)
    try:
        plan = _plan(work, calibration)
    except BudgetError as failure:
        raise infeasible(work, failure, began) from None
    task = get_task(work.parent.task)
    asked = [] if work.budget.size_bytes is None else [(plan.size_bytes, task.likely_drop(plan.loss_increase))]
    drops = sorted([*asked, *((point.size_bytes, task.likely_drop(point.loss_increase)) for point in plan.frontier)])
    work.frontier = tuple(Point(size_bytes=size + work.beside, predicted_drop=drop) for size, drop in drops)
    written = record(work, None, began, expected=_seconds(work, calibration, domain_only))
    write_annotation(written, REPORT, page(gather(work.parent, work.store, fit=written)))
    return written


def _plan(work: Fit, calibration: Artifact) -> Plan:
    """A plan for the budget's size. BudgetError when it is infeasible; without a size for the smallest that is."""
    size_bytes = max(1, (work.budget.size_bytes or int(FIRST_SHARE * work.parent.weight_bytes)) - work.beside)
    inputs = {"model": work.parent, "calibration": calibration}
    try:
        return Plan.of(work.step("plan", {**FEW["plan"], "size_bytes": size_bytes}, **inputs))
    except BudgetError as failure:
        if work.budget.size_bytes is not None or not failure.nearest:
            raise
        return Plan.of(work.step("plan", {**FEW["plan"], "size_bytes": int(failure.nearest["size_bytes"])}, **inputs))


def _seconds(work: Fit, calibration: Artifact, domain_only: bool) -> dict[str, float]:
    """Seconds that each stage is expected to take on this machine, by its name, in order."""
    backward = BACKWARD if StatisticsTable.of(calibration).sensitivity == "gradient" else 0.0
    took = next(entry.made_in for entry in work.calls if entry.step == "calibrate")
    example = took / _passes(FEW["calibrate"], backward)
    written = work.options("sample") if get_task(work.parent.task).generates and not domain_only else None
    counts = {
        "sample": written and written["count"] + written["held_out"],
        "calibrate": _passes(work.options("calibrate") or {}, backward),
        "plan": 1,
        "quantize": 1,
        "distill": (work.options("distill") or {}).get("steps"),
        "quality": (work.options("quality") or {}).get("share", 1.0) * (1 if written is None else 1 + OWN_QUALITY),
    }
    return {stage: example * COSTS[stage] * count for stage, count in counts.items() if count}


def _passes(options: Mapping[str, Any], backward: float) -> float:
    """The examples calibrated on, those that go backward counted as so many more."""
    return options["examples"] + backward * options["gradient_examples"]
