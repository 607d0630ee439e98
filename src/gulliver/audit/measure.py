"""Measures one model in a process of its own, so that memory is the model's and not of whatever ran before.

python -m gulliver.audit.measure '{"folder": …, "task": …, "repeats": …}'    -> one JSON object on stdout
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from gulliver.core.memory import current_rss_bytes, peak_rss_bytes
from gulliver.tasks import get_task


def measure(folder: Path, task_name: str, repeats: int) -> dict[str, Any]:
    """{"load_seconds", "load_ram_bytes", "peak_ram_bytes", "threads", "rates": {metric: [units per second]}}.

    Every workload runs once unmeasured, then `repeats` times.
    """
    import torch

    start = time.perf_counter()
    task = get_task(task_name)
    model = task.load(folder)
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - start, "load_ram_bytes": current_rss_bytes()}
    rates: dict[str, list[float]] = {}
    workloads = getattr(task, "workloads", None)  # a family without any is measured for memory and loading alone
    for metric, workload in (workloads(model, folder) if workloads else {}).items():
        workload()
        for _ in range(repeats):
            start = time.perf_counter()
            units = workload()
            rates.setdefault(metric, []).append(units / (time.perf_counter() - start))
    return found | {"peak_ram_bytes": peak_rss_bytes(), "threads": torch.get_num_threads(), "rates": rates}


def main(request: str) -> None:
    """Answer one request, a JSON object, on stdout."""
    asked = json.loads(request)
    print(json.dumps(measure(Path(asked["folder"]), asked["task"], asked["repeats"])))


if __name__ == "__main__":
    main(sys.argv[1])
