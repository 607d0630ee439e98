"""One self-contained HTML page about one artifact: the verdict first, then all that it rests on.

`gather` reads the records from a store, `page` turns them into HTML, `write_report` does both and writes the file. The
console uses the same functions; nothing here reads a network or the clock, so the same records give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from gulliver.core.evidence.evidence import Evidence
from gulliver.core.evidence.gate import Verdict
from gulliver.core.store.artifact import WEIGHT_SUFFIXES, Artifact
from gulliver.core.store.files import write_atomic
from gulliver.core.store.manifest import read_json
from gulliver.core.store.store import Store
from gulliver.report import bits, plots, tables
from gulliver.report.picture import Picture, figure_html
from gulliver.report.records import FitRecord, OtherGates, ReportData, TensorBits, gated, parse_packing, read_fit
from gulliver.report.theme import CSS, SCRIPT, content_policy, plotly_library
from gulliver.report.units import short_id


def write_report(
    path: Path | str,
    model: Artifact,
    store: Store,
    memory: Sequence[tuple[float, str, int]] = (),
    verdicts: Sequence[Verdict] = (),
    others: Sequence[OtherGates] = (),
    fit: Artifact | None = None,
) -> None:
    """Write the page about `model` to `path`, atomically. ArtifactError if a plan, fit or packing file is malformed.

    `memory` holds (seconds, stage, resident bytes) where no fit recorded any; `verdicts` those that a recipe judged on
    this model, and `others` those on its other models. `fit` is the report artifact with fit.json; by default the
    newest in the store that made this model. For an infeasible budget give the parent as `model` and the fit, whose
    fit.json then names the `nearest` point.
    """
    write_atomic(path, page(gather(model, store, memory, verdicts, others, fit=fit)))


def gather(
    model: Artifact,
    store: Store,
    memory: Sequence[tuple[float, str, int]] = (),
    verdicts: Sequence[Verdict] = (),
    others: Sequence[OtherGates] = (),
    evidence: Sequence[Evidence] | None = None,
    fit: Artifact | None = None,
) -> ReportData:
    """All records about `model` that the store holds, as one frozen record; `evidence` replaces the store's."""
    manifests = oldest_first(store.lineage(model.id))
    evidence = tuple(store.evidence(model.id) if evidence is None else evidence)
    parent_id = _parent_id(model, manifests, evidence)
    parent = next((manifest for manifest in manifests if manifest["id"] == parent_id), {})
    record = _fit_record(model, store, manifests, fit)
    if memory:
        record = replace(record, memory=tuple(memory))
    if verdicts:
        record = replace(record, gates=tuple(dict.fromkeys([*map(gated, verdicts), *record.gates])))
    return ReportData(
        title=model_name(manifests) or short_id(model.id),
        artifact_id=model.id,
        task=model.task,
        step=str(model.step["name"]),
        size_bytes=model.weight_bytes or None,
        parent_id=parent_id,
        parent_size_bytes=_weight_bytes(parent) or None,
        evidence=evidence,
        parent_evidence=tuple(store.evidence(parent_id)) if parent_id else (),
        fit=record,
        manifests=tuple(manifests),
        machine=_machine(store.home / "machine.json"),
        data_names=_data_names(store, {row.data_hash for row in evidence}),
        others=tuple(others),
    )


def page(data: ReportData) -> str:
    """The whole page, with plotly.js inside when there is a picture to draw."""
    body = "".join(
        f"<section><h2>{escape(title)}</h2>{content}</section>" for title, content in sections(data) if content
    )
    drawn = 'class="plot"' in body
    scripts = ""
    if drawn:
        scripts = f'<script type="text/plain" id="plotly">{plotly_library()[0]}</script><script>{SCRIPT}</script>'
    heading = f"Gulliver report: {data.title}"
    about = f"{data.task} model {short_id(data.artifact_id)}, made by {data.step}"
    notice = "plotly.js (MIT licence) is embedded for the pictures." if drawn else ""
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(content_policy(drawn))}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(heading)}: {data.outcome}</title><style>{CSS}</style>"
        "<noscript><style>.plot{display:none}</style></noscript>"
    )
    footer = (
        f"Every number is bound to artifact <code>{escape(data.artifact_id)}</code> and says nothing about another. "
        f"Made by Gulliver. {notice}"
    )
    return (
        f'<!doctype html><html lang="en"><head>{head}</head><body>'
        f'<header><h1>{escape(heading)}</h1><p class="soft">{escape(about)}</p></header>'
        f"<main>{tables.verdict(data)}{body}</main><footer>{footer}</footer>{scripts}</body></html>\n"
    )


