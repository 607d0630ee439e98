#!/usr/bin/env python3
"""Our bare engine without HTTP in a process of its own: one JSON request a line on stdin, one answer a line on stdout.

    python benchmarks/runtime_engine.py MODEL [--no-lookup] [--no-reuse]

A request is {"prompts": [text or messages, …], "tokens": N}: all are submitted at once and decoded greedily for exactly
N tokens. The answer is {"seconds", "tokens_s", "first_token_seconds", "texts", "stats"}.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path


class BareEngine:
    """runtime_engine.py as a process: `with BareEngine(model, …) as engine: engine.ask([prompt], 128)`."""

    script = Path(__file__)

    def __init__(self, model: Path, *options: object, threads: int) -> None:
        words = (sys.executable, self.script, model, "--threads", threads, *options)
        self._command = [str(word) for word in words]

    def __enter__(self) -> BareEngine:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, prompts: Sequence[object], tokens: int) -> dict:
        """Put these prompts (texts, or lists of messages) through the engine at once."""
        return self.answer_to({"prompts": prompts, "tokens": tokens})

    def answer_to(self, asked: dict) -> dict:
        """Send one request, read one answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self._command)}: ended with {self._process.wait()}")
        return json.loads(line)


def serve(args: argparse.Namespace) -> None:
    """Answer requests until stdin ends."""
    from gulliver.runtime.batching.engine import load_engine

    switches = {"lookup": args.lookup, "reuse": args.reuse}
    engine = load_engine(args.model, threads=args.threads, **{name: on for name, on in switches.items() if not on})
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(answered(engine, asked["prompts"], asked["tokens"])), flush=True)
    engine.close()


def answered(engine, prompts: Sequence[object], tokens: int) -> dict:
    """Submit all prompts and wait for all answers. RuntimeError when one ends before its time."""
    from gulliver.runtime.batching.engine import Request, Sampling

    ids = [engine.text.encode(one) if isinstance(one, str) else engine.text.encode_chat(one) for one in prompts]
    answers = [_Answer() for _ in prompts]
    began = time.perf_counter()
    for prompt, one in zip(ids, answers, strict=True):
        request = Request(tuple(prompt), max_tokens=tokens, sampling=Sampling(temperature=0.0), ignore_end=True)
        engine.submit(request, one.take)
    for one in answers:
        one.ended.wait()
    seconds = time.perf_counter() - began
    wrong = [one.finish for one in answers if one.finish != "length"]
    if wrong:
        raise RuntimeError(f"an answer ended with {wrong[0]!r} instead of its length")
    return {
        "seconds": seconds,
        "tokens_s": tokens * len(prompts) / seconds,
        "prompt_tokens": [len(one) for one in ids],
        "first_token_seconds": [one.first - began for one in answers],
        "texts": ["".join(one.texts) for one in answers],
        "stats": engine.stats(),
    }


class _Answer:
    """Takes what the engine delivers, in its thread."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.first = 0.0
        self.finish: str | None = None
        self.ended = threading.Event()

    def take(self, piece) -> None:
        self.first = self.first or time.perf_counter()
        self.texts.append(piece.text)
        if piece.finish is not None:
            self.finish = piece.finish
            self.ended.set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-lookup", dest="lookup", action="store_false", help="draft nothing by prompt lookup")
    parser.add_argument("--no-reuse", dest="reuse", action="store_false", help="compute every prompt anew")
    serve(parser.parse_args())


if __name__ == "__main__":
    main()
