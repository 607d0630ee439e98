"""Step `harness`: scores of lm-eval's tasks, through its own harness, on our engine; paired with the parent's by item.

A task and one of its metrics are one data set: its hash is that of the task's name, the metric and every item. Only
metrics of single items between 0 and 1 that are better when higher become evidence.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from pathlib import Path
from typing import Any

from gulliver.audit.harness_model import Scorer, check_greedy
from gulliver.audit.options import HarnessOptions
from gulliver.audit.quality import write_report
from gulliver.core.context import Context
from gulliver.core.errors import ConfigError, DataError, GulliverError
from gulliver.core.evidence.evidence import Evidence, measured, paired_interval
from gulliver.core.evidence.intervals import matched_interval, wilson_interval
from gulliver.core.names import unknown
from gulliver.core.records import HarnessReport
from gulliver.core.store.artifact import Artifact
from gulliver.runtime.decode import open_decoder
from gulliver.runtime.text.tokenizer import Text
from gulliver.tasks import family

Items = dict[str, dict[str, list[tuple[str, float]]]]
"""Task -> metric -> (hash of the item, its score), in order."""


def run(cfg: HarnessOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """Score the model, and its parent on the same items, and record the evidence; returns the report.

    ConfigError for an unknown task or a model that writes no text, DataError for a task
    whose data cannot be loaded or that has no score to compare.
    """
    model, parent = inputs["model"], inputs.get("parent")
    for one in filter(None, (model, parent)):
        if "generate" not in family(one.task).can:
            told = f"{one.id[:12]} is of the family {one.task}, whose models write no text"
            raise ConfigError(f"{told}; leave out --tasks")
    tasks = loaded_tasks(cfg.tasks, cfg.include_path)
    with ctx.progress.stage("harness", total=1 if parent is None else 2, unit="model") as bar:
        ours = scored(model.path, tasks, cfg.limit)
        bar.advance()
        theirs = None
        if parent is not None:
            theirs = scored(parent.path, loaded_tasks(cfg.tasks, cfg.include_path), cfg.limit)
            bar.advance()
    evidence = [item for name in ours for item in _evidence(name, ours[name], None if theirs is None else theirs[name])]
    owner = None if parent is None else parent.id
    evidence = [item.filled(artifact_id=model.id, parent_id=owner) for item in evidence]
    report = write_report(HarnessReport, evidence, inputs, cfg, ctx)
    ctx.record(evidence)
    return report


def loaded_tasks(names: tuple[str, ...], include_path: str | None) -> dict[str, Any]:
    """The named tasks of lm-eval, and those in the folder `include_path`, with their data."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    with contextlib.redirect_stdout(sys.stderr):
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if any(name not in manager.all_tasks for name in names):
            manager = TaskManager(include_path=include_path)  # thousands of files are read
        for name in names:
            if name not in manager.all_tasks:
                raise ConfigError(unknown("task", name, manager.all_tasks))
        found: dict[str, Any] = {}
        for name in names:
            try:
                found |= manager.load([name])["tasks"]
            except Exception as error:  # data come by libraries that raise anything: no network, a damaged file
                why = (str(error).strip().splitlines() or [type(error).__name__])[0]
                told = f"task {name!r} cannot be loaded: {why}"
                raise DataError(f"{told}; it needs its data, from the network or from this machine") from error
    return found


def scored(folder: Path, tasks: dict[str, Any], limit: int | None) -> Items:
    """Scores of every item of the tasks, by the model in `folder`."""
    from lm_eval.evaluator import evaluate  # pyright: ignore[reportMissingImports]

    decoder = open_decoder(folder, slots=1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found: Any = evaluate(
                _model(Scorer(decoder, Text(folder))), tasks, limit=limit, bootstrap_iters=0, log_samples=True
            )
    except GulliverError:
        raise
    except Exception as error:  # a task's own code may raise anything
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"lm-eval could not score {', '.join(tasks)}: {why}") from error
    finally:
        decoder.close()
    return {name: _items(found["samples"][name], found["higher_is_better"].get(name, {})) for name in found["samples"]}


def _model(scorer: Scorer) -> Any:
    """The scorer as lm-eval asks models."""
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

    class GulliverModel(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [scorer.loglikelihood(*request.args) for request in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [scorer.rolling(*request.args) for request in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:
            found = []
            for context, settings in (request.args for request in requests):
                check_greedy(settings)
                until = settings.get("until") or []
                stops = [until] if isinstance(until, str) else list(until)
                found.append(scorer.continued(context, stops, settings.get("max_gen_toks")))
            return found

    return GulliverModel()


def _items(samples: list[dict[str, Any]], higher: dict[str, bool | None]) -> dict[str, list[tuple[str, float]]]:
    """Metric -> (hash, score) of every item, for metrics that are shares."""
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    found: dict[str, list[tuple[str, float]]] = {}
    for name, better in higher.items():
        values = [sample.get(name) for sample in samples]
        if better and all(isinstance(value, bool | int | float) and 0 <= value <= 1 for value in values):
            hashes = [str(sample["doc_hash"]) for sample in samples]
            found[name] = list(zip(hashes, map(float, values), strict=True))  # type: ignore[arg-type]
    return found


def _evidence(
    task: str, ours: dict[str, list[tuple[str, float]]], theirs: dict[str, list[tuple[str, float]]] | None
) -> list[Evidence]:
    if not ours:
        raise DataError(f"task {task!r} has no score between 0 and 1 for single items; there is nothing to compare")
    found = []
    for metric, items in ours.items():
        if not items:
            raise DataError(f"task {task!r} has no items to score")
        hashes, scores = [one for one, _ in items], [score for _, score in items]
        data_hash = hashlib.sha256("\n".join([task, metric, *hashes]).encode()).hexdigest()
        detail = {"data": f"{task}, {metric}", "task": task, "metric": metric}
        about: dict[str, Any] = {"n": len(items), "data_hash": data_hash, "detail": detail}
        found.append(measured("task_score", *_share(scores), **about))
        if theirs is not None:
            assert [one for one, _ in theirs[metric]] == hashes, f"{task}: model and parent were asked other items"
            parent = [score for _, score in theirs[metric]]
            found.append(measured("task_score_drop", *_drop(parent, scores), **about))
    return found


def _share(scores: list[float]) -> tuple[float, float, float]:
    """Mean and interval: Wilson's where every score is 0 or 1, else Student's."""
    if set(scores) <= {0.0, 1.0}:
        return wilson_interval(round(sum(scores)), len(scores))
    return paired_interval(scores)


def _drop(parent: list[float], ours: list[float]) -> tuple[float, float, float]:
    if set(parent) | set(ours) <= {0.0, 1.0}:
        return matched_interval([one > 0.5 for one in parent], [one > 0.5 for one in ours])
    return paired_interval(old - new for old, new in zip(parent, ours, strict=True))
