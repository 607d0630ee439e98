"""The model card (README.md) and evidence.json of an artifact, written beside it from the same records as the report.

Both are annotations: they may be written again when there is more evidence, and are no part of the content id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gulliver.core.catalog_entries import CATALOG
from gulliver.core.errors import ArtifactError
from gulliver.core.evidence.evidence import METRICS, Evidence
from gulliver.core.store.artifact import Artifact, write_annotation
from gulliver.core.store.manifest import read_json
from gulliver.core.store.store import Store
from gulliver.report import tables
from gulliver.report.html import gather
from gulliver.report.records import ReportData, TensorBits
from gulliver.report.units import format_measured, format_value, short_id

_PIPELINES = (("ForCausalLM", "text-generation"), ("ForImageClassification", "image-classification"))


def write_card(artifact: Artifact, evidence: Sequence[Evidence], store: Store) -> None:
    """Write README.md and evidence.json into the artifact's folder, atomically; its id stays.

    `evidence` is about this artifact, oldest first; ArtifactError for evidence about another.
    """
    for row in evidence:
        if row.artifact_id != artifact.id:
            raise ArtifactError(
                f"evidence for {row.metric} is about artifact {short_id(row.artifact_id) or '(none)'}, "
                f"not {short_id(artifact.id)}; audit this artifact"
            )
    data = gather(artifact, store, evidence=evidence)
    architecture = _architecture(artifact)
    write_annotation(artifact, "evidence.json", evidence_json(artifact.id, data.evidence))
    write_annotation(artifact, "README.md", card(data, architecture))


def evidence_json(artifact_id: str, evidence: Sequence[Evidence]) -> str:
    """All evidence about one artifact as a JSON document with sorted keys; readable by `Evidence.from_json`."""
    body = {"format": 1, "artifact_id": artifact_id, "evidence": [row.to_json() for row in evidence]}
    return json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def card(data: ReportData, architecture: str = "") -> str:
    """The model card as Markdown with YAML front matter; `architecture` is the class named in config.json."""
    title = f"{data.title}, {format_value(data.size_bytes, 'bytes')}" if data.size_bytes else data.title
    parts = [
        front_matter(data, architecture),
        f"# {plain(title)}\n",
        f"**{data.outcome}** " + " ".join(plain(text) for text in tables.verdict_sentences(data)) + "\n",
        "## Evidence\n\n" + _evidence(data),
        *(["## Formats\n\n" + _formats(data.fit.tensors)] if data.fit.tensors else []),
        "## Use\n\n" + _use(data),
        "## Lineage\n\n" + _lineage(data),
        "## Limits\n\n" + _limits(data),
    ]
    return "\n".join(parts)


def front_matter(data: ReportData, architecture: str = "") -> str:
    """The YAML block that the Hugging Face hub reads: licence, base model, tags; only what is known."""
    source, licence = _source(data)
    lines = ["---", "library_name: gulliver"]
    pipeline = next((name for ending, name in _PIPELINES if architecture.endswith(ending)), None)
    if pipeline:
        lines.append(f"pipeline_tag: {pipeline}")
    if licence:
        lines.append(f"license: {json.dumps(licence.lower())}")
    if source.startswith("hf:"):
        lines.append(f"base_model: {json.dumps(source.removeprefix('hf:'))}")
        if data.fit.tensors:
            lines.append("base_model_relation: quantized")
    tags = ["gulliver", data.task, *(["quantized"] if data.fit.tensors else [])]
    return "\n".join([*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---", ""])


def plain(text: str) -> str:
    """User text inside Markdown, so that it can be neither markup nor HTML nor a new line."""
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", line)


def code(text: str) -> str:
    """User text as a code span in Markdown, whatever back ticks it holds."""
    line = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    return f"{fence} {line} {fence}" if len(fence) > 1 else f"`{line}`"


def _evidence(data: ReportData) -> str:
    rows = tables.latest_evidence(data.evidence)
    if not rows:
        return "Nothing was measured.\n"
    beside = tables.baselines(data)
    lines = []
    for row in rows:
        value, bounds = format_measured(row.value, row.low, row.high, row.unit)
        name = f"{tables.metric_name(row.metric)}: {METRICS[row.metric].help}"
        on = data.data_name(row.data_hash) if row.data_hash else ""
        others = "; ".join(beside.get((row.metric, row.data_hash), ()))
        lines.append([name, value, bounds, str(row.n), row.direction, on, others])
    heads = ["what", "value", "95 % interval", "n", "better", "on data", "beside it"]
    return _table(heads, [[plain(cell) for cell in line] for line in lines])


def _formats(tensors: Sequence[TensorBits]) -> str:
    sums: dict[str, list[float]] = {}
    for tensor in tensors:
        columns = 1
        for size in tensor.shape[1:]:
            columns *= size
        for part in tensor.parts:
            total = sums.setdefault(part.format, [0, 0, 0])
            for index, value in enumerate((1, part.rows * columns, part.size_bytes)):
                total[index] += value
    rows = [
        [code(name).replace("|", "\\|"), f"{count:.0f}", f"{weights:,.0f}", format_value(size, "bytes")]
        for name, (count, weights, size) in sorted(sums.items(), key=lambda item: -item[1][2])
    ]
    legend = (
        "`u4g64` is uniform, 4 bits, one scale for 64 weights; `c` is a codebook. "
        "Tensors that are not counted here are stored unpacked.\n"
    )
    return f"{_table(['format', 'parts', 'weights', 'bytes'], rows)}\n{legend}"


def _use(data: ReportData) -> str:
    name = short_id(data.artifact_id)
    return (
        "```sh\n"
        f"gulliver verify {name}          # every hash again\n"
        f"gulliver audit FOLDER --data YOUR_TEXT   # measure it on your own data\n"
        f"gulliver export {name} --format safetensors --out DIR   # for other tools\n"
        "```\n\n"
        "```python\n"
        "import gulliver\n\n"
        'evidence = gulliver.audit("FOLDER", data="YOUR_TEXT")\n'
        "```\n"
    )


def _lineage(data: ReportData) -> str:
    lines = []
    for manifest in data.manifests:
        name = code(short_id(str(manifest["id"])))
        if manifest.get("missing"):
            lines.append(f"1. {name}, not in the store that wrote this card")
            continue
        parents = ", ".join(code(short_id(parent)) for parent in manifest["parents"]) or "outside"
        lines.append(f"1. {plain(str(manifest['step']['name']))} made {manifest['kind']} {name} from {parents}")
    source, _ = _source(data)
    origin = [f"\nThe first model came from {code(source)}."] if source else []
    return "\n".join([*lines, *origin]) + "\n"


def _limits(data: ReportData) -> str:
    names = list(dict.fromkeys(data.data_name(row.data_hash) for row in data.evidence if row.data_hash))
    machines = list(dict.fromkeys(row.machine for row in data.evidence if row.machine))
    lines = [
        f"- Every number holds for the artifact {code(data.artifact_id)} alone; a changed file is another artifact.",
        f"- Quality was measured on {', '.join(map(plain, names))} only; on other data it may differ."
        if names
        else "- Quality was not measured.",
        f"- Speed and memory were measured on {'; '.join(map(plain, machines))}."
        if machines
        else "- No machine was recorded.",
        "- What the first model must not be used for, this one must not be used for either.",
    ]
    if not _source(data)[1]:
        lines.append("- The licence of the first model was not recorded; look it up before you publish this one.")
    return "\n".join(lines) + "\n"


def _source(data: ReportData) -> tuple[str, str]:
    """(where the first model of the lineage came from, its licence); empty where not known."""
    for manifest in data.manifests:
        config: Mapping[str, Any] = manifest.get("config", {})
        source = config.get("source")
        if manifest.get("kind") == "model" and isinstance(source, str):
            entry = CATALOG.get(source.removeprefix("catalog:")) if source.startswith("catalog:") else None
            return source, entry.license if entry else ""
    return "", ""


def _architecture(artifact: Artifact) -> str:
    """The first class that the model's config.json names; "" when it names none."""
    if "config.json" not in artifact.files:
        return ""
    config = read_json(artifact.file("config.json").read_bytes(), "config.json")
    names = config.get("architectures") if isinstance(config, dict) else None
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
