"""What a run of `fit` leaves behind: the record and report of what was asked, tried and found, or why nothing does."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType

from gulliver.core.errors import BudgetError
from gulliver.core.records import AnswerPair, Asked, FitResult, Point, Sources
from gulliver.core.store.artifact import Artifact, create, write_annotation
from gulliver.core.store.manifest import REPORT
from gulliver.pipeline.feasible import figures_that_would_do, nearest_larger
from gulliver.pipeline.fitting import Fit
from gulliver.report.gather import gather
from gulliver.report.html import page


def record(
    work: Fit,
    fitted: Artifact | None,
    began: float,
    nearest: Point | None = None,
    reason: str = "",
    answers: tuple[AnswerPair, ...] = (),
    expected: Mapping[str, float] = MappingProxyType({}),
) -> Artifact:
    """The report artifact with what was asked, tried and found."""
    result = FitResult(
        budget=Asked(**work.budget.to_json()),
        effort=work.effort,
        frontier=work.frontier,
        rounds=tuple(work.rounds),
        memory=tuple(work.shared["progress"].memory),
        verdicts=tuple(work.verdicts),
        seconds=round(time.monotonic() - began, 1),
        expected_seconds={stage: round(seconds, 1) for stage, seconds in expected.items()},
        artifact_id=None if fitted is None else fitted.id,
        nearest=nearest,
        reason=reason,
        answers=answers,
        broad=None if work.samples is None else Sources.of(work.samples).writing,
    )
    subject = fitted or work.parent
    data = {role: [part.id] for role, part in work.data.items()}
    inputs = {"model": [subject.id], "parent": [work.parent.id], **data}
    with create(
        work.store.artifacts_folder,
        kind="report",
        task=work.parent.task,
        inputs=inputs,
        step={"name": "fit", "version": 1},
        config={"effort": work.effort, **work.budget.to_json()},
        seed=work.shared["seed"],
    ) as writer:
        result.write(writer.path)
        return writer.commit()


def infeasible(work: Fit, failure: BudgetError, began: float) -> BudgetError:
    """The error for a budget that cannot be met: why, what would have been feasible, and where the report is."""
    told = f"the budget is infeasible with --effort {work.effort}: {failure}"
    nearest, would_do = None, ""
    if failure.nearest and work.budget.only_size:
        nearest = Point(**failure.nearest)
    elif failure.nearest:
        told += "; whether that size meets the other limits shows only when it is measured"
    elif work.verdicts:
        nearest = nearest_larger(work.budget, work.verdicts, work.rounds, work.frontier)
        would_do = figures_that_would_do(work.verdicts)
    else:
        return BudgetError(told)
    written = record(work, None, began, nearest=nearest, reason=str(failure))
    path = write_annotation(written, REPORT, page(gather(work.parent, work.store, fit=written)))
    if nearest is not None:
        size = f"{nearest.size_bytes:,} bytes ({nearest.size_bytes / 1e6:.1f} MB)"
        drop, kind = nearest.drop, "predicted" if nearest.measured_drop is None else "measured"
        cost = "" if drop is None else f" with a quality loss of {drop:.1%} ({kind})"
        told += f". The nearest feasible point is {size}{cost}"
    if would_do:
        told += f". What was made here, {work.rounds[-1].size_bytes:,} bytes, would do with {would_do}"
    return BudgetError(f"{told}; report: {path}", nearest and nearest.model_dump(exclude_none=True))
