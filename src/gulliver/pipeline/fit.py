"""The budget loop: calibrate, plan, pack, distill, measure, judge; and back to the plan when the measurement misses.

A built-in recipe over the steps: every call below goes through `call.call`, so it is reused by hash, resumes after a
kill, and can be repeated alone. What an effort buys is in fitting.EFFORTS, and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gulliver.core.errors import BudgetError, ConfigError, DataError, GateRefused
from gulliver.core.evidence.evidence import MUST_BEAT, measured
from gulliver.core.evidence.gate import Budget, Verdict, below_baseline
from gulliver.core.machine import describe
from gulliver.core.progress import Progress
from gulliver.core.quantities import MOST_BYTES, checked_seed, parse_fraction, parse_size
from gulliver.core.records import Plan, Point
from gulliver.core.store.artifact import (
    Artifact,
    another_artifact,
    check_target,
    copy_artifact,
    held_artifact,
    write_annotation,
)
from gulliver.core.store.manifest import REPORT
from gulliver.core.store.store import Store, home_folder
from gulliver.pipeline.answers import answer_pairs
from gulliver.pipeline.call import meant, renew_cards
from gulliver.pipeline.fitting import COMPRESSING, EFFORTS, TARGETS, Fit
from gulliver.pipeline.forecast import forecast
from gulliver.pipeline.outcome import infeasible, record
from gulliver.pipeline.resolve import check_data, data_for, resolve_model
from gulliver.pipeline.smallest import FIRST_SHARE, ROUNDS, drop_at, in_drops, next_size
from gulliver.report.gather import gather
from gulliver.report.html import page
from gulliver.tasks import EXPORTS, bytes_beside, family, get_task

MAX_ROUNDS = 3


def fit(
    model: str | Path | Artifact,
    *,
    size: str | float | None = None,
    data: str | Path | Artifact | None = None,
    eval_data: str | None = None,
    ram: str | int | None = None,
    speed: float | None = None,
    max_drop: str | float | None = None,
    for_: str = "native",
    effort: str = "normal",
    domain_only: bool = False,
    dry_run: bool = False,
    out: Path | str | None = None,
    seed: int = 0,
    home: Path | str | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
    command: str = "gulliver.fit(…)",
) -> Artifact:
    """The best model within the budget, packed, measured and judged; copied to `out` with its report and card.

    `size`: most bytes of weight files ("64MB", or "30%" of the parent's); `ram`: most resident memory of the
    compression ("1GB"); `speed`: least tokens per second here; `max_drop`: most quality given up ("5%"). Without `size`
    it is the smallest model within `max_drop`. `for_` another engine: packed in what its file holds exactly, so
    that what `export` writes has the same weights and is within `size` too. BudgetError (exit 4), with the nearest
    point that is feasible, when the budget cannot be met: `out` is then not written.

    Calibration mixes `data` with a broad set that the model writes itself, the loss is measured on held-out parts of
    both, and limits hold for the worse, unless `domain_only`. Without `data` the broad set stands alone.

    `dry_run` makes no model: a report with the quality that sizes are predicted to cost and the time it would take.
    """
    if dry_run and size is None and max_drop is None:
        max_drop = "100%"  # the whole curve is asked for
    budget = _asked(for_, effort, size, ram, speed, max_drop, seed)
    if eval_data is not None and data is None:
        raise ConfigError(f"--eval-data {eval_data} needs --data beside it: what is calibrated on")
    if out is not None:
        check_target(out, home_folder(home) if store is None else store.home)
    store, progress, began = store or Store(home), progress or Progress(), time.monotonic()
    for spec in (data, eval_data):
        if spec is not None:
            check_data(spec, store)
    parent = resolve_model(model, store, progress=progress)
    beside = _beside(for_, parent)
    if size is not None:
        budget = replace(budget, size_bytes=parse_size(size, "size", whole_bytes=parent.weight_bytes))
    budget = replace(budget, speed_metric=family(parent.task).speed_metric)
    dataset = data_for(parent, data, store, eval_data=eval_data, progress=progress)
    if dataset is not None:
        get_task(parent.task).check_data(dataset, parent.path)
    shared = {"store": store, "seed": seed, "progress": progress, "command": command}
    work = Fit(parent, dataset, None, budget, effort, shared, for_, beside)
    if dry_run:
        return forecast(work, domain_only, began)
    if out is not None:
        _check_out(out, work)
    fitted = _fitted(work, domain_only, began)
    return fitted if out is None else copy_artifact(fitted, out)


def _check_out(out: Path | str, work: Fit) -> None:
    """ArtifactError when `out` holds another artifact than one that this home fitted to the same budget before."""
    there = held_artifact(check_target(out, work.store.home))
    asked = {"effort": work.effort, **work.budget.to_json()}
    if there is not None and not any(
        found.step["name"] == "fit"
        and found.config == asked
        and found.inputs.get("parent") == (work.parent.id,)
        and there.id in found.inputs["model"]
        for found in work.store.artifacts()
    ):
        raise another_artifact(there)


def _fitted(work: Fit, domain_only: bool, began: float) -> Artifact:
    """The fitted model, with its report. BudgetError with the nearest point that is feasible."""
    parent = work.parent
    if not domain_only:
        work.samples = _broad_set(work)
    if not work.data:
        raise DataError(
            f"no data that {parent.id[:12]} was made with are in this store; add --data (text files or catalog:NAME)"
        )
    try:
        fitted = _loop(work)
    except BudgetError as failure:
        raise infeasible(work, failure, began) from None
    answers = answer_pairs(parent, fitted, work.data["dataset"], work.budget.max_ram_bytes, work.shared["progress"])
    found = record(work, fitted, began, answers=answers, reason=work.told)
    renew_cards([fitted.id], work.store, work.shared["progress"])
    write_annotation(fitted, REPORT, page(gather(fitted, work.store, fit=found)))
    return fitted


def _asked(
    for_: str,
    effort: str,
    size: str | float | None,
    ram: str | int | None,
    speed: float | None,
    max_drop: str | float | None,
    seed: int,
) -> Budget:
    """The budget that was asked for, a share of the parent taken of an unknown whole. ConfigError for what is wrong."""
    if for_ not in TARGETS:
        raise ConfigError(f"for is {for_!r}; choose one of {', '.join(TARGETS)}")
    if effort not in EFFORTS:
        raise ConfigError(f"effort is {effort!r}; choose one of {', '.join(EFFORTS)}")
    checked_seed(seed)
    return Budget(
        size_bytes=None if size is None else parse_size(size, "size", whole_bytes=MOST_BYTES),
        max_ram_bytes=None if ram is None else parse_size(ram, "ram"),
        min_tokens_per_s=speed,
        max_drop=None if max_drop is None else parse_fraction(max_drop, "max_drop"),
    )


def _beside(for_: str, parent: Artifact) -> int:
    """Bytes of the other engine's file beside the weights, about. ConfigError where it has none for such models."""
    if TARGETS[for_] in EXPORTS:
        try:
            return bytes_beside(str(TARGETS[for_]), parent.task, parent.path)
        except ConfigError as error:
            raise ConfigError(f"this model cannot be fitted for {for_}: {error}. Leave --for out") from None
    if for_ != "native" and not hasattr(get_task(parent.task).load(parent.path, empty=True), "get_output_embeddings"):
        raise ConfigError(f"{for_} does not open {parent.task} models of this kind; leave --for out")
    return 0


# ---- the loop -------------------------------------------------------------------------------------------------------
def _loop(work: Fit) -> Artifact:
    """Rounds of plan, pack, distill, measure and judge. BudgetError when the last one misses the budget."""
    calibration = work.step("calibrate", None, model=work.parent, **work.data)
    work.tell_cost_of_limit(calibration)
    rounds = _within_size if work.budget.size_bytes is not None else _smallest
    fitted = rounds(work, calibration)
    missed = [verdict for verdict in work.verdicts if not verdict.passed]
    if missed:
        _refuse_parent(work, missed)
        raise BudgetError("; ".join(f"{verdict.rule}: {verdict.reason}" for verdict in missed))
    if written := TARGETS[work.target]:
        work.shared["progress"].print(
            f"its file for {work.target}: gulliver export {fitted.id[:12]} --format {written}"
        )
    return fitted


def _refuse_parent(work: Fit, missed: Sequence[Verdict]) -> None:
    """GateRefused when the model does not beat its simplest baseline, and its parent does not either."""
    if not any(one.evidence is not None and one.evidence.metric in MUST_BEAT for one in missed):
        return
    work.qualities(work.parent)
    below = below_baseline(work.store.evidence(work.parent.id), work.parent.id)
    if below is not None:
        raise GateRefused(
            f"{work.parent.id[:12]} is itself no better than the simplest baseline on these data, so no size would "
            f"prove anything: {below}; give a trained model, or --data of the kind that it knows"
        )


def _within_size(work: Fit, calibration: Artifact) -> Artifact:
    """The model of the budget's size; planned smaller, at most MAX_ROUNDS times, when its files come out larger."""
    limit, beside = work.budget.size_bytes, work.beside
    assert limit is not None
    size_bytes = max(1, limit - beside)
    for left in reversed(range(MAX_ROUNDS)):
        try:
            _, fitted = _round(work, calibration, size_bytes)
        except BudgetError as failure:
            raise _with_file(failure, work.target, beside) if beside else failure from None
        written = _exported_bytes(work, fitted)
        over, beside = max(fitted.weight_bytes, written) - limit, max(0, written - fitted.weight_bytes)
        if over <= 0 or (not left and written <= limit):
            return fitted
        if not left:
            raise BudgetError(f"the {work.target} file has {written:,} bytes; the limit is {limit:,}")
        size_bytes = fitted.weight_bytes - over - (MAX_ROUNDS - 1 - left) * limit // 1000  # of few bytes, more
    raise AssertionError("a loop of at least one round returns")


def _with_file(failure: BudgetError, target: str, beside: int) -> BudgetError:
    """A failure to plan for an engine whose file holds more than weights, with the smallest size that holds all."""
    if not failure.nearest:
        return failure
    size_bytes = int(1.001 * (failure.nearest["size_bytes"] + beside)) + 1
    told = f"{failure}, and its {target} file holds {beside:,} bytes beside the weights"
    return BudgetError(told, {"size_bytes": size_bytes})


def _exported_bytes(work: Fit, fitted: Artifact) -> int:
    """Bytes of the file of the engine that is fitted for; 0 where that is this one."""
    written = TARGETS[work.target]
    return 0 if written is None else work.step("export", {"format": written}, model=fitted).weight_bytes


def _smallest(work: Fit, calibration: Artifact) -> Artifact:
    """The smallest model that passes every gate, of at most ROUNDS that are made; the last one where none passes."""
    assert work.budget.max_drop is not None
    size_bytes: int | None = int(FIRST_SHARE * work.parent.weight_bytes)
    try:
        work.step("plan", {"size_bytes": size_bytes}, model=work.parent, calibration=calibration)
    except BudgetError as failure:
        if not failure.nearest:
            raise
        size_bytes = int(failure.nearest["size_bytes"])  # hardly anything of this model can be packed
    tried: list[tuple[Artifact, list[Verdict]]] = []
    measured = []
    for _ in range(ROUNDS):
        plan, fitted = _round(work, calibration, size_bytes)
        tried.append((fitted, work.verdicts))
        lost = next(one for one in work.verdicts if one.metric == "quality_loss")
        if any(not one.passed for one in work.verdicts if one is not lost):
            break  # another size changes nothing about it: a limit beside the loss is missed
        if lost.evidence is None or lost.evidence.metric != "quality_loss":
            break
        measured.append((plan.size_bytes, lost.evidence.worse_end, lost.passed))
        size_bytes = next_size(plan.frontier, measured, work.budget.max_drop)
        if size_bytes is None:
            break
    good = [row for row in tried if all(one.passed for one in row[1])]
    fitted, work.verdicts = min(good, key=lambda row: row[0].weight_bytes) if good else tried[-1]
    return fitted


def _round(work: Fit, calibration: Artifact, size_bytes: int) -> tuple[Plan, Artifact]:
    """One round: the plan for a size, and the better of what was packed by it and what was distilled from that."""
    work.verdicts = []
    plan = work.step("plan", {"size_bytes": size_bytes}, model=work.parent, calibration=calibration)
    planned = Plan.of(plan)
    packed = work.step("quantize", model=work.parent, calibration=calibration, plan=plan)
    candidates = [packed]
    if work.options("distill") is not None and work.target == "native":
        try:
            candidates += [work.step("distill", None, model=packed, parent=work.parent, **work.data)]
        except BudgetError as failure:  # the packed model is within the limit
            work.shared["progress"].print(f"left out, which costs quality: {failure}")
    drops = [_measured_drop(work, candidate) for candidate in candidates]
    drop = min(drops)  # distilling must show on held-out data, or it is not kept
    fitted = candidates[drops.index(drop)]
    known, asked = work.store.evidence(fitted.id), meant(work.store, work.parent)
    work.verdicts = [gate.judge(known, fitted.id, asked) for gate in work.budget.gates()]
    work.frontier = in_drops(planned, drop)
    predicted = drop_at(work.frontier, planned.size_bytes)
    work.rounds.append(Point(size_bytes=fitted.weight_bytes, predicted_drop=predicted, measured_drop=drop))
    return planned, fitted


def _broad_set(work: Fit) -> Artifact | None:
    """What the parent writes itself; None where its family writes nothing, or, with data, where it writes nothing fit.

    BudgetError where the memory limit leaves no room to write.
    """
    if not get_task(work.parent.task).generates:
        return None
    try:
        return work.step("sample", {"family": dict(family(work.parent.task).sampled)}, model=work.parent)
    except BudgetError as failure:
        remedy = "" if work.dataset is None else "; or say --domain-only, to calibrate and judge on --data alone"
        raise BudgetError(f"the model's own texts cannot be written: {failure}{remedy}") from None
    except DataError as failure:
        if work.dataset is None:
            raise
        work.told = f"Calibrated and judged on --data alone, since the model writes no text that is fit: {failure}."
        work.shared["progress"].print(work.told)
        return None


def _measured_drop(work: Fit, fitted: Artifact) -> float:
    """The quality that the fitted model gives up, on the worst of the data; all that the budget limits is measured."""
    work.qualities(fitted, work.parent)
    if work.budget.min_tokens_per_s is not None:
        work.step("speed", model=fitted)
    peak = max(entry.peak_rss_bytes for entry in work.calls if entry.step in COMPRESSING)
    known = [item.value for item in work.store.evidence(fitted.id) if item.metric == "compress_peak_ram_bytes"]
    if known[-1:] != [peak]:
        item = measured("compress_peak_ram_bytes", peak, detail={"steps": list(COMPRESSING)})
        here = describe(work.store.home, measure=False).name
        work.store.record([item.filled(artifact_id=fitted.id, machine=here, command=work.shared["command"])])
        renew_cards([fitted.id], work.store, work.shared["progress"])
    found = (item for item in work.store.evidence(fitted.id) if item.metric == "quality_loss")
    losses = {item.data_hash: item.value for item in found if item.parent_id == work.parent.id}
    return max(losses.values())
