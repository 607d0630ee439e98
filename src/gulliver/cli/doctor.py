"""The command `doctor`: what this machine has, and what can run a model here and why."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from typing import Any

from gulliver.cli.options import NoOptions
from gulliver.cli.session import Session


def doctor(options: NoOptions, session: Session) -> tuple[Any, list[str]]:
    """Cores, memory, instruction set, measured bandwidth and peaks, which kernels run and why."""
    from gulliver.core.machine import describe

    del options

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
