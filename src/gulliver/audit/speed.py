"""Step `speed`: how fast a model answers on this machine, and in how much memory.

Decoders that the native backend runs are measured there, all other models on the reference backend; the detail of the
evidence says which one and why. What a unit of work is (prompt tokens, generated tokens, examples) is the task's
affair. Everything is measured in a fresh process. The interval of a rate is Student's over repeats; it says how this
machine was at that moment, with the cores that the process may use: on others it is measured again.
"""

from __future__ import annotations

from gulliver.audit.measure import in_fresh_process
from gulliver.audit.options import SpeedOptions
from gulliver.audit.quality import write_report
from gulliver.core.context import Context
from gulliver.core.evidence.evidence import measured, paired_interval
from gulliver.core.records import SpeedReport
from gulliver.core.store.artifact import Artifact


def run(cfg: SpeedOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """Measure the model and record the evidence; returns the report. GulliverError when the process fails."""
    model = inputs["model"]
    with ctx.progress.stage("speed", unit="model"):
        found = in_fresh_process({"folder": str(model.path), "task": model.task, "repeats": cfg.repeats})
    detail = {name: found[name] for name in ("backend", "why", "threads", "native")} | {"repeats": cfg.repeats}
    names = ("load_seconds", "load_ram_bytes", "peak_ram_bytes")
    evidence = [measured(name, found[name], detail=detail) for name in names]
    for metric, rates in sorted(found["rates"].items()):
        mean, low, high = paired_interval(rates)
        evidence.append(measured(metric, mean, low=max(low, 0.0), high=high, n=len(rates), detail=detail))
    evidence = [item.filled(artifact_id=model.id) for item in evidence]
    report = write_report(SpeedReport, evidence, inputs, cfg, ctx)
    ctx.record(evidence)
    return report
