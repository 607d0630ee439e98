"""The commands that are not steps, in one list. Each returns (JSON document, lines).

Here are fit, run, audit, show, verify, list and doctor; the others are in commands_generate.py and commands_serve.py.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gulliver.cli import generate, serve
from gulliver.cli.generate import MODEL_HELP


@dataclass(frozen=True)
class Command:
    """A command that is not a step: `arguments` fills its parser, `act` returns (JSON document, lines of text).

    `streams` says that it writes to stdout itself, as the words come, unless --json is given.
    """

    name: str
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    act: Callable[[argparse.Namespace, Any], tuple[Any, list[str]]]
    streams: bool = False


@dataclass(frozen=True)
class Session:
    """What every command is given: the store, the progress bars, and the command line that repeats it."""

    home: str | None
    database: str | None
    progress: Any
    command: str

    @cached_property
    def store(self) -> Any:
        """The store, opened when it is first needed: answering with a local folder needs none."""
        from gulliver.pipeline.call import open_store

        return open_store(self.home, self.database)


def described(artifact: Any, session: Session, out: str | None, *, reused: bool = False) -> tuple[Any, list[str]]:
    """What a command that made an artifact prints; copies it to `out` first."""
    from gulliver.core.store.artifact import copy_artifact

    if out:
        artifact = copy_artifact(artifact, Path(out))
    document = {
        "id": artifact.id,
        "kind": artifact.kind,
        "task": artifact.task,
        "path": str(artifact.path),
        "weight_bytes": artifact.weight_bytes,
        "parents": list(artifact.parents),
        "reused": reused,
        "evidence": [item.to_json() for item in session.store.evidence(artifact.id)],
    }
    size = f", {_megabytes(artifact.weight_bytes)} of weights" if artifact.kind == "model" else ""
    again = ", made before" if reused else ""
    return document, [artifact.id, f"{artifact.kind} of task {artifact.task}{size}{again}: {artifact.path}"]


# ---- fit -------------------------------------------------------------------------------------------------------------


def _fit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--size", required=True, help="most bytes of weights: 64MB (10^6) or 64MiB (2^20)")
    parser.add_argument("--ram", help="most memory that compressing may take, e.g. 1GB")
    parser.add_argument("--speed", type=float, help="least tokens per second on this machine")
    parser.add_argument("--max-drop", help="most quality to give up, e.g. 5%%")
    parser.add_argument("--data", help="text files, a dataset artifact or catalog:NAME")
    parser.add_argument("--eval-data", help="held-out text; without it a part of --data is held out")
    parser.add_argument("--effort", choices=("fast", "normal", "high"), default="normal", help="default normal")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")
    parser.add_argument("--out", metavar="DIR", required=True, help="where to put the fitted model and its report")


def _fit(options: argparse.Namespace, session: Session) -> tuple[Any, list[str]]:
    from gulliver.pipeline.fit import fit

    fitted = fit(
        options.model,
        size=options.size,
        ram=options.ram,
        speed=options.speed,
        max_drop=options.max_drop,
        data=options.data,
        eval_data=options.eval_data,
        effort=options.effort,
        out=options.out,
        seed=options.seed,
        store=session.store,
        progress=session.progress,
        command=session.command,
    )
    document, lines = described(fitted, session, None)
    report = Path(options.out) / "report.html"
    if report.is_file():
        document["report"] = str(report)
        lines.append(f"report: {report}")
    return document, lines + _evidence_table(document["evidence"])


# ---- run -------------------------------------------------------------------------------------------------------------


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE.toml", help="a recipe: steps and gates in order")
    parser.add_argument("--report", metavar="FILE", help="where to write the HTML report (default: beside the model)")


def _run(options: argparse.Namespace, session: Session) -> tuple[Any, list[str]]:
    from gulliver.pipeline.call import open_store
    from gulliver.pipeline.recipe import load
    from gulliver.pipeline.run import run_recipe

    home = options.home or load(options.recipe).home
    result = run_recipe(
        options.recipe,
        store=open_store(home, options.database),
        progress=session.progress,
        command=session.command,
        report=options.report,
    )
    calls = [
        {
            "id": entry.id,
            "step": entry.step,
            "artifact": entry.artifact.id,
            "kind": entry.artifact.kind,
            "reused": entry.reused,
            "seconds": round(entry.seconds, 3),
            "peak_rss_bytes": entry.peak_rss_bytes,
        }
        for entry in result.calls
    ]
    document = {
        "recipe": result.name,
        "calls": calls,
        "gates": [verdict.to_json() for verdict in result.verdicts],
        "report": str(result.report) if result.report else None,
    }
    rows = [
        (
            entry["id"],
            entry["step"],
            entry["artifact"][:12],
            "made before" if entry["reused"] else f"{entry['seconds']:.1f} s",
            "" if entry["reused"] else _megabytes(entry["peak_rss_bytes"]),
        )
        for entry in calls
    ]
    lines = _table(("id", "step", "artifact", "time", "peak memory"), rows)
    lines += [f"{verdict.outcome}  {verdict.gate.rule}: {verdict.reason}" for verdict in result.verdicts]
    return document, lines + ([f"report: {result.report}"] if result.report else [])


# ---- audit, show, verify, list, doctor -------------------------------------------------------------------------------


def _audit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--data", help="data to measure on (default: the held-out part of what it was made with)")
    parser.add_argument("--eval-data", help="held-out text, when --data names text files")
    parser.add_argument("--parent", help="the model to compare with (default: the one it was made from)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")


def _audit(options: argparse.Namespace, session: Session) -> tuple[Any, list[str]]:
    from gulliver.pipeline.api import audit

    evidence = audit(
        options.model,
        options.data,
        options.parent,
        eval_data=options.eval_data,
        store=session.store,
        seed=options.seed,
        progress=session.progress,
        command=session.command,
    )
    document = [item.to_json() for item in evidence]
    return {"artifact": evidence[0].artifact_id if evidence else None, "evidence": document}, _evidence_table(document)


def _id_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="ID", help="the id of an artifact, its first 6 or more digits, or its folder")


def _show(options: argparse.Namespace, session: Session) -> tuple[Any, list[str]]:
    from gulliver.pipeline.api import show

    document = show(options.id, store=session.store)
    lines = [
        f"{document['kind']} {document['id']}",
        f"task {document['task']}, made by {document['step']['name']} version {document['step']['version']}",
        f"folder {document['path']}, {_megabytes(document['weight_bytes'])} of weights",
        "",
        *_table(("lineage", "kind", "step"), [_ancestor(manifest) for manifest in document["lineage"]]),
    ]
    return document, [*lines, "", *_evidence_table(document["evidence"])]


def _ancestor(manifest: dict[str, Any]) -> tuple[str, str, str]:
    if manifest.get("missing"):
        return manifest["id"][:12], "not here", ""
    return manifest["id"][:12], manifest["kind"], manifest["step"]["name"]


def _verify(options: argparse.Namespace, session: Session) -> tuple[Any, list[str]]:
    from gulliver.pipeline.api import verify

    found = verify(options.id, store=session.store)
    document = {"id": found.id, "path": str(found.path), "files": len(found.files), "verified": True}
    return document, [f"{found.id}: all {len(found.files)} files are what they were"]


def _list(options: argparse.Namespace, session: Session) -> tuple[Any, list[str]]:
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
            _megabytes(item.weight_bytes) if item.weight_bytes else "",
        )
        for item in held
    ]
    return document, _table(("id", "kind", "task", "step", "weights"), rows) if rows else ["nothing yet"]


def _doctor(options: argparse.Namespace, session: Session) -> tuple[Any, list[str]]:
    from gulliver.core.machine import describe

    document = asdict(describe(session.store.home))
    document["kernels"] = kernels = _kernels()
    rows = [*document.items()][:-1]
    rows += [(f"kernels {row['name']}", f"{row['state']}: {row['why']}") for row in kernels]
    width = max(len(name) for name, _ in rows)
    return document, [f"{name:<{width}}  {value}" for name, value in rows]


def _kernels() -> list[dict[str, str]]:
    """What can run a model here, best first: its state is "runs", "can run" or "cannot run"."""
    from gulliver.runtime.decode import native_reason
    from gulliver.runtime.lower import ARCHITECTURES

    reason = native_reason()
    rows: list[dict[str, str]] = []
    if reason is None:
        native: Any = importlib.import_module("gulliver.runtime._native")
        for name, here, why in native.instruction_sets():
            first = here and not any(row["state"] == "runs" for row in rows)
            state = "runs" if first else "can run" if here else "cannot run"
            rows.append({"name": name, "state": state, "why": f"{why}; --isa {name} forces it" if here else why})
        rows[[row["state"] for row in rows].index("runs")]["why"] += "; it is the best that is here"
    else:
        rows.append({"name": "native", "state": "cannot run", "why": reason})
    native_ones = ", ".join(name.removesuffix("ForCausalLM") for name in ARCHITECTURES)
    what = f"what is not {native_ones}" if reason is None else "every model"
    return [*rows, {"name": "reference", "state": "runs", "why": f"{what}: the reference path, on torch"}]


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing beside what every command takes."""


