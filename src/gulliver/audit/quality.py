"""Step `quality`: what a model is worth on held-out data, paired against its parent, as evidence.

Which metrics there are is the task's affair; size is counted here, the same for all. A model is never measured on what
it was calibrated on: `calibration.json` in a compressed model (or in a model it was made from) lists the fingerprints
of its calibration data, and one of them in the eval part is enough to refuse.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from gulliver.audit.options import QualityOptions
from gulliver.core.context import Context
from gulliver.core.errors import ConfigError, DataError
from gulliver.core.evidence.evidence import Evidence, measured
from gulliver.core.options import Options
from gulliver.core.overlap import excerpt, first_overlap
from gulliver.core.records import Calibration, Measured, QualityReport
from gulliver.core.store.artifact import Artifact
from gulliver.tasks import get_task, same_examples

MOST_KEPT = 3


def run(cfg: QualityOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """Score the model on the dataset's eval part and record the evidence; returns the report.

    DataError when the eval part holds data that the model was calibrated on; ConfigError when families differ.
    """
    model, dataset, parent = inputs["model"], inputs["dataset"], inputs.get("parent")
    same = parent is None or parent.task == model.task
    for other, fits in ((dataset, same_examples(dataset.task, model.task)), (parent, same)):
        if other is not None and not fits:
            raise ConfigError(f"the model is for {model.task}, but {other.kind} {other.id[:12]} is for {other.task}")
    task = get_task(model.task)
    refuse_calibration_data(model, list(task.units_of(dataset.path, "eval")), ctx)
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


def refuse_calibration_data(model: Artifact, held_out: list[str], ctx: Context) -> None:
    """DataError naming the first passage of `held_out` that the model, or one it was made from, was calibrated on."""
    lineage = ctx.store.lineage(model.id)[1:] if ctx.store.has(model.id) else []
    models = [row["id"] for row in lineage if row.get("kind") == "model" and ctx.store.has(row["id"])]
    for owner in (model, *(ctx.store.get(one) for one in models)):
        calibrated = Calibration.name_in(owner.files) is not None
        found = first_overlap(held_out, Calibration.of(owner).fingerprints) if calibrated else None
        if found is not None:
            raise DataError(
                f'{owner.id[:12]} was calibrated on text of the eval part: "{excerpt(found)}". '
                "Measure on other data: --eval-data, or a dataset that holds nothing of it"
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
