"""Measures one model in a process of its own, so that memory is the model's and not of whatever ran before.

python -m gulliver.audit.measure '{"folder": …, "task": …, "repeats": …}'    -> one JSON object on stdout, which is
{"error": …, "message": …} when the model cannot be measured

What the native backend runs is measured there, without torch in the process; every other model by torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gulliver.core.errors import ArtifactError, BudgetError, ConfigError, DataError, GulliverError, StorageError
from gulliver.core.machine import bandwidth_gb_s, identify, usable_cores
from gulliver.core.memory import current_rss_bytes, peak_rss_bytes
from gulliver.runtime.decode import NativeDecoder, native_reason
from gulliver.runtime.lower import NotLowered
from gulliver.runtime.workloads import CACHE_TOKENS, MAX_STREAMS, bytes_per_token, workloads
from gulliver.tasks import family, get_task

BANDWIDTH_BYTES = 2**27
"""Bytes that each core reads to measure the bandwidth."""
EXPECTED = {kind.__name__: kind for kind in (ArtifactError, BudgetError, ConfigError, DataError, StorageError)}
"""Errors that are the same in this process as in the one that measures."""


def in_fresh_process(request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of `measure` to `request`, its arguments. Raises what `measure` raises."""
    command = [sys.executable, "-m", "gulliver.audit.measure", json.dumps(request)]
    return printed(command, f"measuring {request['folder']}")


def printed(command: list[str], what: str) -> dict[str, Any]:
    """The JSON object that a new process prints.

    When it ends badly, the expected error that it tells as {"error", "message"}; GulliverError, saying that `what`
    failed, when it tells none.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout)
    try:
        told = json.loads(done.stdout)
        kind, message = EXPECTED[told["error"]], told["message"]
    except (ValueError, TypeError, LookupError):
        last = done.stderr.strip().splitlines()[-1:] or [f"the process ended with {done.returncode}"]
        kind, message = GulliverError, f"{what} failed: {last[0].removeprefix('error: ')}"
    raise kind(message)


def measure(
    folder: str,
    task: str,
    repeats: int,
    *,
    threads: int | None = None,
    isa: str = "auto",
    streams: tuple[int, ...] = (),
    bandwidth: bool = False,
) -> dict[str, Any]:
    """{"load_seconds", "load_ram_bytes", "peak_ram_bytes", "threads", "backend", "why", "native", "rates", "streams"…}.

    "rates": {metric: [units per second]}; "streams": {how many at once: [tokens per second of all together]}, empty on
    the reference backend. Every workload runs once unmeasured, then `repeats` times. With `bandwidth`, on the native
    backend: "bytes_per_token", and "bandwidth": [[GB/s, tokens per second right after]].
    """
    threads, path = threads or usable_cores(), Path(folder)
    start = time.perf_counter()
    generates = "generate" in family(task).can
    decoder = native(path, threads=threads, isa=isa) if generates else f"{task} models run by torch alone"
    if isinstance(decoder, str):
        import torch

        torch.set_num_threads(threads)
        start, backend, why = time.perf_counter(), "reference", f"it does not run natively, because {decoder}"
        streams, bandwidth = (), False
        timed = partial(get_task(task).workloads, get_task(task).load(path), path)
    else:
        backend, why, timed = decoder.backend, decoder.why, partial(workloads, decoder, tuple(streams))
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - start, "load_ram_bytes": current_rss_bytes()}
    work = timed()
    rates = _rates(work, repeats)
    found |= {"peak_ram_bytes": peak_rss_bytes(), "threads": threads, "backend": backend, "why": why}
    found["native"] = native_reason() is None
    found["streams"] = {str(count): rates.pop(str(count)) for count in streams}
    if bandwidth:
        found["bytes_per_token"] = bytes_per_token(path)
        machine, found["bandwidth"] = identify(), []
        for _ in range(repeats):  # rates right after, the caches filled again
            reached = bandwidth_gb_s(machine.cores, min(BANDWIDTH_BYTES, machine.usable_ram_bytes // 16))
            work["decode_tokens_per_s"]()
            found["bandwidth"].append((reached, _rate(work["decode_tokens_per_s"])))
    return {**found, "rates": rates}


def native(folder: Path, *, threads: int, isa: str) -> NativeDecoder | str:
    """The model on the native backend, or why it does not run there. ConfigError for an `isa` that is not here."""
    reason = native_reason()
    if reason is None:
        try:
            room = {"cache_tokens": CACHE_TOKENS, "slots": MAX_STREAMS, "max_ram_bytes": None}
            return NativeDecoder(folder, threads=threads, isa=isa, **room)
        except NotLowered as error:
            reason = str(error)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    if isa != "auto":
        raise ConfigError(f"{folder} cannot run natively, because {reason}; leave out --isa")
    return reason


def _rates(work: Mapping[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Units per second of every workload, in turn, so that a change of the machine's pace meets all of them."""
    for once in work.values():
        once()
    rounds = [{name: _rate(once) for name, once in work.items()} for _ in range(repeats)]
    return {name: [rates[name] for rates in rounds] for name in work}


def _rate(work: Callable[[], int]) -> float:
    start = time.perf_counter()
    units = work()
    return units / (time.perf_counter() - start)


if __name__ == "__main__":
    try:
        answer = measure(**json.loads(sys.argv[1]))
    except GulliverError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    print(json.dumps(answer))