def sections(data: ReportData) -> list[tuple[str, str]]:
    """(title, HTML) of the sections after the verdict, in the page's order; HTML is empty where there are no data."""
    tensors = data.fit.tensors
    return [
        ("Gates", tables.gates(data)),
        ("Evidence", tables.evidence(data)),
        ("Size and quality", _pictures(plots.size_quality(data))),
        ("Bits per tensor", _pictures(bits.bits(tensors), bits.rows_bits(tensors))),
        ("Damage per block", _pictures(plots.damage(data))),
        ("Memory over time", _pictures(plots.memory(data))),
        ("Lineage", tables.lineage(data.manifests, data.artifact_id)),
        ("Machine", tables.machine(data.machine, data.evidence)),
        ("Commands to repeat", tables.commands(data.evidence)),
    ]


def oldest_first(manifests: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A lineage ordered so that every artifact stands after all it was made from."""
    waiting = {str(manifest["id"]): manifest for manifest in reversed(manifests)}
    ordered: dict[str, Mapping[str, Any]] = {}

    def place(identifier: str) -> None:
        manifest = waiting.pop(identifier, None)
        if manifest is not None:
            for parent in manifest.get("parents", ()):
                place(parent)
            ordered[identifier] = manifest

    while waiting:
        place(next(iter(waiting)))
    return list(ordered.values())


def model_name(manifests: Sequence[Mapping[str, Any]]) -> str:
    """The name under which the first model of a lineage was fetched: "catalog:…", "hf:…", or a file's last part."""
    for manifest in manifests:
        source = manifest.get("config", {}).get("source")
        if manifest.get("kind") == "model" and isinstance(source, str):
            return source if source.startswith(("catalog:", "hf:")) else Path(source).name
    return ""


def _pictures(*pictures: Picture | None) -> str:
    return "".join(figure_html(picture) for picture in pictures if picture is not None)


def _fit_record(
    model: Artifact, store: Store, manifests: Sequence[Mapping[str, Any]], fit: Artifact | None
) -> FitRecord:
    """The plan nearest in the lineage, overlaid with the fit about this model and with what the model holds."""
    record = FitRecord()
    plans = [str(row["id"]) for row in reversed(manifests) if "plan.json" in row.get("files", {})]
    if plans:
        record = read_fit(store.get(plans[0]).file("plan.json"))
    newer = read_fit(fit.file("fit.json")) if fit is not None else _newest_fit(model, store)
    if newer is not None:
        empty = FitRecord()
        changed = {name: value for name, value in vars(newer).items() if value != getattr(empty, name)}
        record = replace(record, **changed)
    if "packing.json" in model.files:
        packing = model.file("packing.json")
        held = parse_packing(read_json(packing.read_bytes(), packing.name))
        planned = {tensor.name: tensor for tensor in record.tensors}
        record = replace(record, tensors=tuple(_same_formats(planned.get(tensor.name), tensor) for tensor in held))
    return record


def _newest_fit(model: Artifact, store: Store) -> FitRecord | None:
    """The newest fit.json in the store that tells how this model was made; not one that starts from it."""
    for found in reversed(store.artifacts()):
        if found.kind == "report" and model.id in found.parents and "fit.json" in found.files:
            record = read_fit(found.file("fit.json"))
            if record.nearest is None and record.artifact_id in ("", model.id):
                return record
    return None


def _same_formats(planned: TensorBits | None, held: TensorBits) -> TensorBits:
    """The plan's row, which knows damage and exact bytes, when it names the formats that the model holds."""
    if planned is None or [(p.rows, p.format) for p in planned.parts] != [(p.rows, p.format) for p in held.parts]:
        return held
    return planned


def _data_names(store: Store, hashes: set[str]) -> dict[str, str]:
    """Names of the measured data, from the data sets of the store that hold files with these hashes."""
    names = {}
    for found in store.artifacts():
        own = {entry.sha256 for entry in found.files.values()} & hashes if found.kind == "dataset" else set()
        source = found.config.get("eval_data") or found.config.get("data") or found.config.get("source")
        if own and isinstance(source, str):
            shown = source if source.startswith(("catalog:", "hf:")) else Path(source).name
            names |= dict.fromkeys(own, shown)
    return names


def _parent_id(model: Artifact, manifests: Sequence[Mapping[str, Any]], evidence: Sequence[Evidence]) -> str | None:
    """The model that this one was measured against; else its nearest ancestor that is a model."""
    named = [row.parent_id for row in evidence if row.parent_id]
    if named:
        return named[-1]
    models = [str(row["id"]) for row in reversed(manifests) if row.get("kind") == "model" and row["id"] != model.id]
    return models[0] if models else None


def _weight_bytes(manifest: Mapping[str, Any]) -> int:
    files = manifest.get("files", {})
    return sum(entry["size_bytes"] for name, entry in files.items() if name.endswith(WEIGHT_SUFFIXES))


def _machine(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    found = read_json(path.read_bytes(), path.name)
    return found if isinstance(found, dict) else {}
