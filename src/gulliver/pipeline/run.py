"""The recipe loop: run each call, judge each gate, stop when a gate refuses, and write the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gulliver.core.errors import ConfigError, GateRefused
from gulliver.core.evidence.gate import Verdict, require
from gulliver.core.progress import Progress
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.files import check_writable, named_path, write_atomic
from gulliver.core.store.manifest import REPORT
from gulliver.core.store.store import Store
from gulliver.pipeline.call import Call, call, meant
from gulliver.pipeline.recipe import Recipe, StepCall, load
from gulliver.pipeline.resolve import original


@dataclass(frozen=True)
class RecipeRun:
    """What a recipe did; `report` is the HTML file, or None when no model was made."""

    name: str
    calls: tuple[Call, ...]
    verdicts: tuple[Verdict, ...]
    report: Path | None


def run_recipe(
    path: Path | str,
    *,
    home: Path | str | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
    command: str = "",
    report: Path | str | None = None,
) -> RecipeRun:
    """Run a recipe file; what was done before is found, not done again. GateRefused if a gate refuses.

    An HTML report is written beside the last model, or to `report`, also when a gate refuses.
    """
    recipe = load(path)
    if report is not None:
        report = named_path(report)
        if report.is_dir() or not report.parent.is_dir():
            raise ConfigError(f"--report {report} must be a file in a folder that exists")
        check_writable(report, "--report")
    store = store or Store(home or recipe.home)
    progress = progress or Progress()
    made: dict[str, Artifact] = {}
    log: list[Call] = []
    judged: list[tuple[Artifact, Verdict]] = []
    shared: dict[str, Any] = {"store": store, "progress": progress, "command": command or f"gulliver run {path}"}
    try:
        for item in recipe.calls:
            if isinstance(item, StepCall):
                inputs: dict[str, Any] = {
                    role: made[ids] if isinstance(ids, str) else [made[one] for one in ids]
                    for role, ids in item.inputs.items()
                }
                options = item.config.model_dump()
                made[item.id] = call(item.use, options, inputs, seed=item.seed, log=log, call_id=item.id, **shared)
            else:
                target = made[item.on]
                asked = meant(store, original(target, store) or _compared_with(recipe, item.on, made))
                judged.append((target, item.gate.judge(store.evidence(target.id), target.id, asked)))
                require([judged[-1][1]])
    except GateRefused:
        _write_report(log, judged, store, progress, report)
        raise
    written = _write_report(log, judged, store, progress, report)
    return RecipeRun(recipe.name, tuple(log), tuple(verdict for _, verdict in judged), written)


def _compared_with(recipe: Recipe, name: str, made: Mapping[str, Artifact]) -> Artifact | None:
    """The parent that a recipe itself compares the model `name` with; for models that were made from no other."""
    for item in recipe.calls:
        if isinstance(item, StepCall) and item.id in made and item.inputs.get("model") == name:
            parent = item.inputs.get("parent")
            if isinstance(parent, str) and made[parent].id != made[name].id:
                return made[parent]
    return None


def _write_report(
    log: list[Call],
    judged: list[tuple[Artifact, Verdict]],
    store: Store,
    progress: Progress,
    report: Path | str | None,
) -> Path | None:
    """The HTML report about the last model that the recipe made, with the verdicts on it and on the others."""
    names = {entry.artifact.id: entry.id for entry in log if entry.artifact.kind == "model"}
    models = [entry.artifact for entry in log if entry.artifact.kind == "model"]
    if not models:
        return None
    from gulliver.report.gather import OtherGates, gather
    from gulliver.report.html import page

    verdicts: dict[str, list[Verdict]] = {models[-1].id: []}
    for target, verdict in judged:
        verdicts.setdefault(target.id, []).append(verdict)
    own = verdicts.pop(models[-1].id)
    others = [OtherGates(names[key], key, tuple(rows)) for key, rows in verdicts.items()]
    path = Path(report) if report else models[-1].path / REPORT
    write_atomic(path, page(gather(models[-1], store, progress.memory, own, others)))
    return path
