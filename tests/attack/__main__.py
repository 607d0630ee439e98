"""`make attack`: a tiny model is served on loopback, a steady stream is measured, and every attack of rows.py is run.

    python -m attack [--seconds 3] [--requests 200] [--only WORD] [--serve MODEL]

Printed for each attack: the steady stream's p99 gap, its ratio to the quiet one and its longest gap; the memory that
the server holds beyond its start; and what it answered, "hung" where nothing came in 40 s. The exit code is 1 when a
request hung, a status was 5xx other than 503 and 504, the server stood still, the p99 gap was above 5 times the quiet
one, or memory grew by more than 50 MB, in one row or in all. A server that hangs is killed and started again, so that
all rows are run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from attack.client import HUNG, request, sends, tried
from attack.rows import ATTACKS, HOSTILE, MODEL, PLAIN, Attack
from attack.steady import gaps_between, stream

MOST_RATIO, MOST_GROWTH_BYTES = 5.0, 50 * 10**6
ADDRESS_SPACE_BYTES = 8 * 2**30  # of the server: an attack on memory must not reach the rest of the machine
QUIET_SECONDS = 4.0
SETTLE_SECONDS = 1.0


@dataclass
class Served:
    """A server process and the steady stream beside it."""

    folder: Path
    models: list[str]
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    steady: multiprocessing.Process | None = None
    start_bytes: int = 0
    times: Path = field(init=False)

    def __post_init__(self) -> None:
        self.times = self.folder / "times"
        self.log = open(self.folder / "server.log", "ab")  # noqa: SIM115 (open until the end)

    def start(self) -> None:
        """Start both and wait until tokens come."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = [sys.executable, "-m", "gulliver", "serve", *self.models, "--port", str(self.port)]
        words += ["--home", str(self.folder / "home"), "--threads", "1", "--timeout", "15", "--grace", "1"]
        limits = (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES)
        self.process = subprocess.Popen(
            words, stderr=self.log, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limits)
        )
        until(self.healthy, 60, "the server did not start")
        self.times.write_bytes(b"")
        self.steady = multiprocessing.get_context("spawn").Process(
            target=stream, args=(self.port, MODEL, str(self.times)), daemon=True
        )
        self.steady.start()
        until(lambda: self.times.stat().st_size > 800, 60, "the steady stream did not begin")
        self.start_bytes = self.rss_bytes()

    def stop(self) -> None:
        """Kill both."""
        for one in (self.steady, self.process):
            if one is not None:
                one.kill()
        if self.process is not None:
            self.process.wait()

    def healthy(self) -> bool:
        """Whether /healthz answers within 5 seconds."""
        if self.process is None or self.process.poll() is not None:
            return False
        return asyncio.run(tried(sends(request("GET", "/healthz")), self.port, 0, 5.0)) == 200

    def rss_bytes(self) -> int:
        """Memory that the server process holds."""
        assert self.process is not None
        with contextlib.suppress(OSError, TypeError):
            text = Path(f"/proc/{self.process.pid}/status").read_text()
            return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) * 1024  # type: ignore[index]
        return 0


def until(true: object, seconds: float, told: str) -> None:
    """Wait; SystemExit when it takes too long."""
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        if time.monotonic() > end:
            raise SystemExit(told)
        time.sleep(0.05)


async def run(attack: Attack, port: int, seconds: float, most: int) -> Counter[int]:
    """All attempts of one attack, by outcome: at most `most`, begun within `seconds`; a hung one ends it."""
    outcomes: Counter[int] = Counter()
    numbers = iter(range(most))
    end = time.monotonic() + seconds

    async def worker() -> None:
        for number in numbers:
            outcomes[await tried(attack.act, port, number)] += 1
            if time.monotonic() > end or outcomes[HUNG]:
                return

    await asyncio.gather(*(worker() for _ in range(min(attack.workers, most))))
    return outcomes


def p99(gaps: list[float]) -> float:
    """The 99th percentile in milliseconds; 0 for none."""
    return 1000 * sorted(gaps)[int(0.99 * (len(gaps) - 1))] if gaps else 0.0


