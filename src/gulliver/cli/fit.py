"""The commands `fit` and `run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gulliver.cli.options import FitOptions, RunOptions
from gulliver.cli.session import Session, described
from gulliver.cli.text import evidence_table, megabytes, table


def fit(options: FitOptions, session: Session) -> tuple[Any, list[str]]:
    """The best model within the budget. BudgetError (exit 4) when there is none."""
    from gulliver.pipeline.fit import fit

    shared = {"store": session.store, "progress": session.progress, "command": session.command}
    fitted = fit(**options.model_dump(), **shared)
    document, lines = described(fitted, session, None)
    report = Path(options.out) / "report.html"
    if report.is_file():
        document["report"] = str(report)
        lines.append(f"report: {report}")
    return document, lines + evidence_table(document["evidence"])


def run(options: RunOptions, session: Session) -> tuple[Any, list[str]]:
    """A recipe, whole. GateRefused (exit 3) where a gate refuses."""
    from gulliver.pipeline.call import open_store
    from gulliver.pipeline.recipe import load
    from gulliver.pipeline.run import run_recipe

    home = session.home or load(options.recipe).home
    result = run_recipe(
        options.recipe,
        store=open_store(home, session.database),
        progress=session.progress,
        command=session.command,
        report=options.report,
    )
    calls = [
        {
            "id": entry.id,
            "step": entry.step,
            "artifact": entry.artifact.id,
            "kind": entry.artifact.kind,
            "reused": entry.reused,
            "seconds": round(entry.seconds, 3),
            "peak_rss_bytes": entry.peak_rss_bytes,
        }
        for entry in result.calls
    ]
    document = {
        "recipe": result.name,
        "calls": calls,
        "gates": [verdict.to_json() for verdict in result.verdicts],
        "report": str(result.report) if result.report else None,
    }
    rows = [
        (
            entry["id"],
            entry["step"],
            entry["artifact"][:12],
            "made before" if entry["reused"] else f"{entry['seconds']:.1f} s",
            "" if entry["reused"] else megabytes(entry["peak_rss_bytes"]),
        )
        for entry in calls
    ]
    lines = table(("id", "step", "artifact", "time", "peak memory"), rows)
    lines += [f"{verdict.outcome}  {verdict.rule}: {verdict.reason}" for verdict in result.verdicts]
    return document, lines + ([f"report: {result.report}"] if result.report else [])
