"""What the scripts that measure peers share: the perplexity, and the file of results."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
from importlib.metadata import version
from pathlib import Path

CONTEXT = 1024


def windows(tokenizer, text: Path, count: int):
    """The first `count` windows of the text, int64 [count, 1024]."""
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    return ids[: count * CONTEXT].view(count, CONTEXT)


def perplexity(model, ids) -> dict:
    """Perplexity over all scored tokens and over the later half of each window. ids int64 [windows, 1024].

    Products are in bfloat16 where the CPU multiplies it, in float32 elsewhere.
    """
    import torch

    from gulliver.nets.precision import has_bfloat16, products_in

    total, later = 0.0, 0.0
    half = CONTEXT // 2
    with torch.no_grad(), products_in(has_bfloat16()):
        for row in ids:
            logits = model(row[None]).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
            total += losses.sum().item()
            later += losses[half:].sum().item()
    count, later_count = ids.numel() - len(ids), len(ids) * (CONTEXT - 1 - half)
    return {
        "perplexity": round(math.exp(total / count), 4),
        "perplexity_second_half": round(math.exp(later / later_count), 4),
    }


class Book:
    """The result file: {"peers": [...], "parent": {...}}. Read again before each change; rows there are kept."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict:
        return json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {"peers": []}

    @property
    def parent(self) -> dict | None:
        return self.read().get("parent")

    def set_parent(self, quality: dict) -> None:
        self._write({**self.read(), "parent": quality})

    def has(self, engine: str, name: str) -> bool:
        return any((row["engine"], row["type"]) == (engine, name) for row in self.read()["peers"])

    def add(self, row: dict) -> None:
        """Add a row, or replace the one of the same engine and type; `ratio_to_parent` is filled in."""
        data = self.read()
        if "perplexity" in row:
            row = {**row, "ratio_to_parent": round(row["perplexity"] / data["parent"]["perplexity"], 5)}
        same = (row["engine"], row["type"])
        rows = [one for one in data["peers"] if (one["engine"], one["type"]) != same]
        rows.append(row)
        data["peers"] = sorted(rows, key=lambda one: (one["engine"], one.get("size_bytes") or 0))
        self._write(data)

    def _write(self, data: dict) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, self._path)


def circumstances(threads: int) -> dict:
    """Date, machine and versions, for every row."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": threads, "isa": platform.machine()},
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
