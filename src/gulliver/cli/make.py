"""The commands that make artifacts: those of the steps, `fit` and `run`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gulliver.cli.options import FitOptions, RunOptions
from gulliver.cli.session import Session, described, evidence_table, megabytes, table
from gulliver.core.names import named
from gulliver.pipeline.steps import Step, fields_of

if TYPE_CHECKING:
    from gulliver.core.store.artifact import Artifact


def run_step(row: Step, given: Mapping[str, Any], session: Session) -> tuple[Any, list[str]]:
    """Call the step with what was given on the command line: its inputs, its options, `seed` and `out`."""
    from gulliver.core.quantities import checked_seed
    from gulliver.core.store.artifact import another_artifact, check_target, held_artifact
    from gulliver.pipeline.call import Call, call
    from gulliver.pipeline.resolve import resolve_inputs

    checked_seed(given.get("seed", 0))
    out = given.get("out")
    if out is not None:
        there = held_artifact(check_target(out, session.home_folder))
        if there is not None and there.step["name"] != row.name:
            raise another_artifact(there)
    fields = fields_of(named(row.options))
    config = {name: _value(given[name], info.annotation) for name, info in fields.items() if name in given}
    roles = {role: given[role] for role in (*row.needs, *row.optional) if role in given}
    inputs = resolve_inputs(row, roles, config, session.store, session.progress)
    log: list[Call] = []
    shared: dict[str, Any] = {"store": session.store, "progress": session.progress, "command": session.command}
    made = call(row.name, config, inputs, seed=given.get("seed", 0), log=log, out=out, **shared)
    return described(made, session, out, reused=log[-1].reused)


def _value(text: Any, annotation: Any) -> Any:
    """An option's text as the field's type: text itself, or the JSON it holds, or a list cut at commas."""
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(text, str):
        return text
    readings: list[Any] = [text]
    with contextlib.suppress(ValueError):
        readings.append(json.loads(text))
    readings.append([_json_or_text(part.strip()) for part in text.split(",")])
    for reading in readings:
        with contextlib.suppress(ValidationError):
            TypeAdapter(annotation).validate_python(reading)
            return reading
    return text


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def fit(options: FitOptions, session: Session) -> tuple[Any, list[str]]:
    """The best model within the budget. BudgetError (exit 4) when there is none."""
    from gulliver.core.errors import ConfigError
    from gulliver.core.store.manifest import REPORT
    from gulliver.pipeline.fit import fit

    if options.out is None and not options.dry_run:
        raise ConfigError("no --out; add --out DIR for the fitted model and its report, or --dry-run for a forecast")
    shared = {"store": session.store, "progress": session.progress, "command": session.command}
    fitted = fit(**options.model_dump(), **shared)
    document, lines = described(fitted, session, None)
    report = fitted.path / REPORT
    if report.is_file():
        document["report"] = str(report)
        lines.append(f"report: {report}")
    if options.dry_run:
        return _forecast(fitted, document, lines)
    return document, lines + evidence_table(document["evidence"])


def _forecast(report: Artifact, document: dict[str, Any], lines: list[str]) -> tuple[Any, list[str]]:
    """What a dry run prints: what sizes are predicted to cost, and how long each stage would take."""
    from gulliver.core.records import FitResult
    from gulliver.pipeline.fitting import COMPRESSING
    from gulliver.report.units import format_seconds

    found = FitResult.of(report)
    document["frontier"] = [point.model_dump(exclude_none=True) for point in found.frontier]
    document["expected_seconds"] = found.expected_seconds
    sizes = [("size", "predicted quality loss")]
    for point in found.frontier:
        drop = point.predicted_drop
        told = "shows when measured" if drop is None else f"{drop:.1%}" if drop < 1 else "over 100%"
        sizes.append((megabytes(point.size_bytes), told))
    times = [("stage", "expected time")]
    expected = {stage: found.expected_seconds[stage] for stage in COMPRESSING if stage in found.expected_seconds}
    whole = {**expected, "together": sum(expected.values())}
    times += [(stage, format_seconds(seconds)) for stage, seconds in whole.items()]
    return document, [*lines, *table(sizes), *table(times)]


def run(options: RunOptions, session: Session) -> tuple[Any, list[str]]:
    """A recipe, whole. GateRefused (exit 3) where a gate refuses."""
    from gulliver.pipeline.ask import open_store
    from gulliver.pipeline.recipe import load
    from gulliver.pipeline.run import run_recipe

    store = open_store(session.home or load(options.recipe).home, session.database)
    shared: dict[str, Any] = {"store": store, "progress": session.progress, "command": session.command}
    result = run_recipe(options.recipe, report=options.report, **shared)
    rows: list[tuple[str, ...]] = [("id", "step", "artifact", "time", "peak memory")]
    calls = []
    for entry in result.calls:
        numbers = {"seconds": round(entry.seconds, 3), "peak_rss_bytes": entry.peak_rss_bytes, "reused": entry.reused}
        calls.append(
            {"id": entry.id, "step": entry.step, "artifact": entry.artifact.id, "kind": entry.artifact.kind, **numbers}
        )
        told = ("made before", "") if entry.reused else (f"{entry.seconds:.1f} s", megabytes(entry.peak_rss_bytes))
        rows.append((entry.id, entry.step, entry.artifact.id[:12], *told))
    report = str(result.report) if result.report else None
    gates = [verdict.to_json() for verdict in result.verdicts]
    lines = table(rows) + [f"{one.outcome}  {one.rule}: {one.reason}" for one in result.verdicts]
    document = {"recipe": result.name, "calls": calls, "gates": gates, "report": report}
    return document, lines + ([f"report: {report}"] if report else [])
