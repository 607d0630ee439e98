"""The model card (README.md) and evidence.json of an artifact, written beside it from the same records as the report.

Both are annotations: they may be written again when there is more evidence, and are no part of the content id.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from gulliver.core.records import TensorBits
from gulliver.core.store.artifact import Artifact, write_annotation
from gulliver.core.store.manifest import EVIDENCE
from gulliver.core.store.store import Store
from gulliver.report import rows, verdict
from gulliver.report.gather import ReportData, gather
from gulliver.report.html import environment
from gulliver.tasks import TASKS

if TYPE_CHECKING:
    from jinja2 import Template


def write_card(artifact: Artifact, store: Store) -> None:
    """Write README.md and evidence.json into the artifact's folder, atomically; its id stays."""
    data = gather(artifact, store)
    body = {"format": 1, "artifact_id": artifact.id, "evidence": [row.to_json() for row in store.evidence(artifact.id)]}
    text = json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_annotation(artifact, EVIDENCE, text)
    write_annotation(artifact, "README.md", card(data))


def card(data: ReportData) -> str:
    """The model card as Markdown with YAML front matter."""
    measured_on = (data.data_name(row.data_hash) for row in data.evidence if row.data_hash)
    return _template().render(
        data=data,
        source=data.origin.source if data.origin else "",
        licence=data.origin.license if data.origin else None,
        pipeline=TASKS[data.task].pipeline_tag if data.task in TASKS else "",
        sentences=verdict.sentences(data),
        downloaded=verdict.downloaded(data),
        evidence=rows.evidence(data),
        formats=_formats(data.tensors),
        datasets=list(dict.fromkeys(measured_on)),
        machines=list(dict.fromkeys(row.machine for row in data.evidence if row.machine)),
    )


def plain(text: str) -> str:
    """User text inside Markdown, so that it can be neither markup nor HTML nor a new line."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", line)


def code(text: str) -> str:
    """User text as a code span in Markdown, whatever back ticks it holds."""
    line = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    return f"{fence} {line} {fence}" if len(fence) > 1 else f"`{line}`"


@cache
def _template() -> Template:
    """card.md.j2. What it shows passes `plain`, except what the filters code, cell and json made safe already."""
    from markupsafe import Markup

    found = environment(finalize=lambda value: value if isinstance(value, Markup) else plain(str(value)))
    found.filters |= {
        "code": lambda text: Markup(code(text)),
        "cell": lambda text: Markup(code(text).replace("|", "\\|")),
        "json": lambda value: Markup(json.dumps(value)),
    }
    return found.get_template("card.md.j2")


def _formats(tensors: Sequence[TensorBits]) -> list[tuple[str, int, int, int]]:
    """(format, parts, weights, bytes) of every format that the tensors hold, the largest first."""
    sums: dict[str, tuple[int, int, int]] = {}
    for tensor in tensors:
        for part in tensor.parts:
            parts, weights, size = sums.get(part.format, (0, 0, 0))
            held = part.rows * math.prod(tensor.shape[1:])
            sums[part.format] = (parts + 1, weights + held, size + part.size_bytes)
    return sorted(((name, *total) for name, total in sums.items()), key=lambda row: -row[3])
