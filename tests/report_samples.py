"""A store that holds one fitted model with everything a report can show: 30 blocks, 210 tensors, 3 classes of rows."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gulliver.core.evidence.evidence import Evidence, measured
from gulliver.core.evidence.gate import Gate
from gulliver.core.machine import Machine
from gulliver.core.record import Record
from gulliver.core.records import Asked, FitResult, Origin, PartBits, Plan, Point, TensorBits
from gulliver.core.store.artifact import Artifact, create
from gulliver.core.store.store import Store

ROLES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
WIKITEXT, SHAKESPEARE = (hashlib.sha256(text).hexdigest() for text in (b"wikitext", b"shakespeare"))
MACHINE = "Intel Xeon, 2 cores, avx512_vnni, 24 GB"


def artifact(
    store: Store,
    kind: str,
    step: str,
    files: Mapping[str, bytes | int | Record],
    parents: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Artifact:
    """A committed artifact; a file given as a number is that many zero bytes, a record writes itself."""
    step_body = {"name": step, "version": 1}
    with create(
        store.artifacts_folder,
        kind=kind,
        task="language",
        inputs={"model": parents} if parents else {},
        step=step_body,
        config=config or {},
    ) as writer:
        for name, content in files.items():
            if isinstance(content, Record):
                content.write(writer.path)
                continue
            with open(writer.path / name, "wb") as stream:
                if isinstance(content, int):
                    stream.truncate(content)
                else:
                    stream.write(content)
        return writer.commit()


def tensors(blocks: int = 30) -> tuple[TensorBits, ...]:
    """Tensor rows of a plan: `blocks` blocks of seven linears and an embedding cut into three classes of rows."""
    dice, rows = random.Random(7), []
    for block in range(blocks):
        for role, (outputs, inputs) in ROLES.items():
            edge = block in (0, 1, blocks - 1)
            bits = 5 if edge and role.startswith("mlp") else dice.choice((3, 4, 4, 4)) if "mlp" in role else 4
            rows.append(
                tensor(f"model.layers.{block}.{role}.weight", inputs, [(outputs, f"c{bits}g64")], dice.random())
            )
    cut = [(4096, "u8g64"), (12288, "c5g64"), (32768, "c3g128")]
    rows.append(tensor("model.embed_tokens.weight", 576, cut, 4.0))
    return tuple(rows)


def tensor(name: str, inputs: int, cut: Sequence[tuple[int, str]], increase: float) -> TensorBits:
    """One tensor row of a plan, whose parts are (rows, format)."""
    parts = []
    for count, fmt in cut:
        bits, group = int(fmt[1]), int(fmt.partition("g")[2])
        per_weight = bits + (16 if fmt[0] == "u" else 8) / group + 16 / inputs
        size = round(per_weight * count * inputs / 8)
        share = increase / bits**2
        part = PartBits(rows=count, format=fmt, bits_per_weight=per_weight, size_bytes=size, loss_increase=share)
        parts.append(part)
    rows, size = sum(part.rows for part in parts), sum(part.size_bytes for part in parts)
    return TensorBits(name=name, shape=(rows, inputs), size_bytes=size, parts=tuple(parts))


def plan(budget_bytes: int) -> Plan:
    """A plan whose blocks and frontier are of no interest here."""
    rows = tensors()
    increase = sum(row.loss_increase or 0.0 for row in rows)
    sizes = {"budget_bytes": budget_bytes, "size_bytes": budget_bytes}
    return Plan(**sizes, loss_increase=increase, tensors=rows, blocks=(), frontier=())


def fit(budget_bytes: int) -> FitResult:
    """A falling frontier from 55 to 115 MB and two rounds near the budget, in proportion to the budget."""
    unit = budget_bytes / 72
    frontier = [
        Point(size_bytes=round(size * unit), predicted_drop=0.9 * math.exp(-(size - 55) / 11))
        for size in range(55, 116, 3)
    ]
    rounds = (
        Point(size_bytes=round(71.6 * unit), predicted_drop=0.058, measured_drop=0.081),
        Point(size_bytes=round(71.9 * unit), predicted_drop=0.047, measured_drop=0.0312),
    )
    return FitResult(budget=Asked(size_bytes=budget_bytes), frontier=tuple(frontier), rounds=rounds)


def memory_samples(cap_bytes: int) -> list[tuple[float, str, int]]:
    """Ten minutes of (seconds, stage, resident bytes) under a cap."""
    stages = [("read", 10), ("calibrate", 140), ("plan", 20), ("quantize", 180), ("distill", 190), ("quality", 70)]
    samples, now = [], 0.0
    for index, (stage, seconds) in enumerate(stages):
        for tick in range(seconds * 4):
            level = 0.25 + 0.1 * index + 0.12 * math.sin(tick / 18) + 0.05 * math.sin(tick * 1.7)
            samples.append((round(now, 2), stage, round(cap_bytes * max(0.12, level))))
            now += 0.25
    return samples


def evidence(model: Artifact, parent: Artifact, size_bytes: int, quality_loss: float = 0.0312) -> list[Evidence]:
    """The evidence of an audit on two texts."""
    text = {"n": 24, "data_hash": WIKITEXT}
    other = {"n": 12, "data_hash": SHAKESPEARE}
    ratio, spread = 1 + quality_loss, 0.0044
    rows = [
        measured("perplexity", 20.77 * ratio, low=20.47, high=22.4, **text),
        measured("baseline_perplexity", 1043.2, **text),
        measured("perplexity_vs_baseline", 0.0205, low=0.0198, high=0.0213, **text),
        measured("perplexity_ratio", ratio, low=ratio - spread, high=ratio + spread, **text),
        measured("quality_loss", quality_loss, low=quality_loss - spread, high=quality_loss + spread, **text),
        measured("kl_divergence", 0.0461, low=0.0437, high=0.0485, **text),
        measured("top1_agreement", 0.912, low=0.908, high=0.916, **text),
        measured("perplexity_ratio", 1.041, low=1.029, high=1.053, **other),
        measured("size_bytes", size_bytes),
        measured("size_ratio", size_bytes / parent.weight_bytes),
        measured("bits_per_weight", 4.27),
        measured("peak_ram_bytes", 412e6),
        measured("compress_peak_ram_bytes", 941e6),
        measured("decode_tokens_per_s", 181.4, low=178.9, high=183.9, n=10),
        measured("prefill_tokens_per_s", 1210.0, low=1195.0, high=1225.0, n=10),
    ]
    about = {"artifact_id": model.id, "parent_id": parent.id, "machine": MACHINE}
    command = f"gulliver audit {model.id[:12]} --data wikitext-2.test.txt --parent {parent.id[:12]}"
    return [replace(row, **about, command=command) for row in rows]


def fitted(
    home: Path, *, megabyte: int = 1000, source: str = "catalog:smollm2-135m-instruct", quality_loss: float = 0.0312
) -> tuple[Store, Artifact]:
    """(store, fitted model) of 71.9 "megabytes" of `megabyte` bytes, audited, with fit.json and lineage."""
    store = Store(home)
    origin = Origin(
        source=source,
        license="Apache-2.0" if source.startswith("catalog:") else None,
        original_file="smollm2.gguf",
        original_format="GGUF Q4_1",
        original_bytes=round(94.1 * megabyte),
        bfloat16_bytes=269 * megabyte,
    )
    pulled = {"model.safetensors": 269 * megabyte, Origin.file: origin.model_dump_json().encode()}
    parent = artifact(store, "model", "pull", pulled, config={"source": source})
    config = {"data": "/texts/wikitext-2.valid.txt", "eval_data": "/texts/wikitext-2.test.txt"}
    data = artifact(store, "dataset", "read", {"examples.parquet": b"wikitext"}, config=config)
    artifact(store, "dataset", "read", {"examples.parquet": b"shakespeare"}, config={"data": "tinyshakespeare.txt"})
    stats = artifact(store, "report", "calibrate", {"stats.safetensors": 10}, [parent.id, data.id], {"tokens": 16384})
    planned = artifact(store, "report", "plan", {Plan.file: plan(72 * megabyte)}, [parent.id, stats.id])
    config = {"method": "gptq", "bits": 4, "group_size": 64}
    packed = {"model.safetensors": round(71.9 * megabyte)}
    model = artifact(store, "model", "quantize", packed, [parent.id, stats.id, planned.id], config)
    rows = evidence(model, parent, model.weight_bytes, quality_loss)
    store.record([replace(rows[0], metric="perplexity", value=20.77, low=20.1, high=21.4, artifact_id=parent.id)])
    store.record(rows)
    gates = [Gate("size_bytes", at_most=72 * megabyte), Gate("quality_loss", at_most=0.05)]
    gates += [Gate("peak_ram_bytes", at_most=10**9), Gate("decode_tokens_per_s", at_least=150)]
    asked = Asked(size_bytes=72 * megabyte, max_ram_bytes=10**9, min_tokens_per_s=150, max_drop=0.05)
    verdicts = tuple(gate.judge(rows, model.id) for gate in gates)
    found = {"budget": asked, "memory": tuple(memory_samples(10**9)), "verdicts": verdicts}
    artifact(store, "report", "fit", {FitResult.file: fit(72 * megabyte).model_copy(update=found)}, [model.id])
    machine = Machine("Intel Xeon", 2, ("avx2", "avx512_vnni"), 24 * 10**9, "Linux 6", "3.11", bandwidth_gb_s=27.4)
    machine = replace(machine, int8_gop_s=865.0, versions={"torch": "2.13"})
    (home / "machine.json").write_text(json.dumps(asdict(machine)), encoding="utf-8")
    return store, model
