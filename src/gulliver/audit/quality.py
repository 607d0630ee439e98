"""Step `quality`: what a model is worth on held-out data, paired against its parent, as evidence.

Which metrics there are is the task's affair; size is counted here, the same for all. A model is never measured on what
it was calibrated or trained on: `calibration.json` in it (or in a model it was made from) remembers that text. Nor is
it compared with a parent that reads the text as other tokens.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from gulliver.audit.options import QualityOptions
from gulliver.core.context import Context
from gulliver.core.errors import ConfigError, DataError
from gulliver.core.evidence.evidence import Evidence, measured
from gulliver.core.evidence.gate import suspicion, too_good
from gulliver.core.options import Options
from gulliver.core.overlap import (
    KEPT_WHOLE,
    MAX_SHARED,
    excerpt,
    first_overlap,
    remember,
    shared_lines,
    shared_runs,
)
from gulliver.core.records import Calibration, Measured, QualityReport
from gulliver.core.store.artifact import Artifact
from gulliver.tasks import get_task, same_examples
from gulliver.tasks.base import Task

MOST_KEPT = 3


def run(cfg: QualityOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """Score the model on the dataset's eval part and record the evidence; returns the report.

    DataError when the eval part holds data that the model was made with; ConfigError for another family or tokenizer.
    """
    model, dataset, parent = inputs["model"], inputs["dataset"], inputs.get("parent")
    same = parent is None or parent.task == model.task
    for other, fits in ((dataset, same_examples(dataset.task, model.task)), (parent, same)):
        if other is not None and not fits:
            raise ConfigError(f"the model is for {model.task}, but {other.kind} {other.id[:12]} is for {other.task}")
    task = get_task(model.task)
    refuse_seen_data(task, model, dataset, ctx)
    if parent is not None:
        refuse_other_reader(task, model, parent, dataset)
    options = task.chosen(cfg.family)
    with ctx.progress.stage("quality", total=100, unit="percent") as bar:
        network = task.load(model.path, empty=task.streams)
        reference = None if parent is None else task.load(parent.path, empty=task.streams)
        evidence = task.score(
            network,
            dataset,
            reference,
            folder=model.path,
            options=options,
            share=cfg.share,
            kept=None if parent is None else outputs_folder(parent, ctx),
            advance=lambda share: bar.advance(int(100 * share) - bar.done),
        )
        ctx.check_ram("quality")
        weights = sum(parameter.numel() for parameter in network.parameters())
    evidence += [
        measured("size_bytes", model.weight_bytes),
        measured("parameter_count", weights),
        measured("bits_per_weight", 8 * model.weight_bytes / weights),
    ]
    evidence += [] if parent is None else [measured("size_ratio", model.weight_bytes / parent.weight_bytes)]
    owner = None if parent is None else parent.id
    evidence = [item.filled(artifact_id=model.id, parent_id=owner) for item in evidence]
    report = write_report(QualityReport, evidence, inputs, cfg, ctx)
    ctx.record(evidence)
    for item in filter(too_good, evidence):
        ctx.progress.print(f"quality: {suspicion(item)}")
    return report


def outputs_folder(parent: Artifact, ctx: Context) -> Path:
    """Where outputs of `parent` lie between measurements; those of MOST_KEPT models are kept, the last ones used."""
    whole = ctx.store.home / "cache" / "outputs"
    chosen = whole / parent.id[:32]
    chosen.mkdir(parents=True, exist_ok=True)
    chosen.touch()
    for old in sorted(whole.iterdir(), key=lambda path: path.stat().st_mtime_ns)[:-MOST_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return chosen


def refuse_seen_data(task: Task, model: Artifact, dataset: Artifact, ctx: Context) -> None:
    """DataError when the eval part of a dataset is text that the model, or one it was made from, was made with."""
    lineage = ctx.store.lineage(model.id)[1:] if ctx.store.has(model.id) else []
    models = [row["id"] for row in lineage if row.get("kind") == "model" and ctx.store.has(row["id"])]
    owners = (model, *(ctx.store.get(one) for one in models))
    known = [(one, Calibration.of(one)) for one in owners if Calibration.name_in(one.files) is not None]
    units = list(task.units_of(dataset.path, "eval")) if known else []
    texts = list(task.phrases_of(dataset.path, "eval")) if any(record.seen for _, record in known) else []
    whole = remember(texts, KEPT_WHOLE)
    for owner, record in known:
        found = first_overlap(units, record.fingerprints)
        told = None if found is None else f'"{excerpt(found)}"'
        for seen in (row.seen() for row in record.seen if told is None):
            lines, (share, least) = shared_lines(texts, seen), shared_runs(whole, seen)
            if lines.share > MAX_SHARED:
                told = f'{lines.share:.0%} of it is lines of that, such as "{excerpt(lines.longest)}"'
            elif seen.is_text_of(share, least):
                told = f"{share:.0%} of it is in that letter by letter, and {seen.run_limit:.0%} may be"
        if told is not None:
            verb = "trained" if owner.step["name"] == "train" else "calibrated"
            raise DataError(
                f"{owner.id[:12]} was {verb} on text of the eval part: {told}. "
                "Measure on other data: --eval-data, or a dataset that holds nothing of it"
            )


def refuse_other_reader(task: Task, model: Artifact, parent: Artifact, dataset: Artifact) -> None:
    """ConfigError for a parent that would be given other tokens than those of its own tokenizer."""
    if not task.reads_alike(model, parent, dataset):
        raise ConfigError(
            f"model {model.id[:12]} and its parent {parent.id[:12]} turn the same text into different tokens, so one "
            "cannot be measured against the other; give a parent with the model's tokenizer"
        )


def write_report(
    record: type[Measured], evidence: list[Evidence], inputs: dict[str, Artifact], cfg: Options, ctx: Context
) -> Artifact:
    """A report artifact whose one file, a `record`, holds the evidence and the ids of what was measured."""
    filled = tuple(item.filled(machine=ctx.machine_name, command=ctx.command) for item in evidence)
    measured_on = {role: artifact.id for role, artifact in inputs.items()}
    with ctx.writer(kind="report", task=inputs["model"].task, config=cfg) as writer:
        record(evidence=filled, **measured_on).write(writer.path)
        return writer.commit()
