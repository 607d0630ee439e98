"""What the parts of runtime.py share: engines measured in turn, their statistics, and what else used the machine.

An absolute figure drifts with the day; a ratio within one round does not. So engines are measured in turn, round after
round, each round beginning with another engine, and a claim is the median of the rounds' ratios. This process stays
small and idle while it measures: every measurement is a process of its own.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
FITTED, EIGHT, LARGE, OPENVINO = "gulliver fitted", "gulliver 8-bit", "gulliver large", "OpenVINO GenAI int4"
"""What engines are called in results; llama.cpp's are `llama_name(type)`."""
CONFIDENCE = 0.95
MAX_OTHERS = 0.05
"""Share of the machine that others may use during a part before its row is called noisy."""
WORDS = (
    "time", "person", "year", "way", "day", "thing", "man", "world", "life", "hand", "part", "child", "eye", "woman",
    "place", "work", "week", "case", "point", "company", "number", "group", "problem", "fact", "water", "room",
    "mother", "area", "money", "story", "month", "lot", "right", "study", "book", "word", "business", "issue", "side",
    "kind", "head", "house", "service", "friend", "father", "power", "hour", "game", "line", "end", "member", "law",
    "car", "city", "name", "team", "minute", "idea", "body", "back",
)  # fmt: skip


# ---- statistics -----------------------------------------------------------------------------------------------------
def summary(values: Sequence[float]) -> dict:
    """{median, low, high, n, confidence}: the interval of the median by order statistics, free of distributions.

    The narrowest one with at least 95 %; with fewer than six values that is out of reach, and the interval is their
    range: `confidence` says what it then has.
    """
    if not values:
        raise ValueError("no values to summarise")
    ordered, count = sorted(values), len(values)
    cut = max((k for k in range((count + 1) // 2) if _coverage(count, k) >= CONFIDENCE), default=0)
    return {
        "median": rounded(statistics.median(ordered)),
        "low": rounded(ordered[cut]),
        "high": rounded(ordered[count - 1 - cut]),
        "n": count,
        "confidence": round(_coverage(count, cut), 4),
    }


def _coverage(count: int, cut: int) -> float:
    """Chance that the median lies between the order statistics left when `cut` values go at each end."""
    return 1 - 2 * sum(math.comb(count, k) for k in range(cut + 1)) / 2**count


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict:
    """Summary of ours / theirs, round by round."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} rounds of ours and {len(theirs)} of theirs are no pairs")
    return summary([mine / other for mine, other in zip(ours, theirs, strict=True)])


def slope(times: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope of values over times, and its standard error. At least three points."""
    count, mean_time, mean_value = len(times), statistics.fmean(times), statistics.fmean(values)
    spread = sum((one - mean_time) ** 2 for one in times)
    if count < 3 or not spread:
        raise ValueError(f"{count} points give no slope with an error")
    steep = sum((t - mean_time) * (v - mean_value) for t, v in zip(times, values, strict=True)) / spread
    left = sum((v - mean_value - steep * (t - mean_time)) ** 2 for t, v in zip(times, values, strict=True))
    return steep, math.sqrt(left / (count - 2) / spread)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def rounded(value: float, digits: int = 5) -> float:
    """`value` to so many significant digits."""
    return float(f"{value:.{digits}g}")


def llama_name(kind: str) -> str:
    """What llama.cpp with a file of this type is called in results."""
    return f"llama.cpp {kind}"


# ---- rounds ---------------------------------------------------------------------------------------------------------
@dataclass
class Rounds:
    """What each engine reached in each round: {engine: [value of round 0, …]}."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def row(self, ours: Sequence[str] = ()) -> dict:
        """For a result: the summary of each engine, and that of `ours` over every other one, round by round."""
        peers = [name for name in self.values if name not in ours]
        ratios = {mine: {peer: paired(self.values[mine], self.values[peer]) for peer in peers} for mine in ours}
        return {"engines": {name: summary(values) for name, values in self.values.items()}, "ratios": ratios}


def in_turn(engines: Mapping[str, Callable[[int], float]], count: int) -> Rounds:
    """Every engine once a round, for `count` rounds; round r begins with engine r. An engine is given its round."""
    rounds, names = Rounds({name: [] for name in engines}), list(engines)
    for index in range(count):
        start = index % len(names)
        for name in names[start:] + names[:start]:
            value = engines[name](index)
            rounds.values[name].append(value)
            print(f"round {index + 1}/{count} {name}: {value:.5g}", file=sys.stderr, flush=True)
    return rounds


# ---- the machine ----------------------------------------------------------------------------------------------------
class Watch:
    """What others took of the machine meanwhile: `with Watch() as watch: …`, then `watch.row`.

    Our own time is that of this process and of the children it has waited for, so end every server inside the block.
    """

    def __enter__(self) -> Watch:
        self._began, self._busy, self._stolen, self._own = time.monotonic(), *_machine_seconds(), _own_seconds()
        self.row: dict = {}
        return self

    def __exit__(self, *_: object) -> None:
        wall = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        busy, stolen = _machine_seconds()
        others = (busy - self._busy) - (_own_seconds() - self._own)
        self.row = {
            "wall_seconds": round(time.monotonic() - self._began, 1),
            "others_share": round(max(0.0, others) / wall, 4),
            "stolen_share": round((stolen - self._stolen) / wall, 4),
        }


def noisy(row: Mapping) -> bool:
    """Whether others used so much of the machine that the row's figures are not to be trusted."""
    return row["others_share"] + row["stolen_share"] > MAX_OTHERS


def _machine_seconds() -> tuple[float, float]:
    """CPU seconds that the machine was busy, and those that its host kept for itself, since it started."""
    text = Path("/proc/stat")
    if not text.exists():
        return 0.0, 0.0
    ticks = [int(word) for word in text.read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _, _, interrupt, soft_interrupt, stolen = ticks
    per_second = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + interrupt + soft_interrupt) / per_second, stolen / per_second


def _own_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


# ---- processes ------------------------------------------------------------------------------------------------------
def answer(*command: object, seconds: float = 600) -> dict:
    """The JSON document that a command prints last. Ends the program, with what it said, when it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=seconds)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit {done.returncode}\n{done.stderr[-3000:]}{done.stdout[-1000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(*words: object, seconds: float = 600) -> dict:
    """What runtime_ours.py measures, in a new process."""
    return answer(sys.executable, HERE / "runtime_ours.py", *words, seconds=seconds)


def text_of(words: int, seed: int) -> str:
    """A prompt of so many common words, another for each seed, so that no cache of prompts can help."""
    return "Write about " + " ".join(random.Random(seed).choices(WORDS, k=words))


def weight_bytes(folder: Path) -> int:
    """Bytes of a model's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
