"""The commands that look and measure: `audit`, `show`, `verify`, `list`, `doctor` and `bench`."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from typing import Any

from gulliver.cli.options import AuditOptions, BenchOptions, DoctorOptions, NoOptions, OneArtifact, VerifyOptions
from gulliver.cli.session import Session, evidence_table, listed, megabytes, table


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
        " ".join(filter(None, (document["kind"], document["name"], document["id"]))),
        f"task {document['task']}, made by {document['step']['name']} version {document['step']['version']}",
        f"folder {document['path']}, {megabytes(document['weight_bytes'])} of weights",
        "",
        *table([("lineage", "kind", "step", "from"), *map(_ancestor, document["lineage"])]),
    ]
    return document, [*lines, "", *evidence_table(document["evidence"])]


def _ancestor(manifest: dict[str, Any]) -> tuple[str, ...]:
    if manifest.get("missing"):
        return manifest["id"][:12], "not here", "", ""
    made_from = [f"{role} {one[:12]}".strip() for role, ids in manifest["inputs"].items() for one in ids]
    return manifest["id"][:12], manifest["kind"], manifest["step"]["name"], ", ".join(made_from)


def verify(options: VerifyOptions, session: Session) -> tuple[Any, list[str]]:
    """Every hash, derived again. ArtifactError names the first file that differs, StorageError the first row."""
    from gulliver.pipeline.api import verify, verify_home

    if options.id is None:
        counts = verify_home(store=session.store)
        told = ", ".join(f"{count} {name}" for name, count in counts.items())
        return {"home": str(session.store.home), **counts, "verified": True}, [f"{session.store.home}: {told}: all fit"]
    found = verify(options.id, store=session.store)
    document = {"id": found.id, "path": str(found.path), "files": len(found.files), "verified": True}
    return document, [f"{found.id}: all {len(found.files)} files are what they were"]


def list_all(options: NoOptions, session: Session) -> tuple[Any, list[str]]:
    """All artifacts of this home."""
    del options
    from gulliver.pipeline.ask import own_name

    document = [
        {**listed(item), "name": own_name(item.path), "step": item.step["name"]} for item in session.store.artifacts()
    ]
    rows = [("id", "kind", "task", "step", "weights", "name")]
    for item in document:
        weights = megabytes(item["weight_bytes"]) if item["weight_bytes"] else ""
        rows.append((item["id"][:12], item["kind"], item["task"], item["step"], weights, item["name"] or ""))
    return document, table(rows) if document else ["nothing yet"]


def doctor(options: DoctorOptions, session: Session) -> tuple[Any, list[str]]:
    """Cores, memory, instruction set, measured bandwidth and peaks, which kernels run and why; or a repair."""
    from gulliver.core.machine import describe

    if options.repair:
        return _repaired(session)
    document = asdict(describe(session.store.home))
    document["kernels"] = kernels = _kernels()
    rows = [(name, str(value)) for name, value in document.items() if name != "kernels"]
    return document, table([*rows, *((f"kernels {row['name']}", f"{row['state']}: {row['why']}") for row in kernels)])


def _repaired(session: Session) -> tuple[Any, list[str]]:
    """What `--repair` did, in lines."""
    from gulliver.core.repair import repair

    done = repair(session.home, session.database)
    aside = None if done.aside is None else str(done.aside)
    document = {**asdict(done), "home": str(done.home), "aside": aside, "unreadable": list(done.unreadable)}
    lines = [f"{done.reason}; it is kept as {aside}"] if aside else ["the database is whole"]
    if aside:
        lines.append(f"{done.kept} of its rows could be read and fit, and are in the new one")
    lines.append(f"{done.entered} pieces of evidence entered again from {done.artifacts} artifacts, measured elsewhere")
    return document, [*lines, *(f"not readable: {one}" for one in done.unreadable)]


def _kernels() -> list[dict[str, str]]:
    """What can run a model here, best first: its state is "runs", "can run" or "cannot run"."""
    from gulliver.runtime.decode import native_reason
    from gulliver.runtime.lower import ARCHITECTURES

    reason = native_reason()
    rows: list[dict[str, str]] = []
    if reason is None:
        native: Any = import_module("gulliver.runtime._native")
        for name, here, why in native.instruction_sets():
            first = here and not any(row["state"] == "runs" for row in rows)
            state = "runs" if first else "can run" if here else "cannot run"
            rows.append({"name": name, "state": state, "why": f"{why}; --isa {name} forces it" if here else why})
        rows[[row["state"] for row in rows].index("runs")]["why"] += "; it is the best that is here"
    else:
        rows.append({"name": "native", "state": "cannot run", "why": reason})
    native_ones = ", ".join(name.removesuffix("ForCausalLM") for name in ARCHITECTURES)
    what = f"what is not {native_ones}" if reason is None else "every model"
    return [*rows, {"name": "reference", "state": "runs", "why": f"{what}: the reference backend, on torch"}]


def bench(options: BenchOptions, session: Session) -> tuple[Any, list[str]]:
    """Measure speed and memory now; the medians and their intervals."""
    from gulliver.pipeline.bench import bench

    document = bench(**options.model_dump(), store=lambda: session.store, progress=session.progress)
    return document, bench_table(document)


def bench_table(document: dict[str, Any]) -> list[str]:
    """The document as a table for people."""
    rows = [("model", document["model"]), ("runs on", f"{document['backend']}, {document['threads']} threads")]
    rows += [("why", document["why"])]
    for name, value in document.items():
        if name.endswith("_per_s"):
            rows.append((name.removesuffix("_tokens_per_s").replace("_", " "), _shown(value, "tokens/s")))
    for count, value in (document["streams"] or {}).items():
        rows.append((f"{count} stream{'' if count == '1' else 's'}", _shown(value, "tokens/s")))
    limit = document["bandwidth"]
    if limit is not None:
        rows.append(("bandwidth", _shown(limit["gb_per_s"], "GB/s")))
        read = f"of what {limit['bytes_per_token'] / 1e6:.1f} MB a token allow"
        rows.append(("share of it", _shown(limit["decode_share"], f"% {read}", 100)))
    rows.append(("file", megabytes(document["file_bytes"])))
    memory = document["memory"]
    peak, beyond = (memory[name] / 1e6 for name in ("peak_ram_bytes", "peak_beyond_file_bytes"))
    rows.append(("memory", f"{peak:.0f} MB, {beyond:.0f} MB beyond it"))
    cold = document["cold"]
    if cold is not None:
        rows.append(("cold", _shown(cold["first_token_seconds"], "ms from the imports to the first token", 1e3)))
        if cold["process_seconds"] is not None:
            rows.append(("", _shown(cold["process_seconds"], "ms for the whole process", 1e3)))
        rows.append(("", _shown(cold["rss_beyond_file_bytes"], "MB of memory beyond the file", 1e-6)))
    return table(rows)


def _shown(value: dict[str, Any], unit: str, factor: float = 1.0) -> str:
    median, low, high = (factor * value[name] for name in ("median", "low", "high"))
    return f"{median:,.1f} ({low:,.1f} … {high:,.1f}) {unit}"
