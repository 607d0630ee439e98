"""How fast a model answers here, and in how much memory: `gulliver.bench` and `gulliver bench`.

Rates and the share of the bandwidth limit come from the same code as the step `speed`; a cold start is `gulliver
generate` itself in a process of its own.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from math import comb
from pathlib import Path
from typing import Any

from gulliver.audit.measure import in_fresh_process, printed
from gulliver.core.errors import ConfigError
from gulliver.core.progress import Progress
from gulliver.core.store.artifact import open_artifact
from gulliver.core.store.intact import require_intact
from gulliver.core.store.manifest import MANIFEST
from gulliver.nets.files import weight_files
from gulliver.pipeline.ask import open_store, resolved
from gulliver.pipeline.spec import Spec, local_folder
from gulliver.runtime.decode import check_forced

STREAMS = (1, 4, 16)
COLD_STARTS = 5
TWENTY_TOKENS = "Every evening the old man walked to the end of the pier, sat down on the bench and watched"
CONFIDENCE = 0.95


def bench(
    model: Spec,
    *,
    repeats: int = 9,
    threads: int | None = None,
    isa: str = "auto",
    home: Path | str | None = None,
    store: Callable[[], Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Speed and memory as a JSON object; every number is a median with the interval that `summary` describes.

    "prefill_tokens_per_s" (512 tokens) and "decode_tokens_per_s"; "streams": tokens per second of 1, 4 and 16 sequences
    together; "bandwidth": GB/s of reads, bytes of weights that a token reads, and the share of that limit which decode
    reaches; "cold": seconds and memory of a new process up to the first token of a prompt of about 20 tokens. Streams
    and bandwidth are None on the reference backend; "why" is the reason for it. ConfigError for fewer than two repeats.
    """
    if repeats < 2:
        raise ConfigError(f"repeats is {repeats}; an interval needs at least 2, one of 95 % needs 6")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}; it must be at least 1")
    check_forced("auto", isa)
    progress = progress or Progress()
    folder, task = local_folder(model) or resolved(model, store or (lambda: open_store(home)), progress)
    if (folder / MANIFEST).is_file():
        require_intact(open_artifact(folder))
    with progress.stage("speed", 1, "model") as bar:
        request = {"folder": str(folder), "task": task, "repeats": repeats, "threads": threads, "isa": isa}
        found = in_fresh_process({**request, "streams": STREAMS, "bandwidth": True})
        bar.advance()
    document = _document(found, folder)
    if "decode_tokens_per_s" in found["rates"]:
        starts = []
        with progress.stage("cold start", COLD_STARTS, "start") as bar:
            for _ in range(COLD_STARTS):
                starts.append(_cold(folder, found["threads"], isa))
                bar.advance()
        document["cold"] = _summed(starts, document["file_bytes"])
    return document


def _document(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    share, file_bytes = None, sum(path.stat().st_size for path in weight_files(folder))
    if "bandwidth" in found:
        size, pairs = found["bytes_per_token"], found["bandwidth"]
        share = {
            "gb_per_s": summary([reached for reached, _ in pairs]),
            "bytes_per_token": size,
            "decode_share": summary([rate * size / (reached * 1e9) for reached, rate in pairs]),
        }
    return {
        "model": str(folder),
        **{name: found[name] for name in ("backend", "why", "threads")},
        "file_bytes": file_bytes,
        **{name: summary(rates) for name, rates in found["rates"].items()},
        "streams": {name: summary(rates) for name, rates in found["streams"].items()} or None,
        "bandwidth": share,
        "memory": {
            "load_ram_bytes": found["load_ram_bytes"],
            "peak_ram_bytes": found["peak_ram_bytes"],
            "peak_beyond_file_bytes": found["peak_ram_bytes"] - file_bytes,
        },
        "cold": None,
    }


def _cold(folder: Path, threads: int, isa: str) -> dict[str, Any]:
    """What `gulliver generate` says of itself in a new process that answers with one token."""
    command = [sys.executable, "-m", "gulliver", "generate", str(folder), "--prompt", TWENTY_TOKENS, "--raw"]
    command += ["--max-tokens", "1", "--temperature", "0", "--threads", str(threads), "--isa", isa, "--json", "--quiet"]
    return printed(command, f"a cold start of {folder}")


def _summed(starts: Sequence[dict[str, Any]], file_bytes: int) -> dict[str, Any]:
    first = [start["load_seconds"] + start["timings"]["first_token_seconds"] for start in starts]
    process = [start["process_seconds"] for start in starts if start["process_seconds"] is not None]
    return {
        "prompt_tokens": starts[0]["prompt_tokens"],
        "load_seconds": summary([start["load_seconds"] for start in starts]),
        "first_token_seconds": summary(first),
        "process_seconds": summary(process) if process else None,
        "rss_bytes": summary([start["rss_bytes"] for start in starts]),
        "rss_beyond_file_bytes": summary([start["rss_bytes"] - file_bytes for start in starts]),
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """{median, low, high, n, confidence}: the interval of the median by order statistics, free of distributions.

    It is the narrowest one with at least 95 %; with fewer than six values that is out of reach, and the interval is
    their range: `confidence` says what it then has.
    """
    ordered, count = sorted(values), len(values)
    cut = max((place for place in range((count + 1) // 2) if _coverage(count, place) >= CONFIDENCE), default=0)
    median, low, high = statistics.median(ordered), ordered[cut], ordered[count - 1 - cut]
    return {"median": median, "low": low, "high": high, "n": count, "confidence": round(_coverage(count, cut), 4)}


def _coverage(count: int, cut: int) -> float:
    """Chance that the median lies between the order statistics left when `cut` values go at each end."""
    return 1 - 2 * sum(comb(count, place) for place in range(cut + 1)) / 2**count
