"""A step that records a model's size, and a quality that fewer bits make worse."""

from __future__ import annotations

from gulliver.core.context import Context
from gulliver.core.evidence.evidence import Evidence
from gulliver.core.options import Options
from gulliver.core.store.artifact import Artifact


class Config(Options):
    windows: int = 8


def run(cfg: Config, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    model = inputs["model"]
    ratio = 1 + 1 / 2 ** model.config.get("bits", 32)
    rows = [
        ("size_bytes", float(model.weight_bytes), 0.0, "bytes"),
        ("perplexity_ratio", ratio, 0.001, "ratio"),
    ]
    ctx.record(
        [
            Evidence(
                metric=metric,
                value=value,
                low=value - half,
                high=value + half,
                unit=unit,
                direction="lower",
                n=cfg.windows,
                seed=ctx.seed,
                data_hash="",
                artifact_id=model.id,
                parent_id=inputs["parent"].id if "parent" in inputs else None,
            )
            for metric, value, half, unit in rows
        ]
    )
    with ctx.writer(kind="report", task="toy", config=cfg) as writer:
        (writer.path / "measure.json").write_text(f'{{"windows": {cfg.windows}}}')
        return writer.commit()
