"""The commands that look and measure: `audit`, `show`, `verify` and `list`."""

from __future__ import annotations

from typing import Any

from gulliver.cli.options import AuditOptions, NoOptions, OneArtifact
from gulliver.cli.session import Session
from gulliver.cli.text import evidence_table, megabytes, table


def audit(options: AuditOptions, session: Session) -> tuple[Any, list[str]]:
    """Measure a model now."""
    from gulliver.pipeline.api import audit

    shared = {"store": session.store, "progress": session.progress, "command": session.command}
    evidence = audit(**options.model_dump(), **shared)
    document = [item.to_json() for item in evidence]
    return {"artifact": evidence[0].artifact_id if evidence else None, "evidence": document}, evidence_table(document)


def show(options: OneArtifact, session: Session) -> tuple[Any, list[str]]:
    """Card, lineage and evidence."""
    from gulliver.pipeline.api import show

    document = show(options.id, store=session.store)
    lines = [
        f"{document['kind']} {document['id']}",
        f"task {document['task']}, made by {document['step']['name']} version {document['step']['version']}",
        f"folder {document['path']}, {megabytes(document['weight_bytes'])} of weights",
        "",
        *table(("lineage", "kind", "step", "from"), [_ancestor(manifest) for manifest in document["lineage"]]),
    ]
    return document, [*lines, "", *evidence_table(document["evidence"])]


def _ancestor(manifest: dict[str, Any]) -> tuple[str, ...]:
    if manifest.get("missing"):
        return manifest["id"][:12], "not here", "", ""
    made_from = [f"{role} {one[:12]}".strip() for role, ids in manifest["inputs"].items() for one in ids]
    return manifest["id"][:12], manifest["kind"], manifest["step"]["name"], ", ".join(made_from)


def verify(options: OneArtifact, session: Session) -> tuple[Any, list[str]]:
    """Every hash, derived again. ArtifactError names the first file that differs."""
    from gulliver.pipeline.api import verify

    found = verify(options.id, store=session.store)
    document = {"id": found.id, "path": str(found.path), "files": len(found.files), "verified": True}
    return document, [f"{found.id}: all {len(found.files)} files are what they were"]


def list_all(options: NoOptions, session: Session) -> tuple[Any, list[str]]:
    """All artifacts of this home."""
    del options
    held = session.store.artifacts()
    document = [
        {
            "id": item.id,
            "kind": item.kind,
            "task": item.task,
            "step": item.step["name"],
            "weight_bytes": item.weight_bytes,
            "path": str(item.path),
        }
        for item in held
    ]
    rows = [
        (
            item.id[:12],
            item.kind,
            item.task,
            str(item.step["name"]),
            megabytes(item.weight_bytes) if item.weight_bytes else "",
        )
        for item in held
    ]
    return document, table(("id", "kind", "task", "step", "weights"), rows) if rows else ["nothing yet"]