def shown(outcomes: Counter[int]) -> str:
    """ "200 x12, closed x3"."""
    names = {HUNG: "hung", 0: "closed"}
    return ", ".join(f"{names.get(status, status)} x{count}" for status, count in outcomes.most_common(4))


def faults(outcomes: Counter[int], ratio: float, growth: float, alive: bool) -> list[str]:
    """What of the promises was broken."""
    bad = sorted(status for status in outcomes if status >= 500 and status not in (503, 504))
    found = [f"status {status}" for status in bad]
    found += ["hung"] if outcomes[HUNG] else []
    found += [] if alive else ["the server stands still"]
    found += [f"p99 x{ratio:.1f}"] if ratio > MOST_RATIO else []
    return found + ([f"memory +{growth / 1e6:.0f} MB"] if growth > MOST_GROWTH_BYTES else [])


def attacked(served: Served, attack: Attack, quiet: float, args: argparse.Namespace) -> list[str]:
    """Run one row and print its line; what it broke."""
    began, before = time.monotonic(), served.rss_bytes()
    outcomes = asyncio.run(run(attack, served.port, args.seconds, args.requests))
    time.sleep(SETTLE_SECONDS)
    gaps = gaps_between(served.times, began, time.monotonic())
    alive, now = served.healthy(), served.rss_bytes()
    late, growth = p99(gaps), now - served.start_bytes
    broken = faults(outcomes, late / quiet if quiet else 0.0, now - before, alive)
    figures = f"{late:8.1f} {late / quiet:6.1f} {1000 * max(gaps, default=0):9.1f} {growth / 1e6:7.1f}"
    print(f"{attack.name:36} {figures}  {shown(outcomes):34} {'; '.join(broken)}", flush=True)
    if not alive or outcomes[HUNG]:
        served.stop()
        served.start()
    return broken


@contextlib.contextmanager
def models(spec: str | None) -> Iterator[tuple[Path, list[str]]]:
    """A folder to work in, and what is served: `spec` or a random tiny Llama, and one with a hostile template."""
    from language_samples import write_causal

    with tempfile.TemporaryDirectory(prefix="gulliver-attack-") as name:
        folder = Path(name)
        for model, template in (("tiny", PLAIN), ("hostile", HOSTILE)):
            path = write_causal(folder / model, max_position_embeddings=2048) / "tokenizer_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
        yield folder, [f"{MODEL}={spec or folder / 'tiny'}", f"hostile={folder / 'hostile'}"]


def main() -> int:
    """0 when every promise held."""
    parser = argparse.ArgumentParser(prog="attack", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="time in which attempts of one attack begin")
    parser.add_argument("--requests", type=int, default=250, help="most attempts of one attack")
    parser.add_argument("--only", default="", help="attacks whose name holds this")
    parser.add_argument(
        "--serve", default=None, metavar="MODEL", help="what is attacked (default: a random tiny model)"
    )
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    broken: list[str] = []
    with models(args.serve) as (folder, specs):
        served = Served(folder, specs)
        try:
            served.start()
            began = time.monotonic()
            time.sleep(QUIET_SECONDS)
            quiet = p99(gaps_between(served.times, began, time.monotonic()))
            print(f"quiet: p99 gap {quiet:.1f} ms, {served.start_bytes / 1e6:.0f} MB; {os.cpu_count()} cores")
            print(f"{'attack':36} {'p99 ms':>8} {'x':>6} {'worst ms':>9} {'MB more':>7}  answers")
            for attack in ATTACKS:
                if args.only in attack.name and attacked(served, attack, quiet, args):
                    broken.append(attack.name)
            growth = served.rss_bytes() - served.start_bytes
            print(f"at the end the server holds {growth / 1e6:.0f} MB more than at its start")
            if growth > MOST_GROWTH_BYTES:
                broken.append("all together")
        finally:
            served.stop()
    print(f"{len(broken)} attacks did harm: {', '.join(broken)}" if broken else "every attack was held")
    return int(bool(broken))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
