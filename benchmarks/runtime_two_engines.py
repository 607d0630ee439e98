#!/usr/bin/env python3
"""Two engines of one process, each with a model of its own, under load at once and one after the other.

    python benchmarks/runtime_two_engines.py MODEL

A part of runtime.py, and the process that it measures: one JSON request a line on stdin, one answer a line on stdout. A
request is {"prompts": [those of the first engine, those of the second], "tokens": N, "at_once": true or false}; every
prompt is decoded greedily for exactly N tokens. The answer is {"seconds", "tokens_s"} of all together.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runtime_common import in_turn, text_of
from runtime_engine import BareEngine, answered

STREAMS = (1, 16)
"""Streams of each engine, by workload."""
WORDS = 32


class TwoEngines(BareEngine):
    """This file as a process."""

    script = Path(__file__)


def two(args: argparse.Namespace) -> dict:
    """Total tokens per second of two engines under load at once over that of the same work one after the other."""
    workloads = {}
    with TwoEngines(args.model, threads=args.threads) as engines:
        for streams in STREAMS:
            tokens = args.tokens if streams == 1 else args.tokens // 2

            def run(at_once: bool, index: int, streams=streams, tokens=tokens) -> float:
                texts = [text_of(WORDS, 1000 * index + number) for number in range(2 * streams)]
                asked = {"prompts": [texts[:streams], texts[streams:]], "tokens": tokens, "at_once": at_once}
                return engines.answer_to(asked)["tokens_s"]

            run(True, args.rounds)  # the first requests of an engine are slower
            rounds = in_turn(
                {
                    "at once": lambda index, run=run: run(True, index),
                    "in turn": lambda index, run=run: run(False, index),
                },
                args.rounds,
            )
            row = rounds.row(["at once"])
            workloads[f"{streams} + {streams} streams"] = {
                "engines": row["engines"],
                "ratio": row["ratios"]["at once"]["in turn"],
                "tokens": tokens,
            }
    return {"workloads": workloads}


def serve(args: argparse.Namespace) -> None:
    """Answer requests until stdin ends."""
    from gulliver.runtime.batching.engine import load_engine

    # The same prompts come twice, at once and in turn: neither side may remember the other's.
    engines = [load_engine(args.model, threads=args.threads, lookup=False, reuse=False) for _ in range(2)]
    with ThreadPoolExecutor(len(engines)) as threads:
        for line in sys.stdin:
            asked = json.loads(line)
            began = time.perf_counter()
            each = threads.map if asked["at_once"] else map
            list(
                each(
                    lambda engine, prompts, asked=asked: answered(engine, prompts, asked["tokens"]),
                    engines,
                    asked["prompts"],
                )
            )
            seconds = time.perf_counter() - began
            count = asked["tokens"] * sum(map(len, asked["prompts"]))
            print(json.dumps({"seconds": seconds, "tokens_s": count / seconds}), flush=True)
    for engine in engines:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    serve(parser.parse_args())


if __name__ == "__main__":
    main()