# ---- text ------------------------------------------------------------------------------------------------------------


def _evidence_table(evidence: list[dict[str, Any]]) -> list[str]:
    """Metric, value and interval; in the order given."""
    if not evidence:
        return ["no evidence yet; `gulliver audit` measures"]
    rows = [
        (
            item["metric"],
            _number(item["value"]),
            f"{_number(item['low'])} … {_number(item['high'])}",
            item["unit"],
            str(item["n"]),
        )
        for item in evidence
    ]
    return _table(("metric", "value", "95 % interval", "unit", "n"), rows)


def _number(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.5g}"
    return "not a number" if value is None else f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


COMMANDS = (
    Command("fit", "the best model that fits a budget of bytes, memory, speed and quality", _fit_arguments, _fit),
    Command("run", "a whole life from a recipe; resumable; writes an HTML report", _run_arguments, _run),
    Command("audit", "measure quality, size, memory and speed now", _audit_arguments, _audit),
    Command("show", "an artifact's card, lineage and evidence", _id_argument, _show),
    Command("verify", "derive every hash of an artifact again", _id_argument, _verify),
    Command("list", "all artifacts of this home", _no_arguments, _list),
    Command(
        "doctor",
        "cores, memory, instruction set, measured bandwidth and peaks, which kernels run and why",
        _no_arguments,
        _doctor,
    ),
    Command(
        "generate",
        "answer a prompt, as the words come",
        generate.generate_arguments,
        generate.generate,
        streams=True,
    ),
    Command(
        "chat",
        "talk with a model on the terminal",
        generate.chat_arguments,
        generate.chat,
        streams=True,
    ),
    Command(
        "bench",
        "prefill, decode, batch, cold start and memory of a model, measured now",
        generate.bench_arguments,
        generate.bench,
    ),
    Command(
        "serve",
        "answer requests over HTTP as OpenAI's API does, with a chat page",
        serve.serve_arguments,
        serve.serve,
    ),
    Command("keys", "the API keys that `gulliver serve` asks for", serve.keys_arguments, serve.keys),
)
