"""What commands share: what they are given beside their options, how they open a model, tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gulliver.core.progress import Progress

if TYPE_CHECKING:
    from gulliver.core.store.artifact import Artifact
    from gulliver.core.store.store import Store
    from gulliver.tasks.answerer import OpenOptions


@dataclass(frozen=True)
class Session:
    """The store, the progress bars, and the command line that repeats it; `json` says that a document is printed."""

    home: str | None
    database: str | None
    progress: Progress
    command: str
    json: bool = False

    @property
    def home_folder(self) -> Path:
        """Where the store lies, whether or not it is open."""
        from gulliver.core.store.store import home_folder

        return home_folder(self.home)

    @cached_property
    def store(self) -> Store:
        """The store, opened when it is first needed: answering with a local folder needs none."""
        from gulliver.pipeline.ask import open_store

        return open_store(self.home, self.database)


def opening(options: Any, **more: Any) -> OpenOptions:
    """How a model is opened, from a command's options of the group "how it runs"; `more` are other fields."""
    from gulliver.core.quantities import parse_size
    from gulliver.tasks.answerer import OpenOptions

    ram = None if options.ram is None else parse_size(options.ram, "--ram")
    return OpenOptions(options.threads, options.isa, options.backend, ram, **more)


def described(artifact: Artifact, session: Session, out: str | None, *, reused: bool = False) -> tuple[Any, list[str]]:
    """What a command that made an artifact prints; copies it to `out` first."""
    from gulliver.core.records import PlainTensors
    from gulliver.core.store.artifact import copy_artifact

    if out is not None:
        artifact = copy_artifact(artifact, out)
    document = {
        **listed(artifact),
        "parents": list(artifact.parents),
        "reused": reused,
        "evidence": [item.to_json() for item in session.store.evidence(artifact.id)],
    }
    if PlainTensors.file in artifact.files:
        document["plain"] = PlainTensors.of(artifact).model_dump()
    size = f", {megabytes(artifact.weight_bytes)} of weights" if artifact.kind == "model" else ""
    again = ", made before" if reused else ""
    return document, [artifact.id, f"{artifact.kind} of task {artifact.task}{size}{again}: {artifact.path}"]


def listed(artifact: Artifact) -> dict[str, Any]:
    """An artifact in a few words, for a document."""
    shown = {name: getattr(artifact, name) for name in ("id", "kind", "task", "weight_bytes")}
    return {**shown, "path": str(artifact.path)}


# ---- tables and numbers for people -----------------------------------------------------------------------------------


def evidence_table(evidence: list[dict[str, Any]]) -> list[str]:
    """Metric, value and interval; in the order given."""
    if not evidence:
        return ["no evidence yet; `gulliver audit` measures"]
    rows = [("metric", "value", "95 % interval", "unit", "n")]
    for item in evidence:
        value, low, high = (_number(item[name]) for name in ("value", "low", "high"))
        about = item["detail"].get("data")
        name = f"{item['metric']} ({about})" if about else item["metric"]
        name += ", measured elsewhere" if item["detail"].get("measured") == "elsewhere" else ""
        rows.append((name, value, f"{low} … {high}", item["unit"], str(item["n"])))
    return table(rows)


def _number(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.5g}"
    return "not a number" if value is None else f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
