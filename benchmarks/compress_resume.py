"""Kill a compression at random instants, run it again, and see whether it makes the same bytes."""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
from pathlib import Path

from compress_common import Done, command_line, gulliver

MAX_ROUNDS_PER_KILL = 3


def resume_row(model: object, texts: tuple[Path, Path], folder: Path, args: argparse.Namespace) -> dict:
    """Row of the result: what an uninterrupted run made, and the runs that were killed `args.kills` times in all.

    A run that ends before all kills have landed is followed by another in a new home.
    """
    few = ["--examples", args.examples, "--tokens", args.tokens]
    whole = _run(model, texts, few, folder / "whole", None)
    limits = {name: done.seconds for name, done in whole["done"].items()}
    choose, kills, rounds = random.Random(args.seed), [], []
    while len(kills) < args.kills:
        if len(rounds) >= MAX_ROUNDS_PER_KILL * args.kills:
            raise SystemExit(f"only {len(kills)} of {args.kills} kills landed in {len(rounds)} runs")
        killer = Killer(choose, limits, args.kills - len(kills))
        rounds.append(_run(model, texts, few, folder / f"killed-{len(rounds)}", killer)["ids"])
        kills += killer.landed
    return {
        "kills": len(kills),
        "kills_amid_work": sum(kill["amid_work"] for kill in kills),
        "landed": kills,
        "runs": len(rounds),
        "identical": all(ids == whole["ids"] for ids in rounds),
        "ids": whole["ids"],
        "ids_of_killed_runs": rounds,
        "examples": args.examples,
        "tokens": args.tokens,
        "seconds": round(sum(limits.values()), 1),
        "peak_rss_bytes": max(done.peak_rss_bytes for done in whole["done"].values()),
    }


class Killer:
    """Starts a command and kills its whole process group after a random time, until `left` kills have landed.

    `limits` are the seconds that each command takes undisturbed; instants are even between 0 and that.
    """

    def __init__(self, choose: random.Random, limits: dict[str, float], left: int) -> None:
        self._choose, self._limits, self._left = choose, limits, left
        self.landed: list[dict] = []

    def until_done(self, *words: object, home: Path) -> Done:
        name = str(words[0])
        while self._left:
            instant = self._choose.uniform(0, self._limits[name])
            process = subprocess.Popen(
                command_line(*words, home=home), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            try:
                process.wait(timeout=instant)
                break  # it was done before; the same command below says what it made
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the group is still this one
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            if process.wait() != -signal.SIGKILL:
                break
            amid = any(path.is_file() for path in (home / "work").rglob("*"))
            self._left -= 1
            self.landed.append({"command": name, "after_seconds": round(instant, 2), "amid_work": amid})
        return gulliver(*words, home=home)


def _run(model: object, texts: tuple[Path, Path], few: list, home: Path, killer: Killer | None) -> dict:
    """Ids of calibration and packed model made in `home`, and the commands; `killer` disturbs them."""
    parent = gulliver("pull", model, home=home).document["id"]
    data = gulliver("read", texts[0], "--eval-data", texts[1], home=home).document["id"]
    start = killer.until_done if killer else gulliver
    calibrated = start("calibrate", parent, "--data", data, *few, home=home)
    statistics = calibrated.document["id"]
    quantized = start("quantize", parent, "--calibration", statistics, home=home)
    ids = {"calibrate": statistics, "quantize": quantized.document["id"]}
    return {"ids": ids, "done": {"calibrate": calibrated, "quantize": quantized}}
