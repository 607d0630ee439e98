#!/usr/bin/env python3
"""One measurement of our own engine in a process of its own; prints one JSON line. runtime.py calls it.

python benchmarks/runtime_ours.py decode MODEL --prompt 64 --tokens 128
python benchmarks/runtime_ours.py prefill MODEL --prompt 512
python benchmarks/runtime_ours.py cold MODEL --text "…"
python benchmarks/runtime_ours.py quality MODEL --text-file FILE --windows 24 --path native|single|reference
python benchmarks/runtime_ours.py limits
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np

CONTEXT = 1024
WARM_TOKENS = 8


class Sequence:
    """One sequence in a decoder: its first block is block 0, and it has room for `tokens`."""

    def __init__(self, decoder, tokens: int) -> None:
        self.decoder, self.length = decoder, 0
        count = min(decoder.cache_blocks, -(-tokens // decoder.block_tokens))
        self._blocks = np.arange(count, dtype=np.int32)[None]

    def feed(self, tokens, *, all_logits: bool = False):
        """Append tokens int32 [n], as many a step as the decoder takes: float32 logits [1 or n, vocabulary]."""
        from gulliver.runtime.decoder import StepBatch

        answers, most = [], self.decoder.max_rows
        for start in range(0, len(tokens), most):
            chunk = np.asarray(tokens[start : start + most], dtype=np.int32)
            rows = np.arange(len(chunk), dtype=np.int32)
            last = start + len(chunk) == len(tokens)
            wanted = rows if all_logits else rows[-1:] if last else rows[:0]
            logits = self.decoder.step(StepBatch(chunk, self.length + rows, np.zeros_like(rows), self._blocks, wanted))
            self.length += len(chunk)
            if len(chunk) == len(tokens):
                return logits
            answers.append(logits.copy())
        return np.concatenate(answers)


def opened(args: argparse.Namespace, tokens: int):
    """The model's decoder with room for one sequence of `tokens`."""
    from gulliver.runtime.decode import open_decoder

    return open_decoder(args.model, threads=args.threads, cache_tokens=tokens, slots=1)


def some_tokens(decoder, count: int, seed: int):
    """Random tokens int32 [count] from the middle of the vocabulary, where no control tokens stand."""
    low, high = decoder.vocabulary // 50, decoder.vocabulary * 4 // 5
    return np.random.default_rng(seed).integers(low, high, count, dtype=np.int32)


# ---- speed ----------------------------------------------------------------------------------------------------------
def decode(args: argparse.Namespace) -> dict:
    """Tokens per second of greedy decoding at batch 1, from the choice of one token to the logits after the next."""
    decoder = opened(args, args.prompt + args.tokens + WARM_TOKENS)
    sequence = Sequence(decoder, args.prompt + args.tokens + WARM_TOKENS)
    logits = sequence.feed(some_tokens(decoder, args.prompt, args.seed))
    for _ in range(WARM_TOKENS):
        logits = sequence.feed([int(logits[0].argmax())])
    began = time.perf_counter()
    for _ in range(args.tokens):
        logits = sequence.feed([int(logits[0].argmax())])
    seconds = time.perf_counter() - began
    return {"tokens_s": args.tokens / seconds, "backend": decoder.backend, "why": decoder.why}


def prefill(args: argparse.Namespace) -> dict:
    """Tokens per second of one prompt, from its tokens to the logits of its last one, after one prompt to warm up."""
    decoder = opened(args, args.prompt)
    for seed in (args.seed + 1, args.seed):
        tokens = some_tokens(decoder, args.prompt, seed)
        sequence = Sequence(decoder, args.prompt)
        began = time.perf_counter()
        sequence.feed(tokens)
        seconds = time.perf_counter() - began
    return {"tokens_s": args.prompt / seconds, "backend": decoder.backend, "why": decoder.why}


def limits(args: argparse.Namespace) -> dict:
    """What this machine reaches now: GB/s of streaming reads, and the peaks of matrix products."""
    from gulliver.core.machine import identify, measure_machine

    machine = measure_machine(identify())
    names = ("bandwidth_gb_s", "int8_gop_s", "bf16_gflop_s", "fp32_gflop_s")
    return {name: getattr(machine, name) for name in names}


# ---- cold -----------------------------------------------------------------------------------------------------------
def cold(args: argparse.Namespace) -> dict:
    """Seconds from the end of the imports to the first token of a prompt, and the memory held then and at most.

    This is the path that `generate`, `chat` and `serve` take: tokenizer, weights, engine and its thread.
    """
    from gulliver.runtime.batching.engine import Request, Sampling, load_engine

    imported = _memory()["VmRSS"]
    began = time.perf_counter()
    engine = load_engine(args.model, threads=args.threads)
    ready = time.perf_counter()
    ids = engine.text.encode(args.text)
    request = Request(tuple(ids), max_tokens=1, sampling=Sampling(temperature=0.0), ignore_end=True)
    pieces = engine.complete([request])[0]
    done = time.perf_counter()
    held = _memory()
    engine.close()
    return {
        "seconds": done - began,
        "open_seconds": ready - began,
        "first_token_seconds": done - ready,
        "prompt_tokens": len(ids),
        "rss_bytes": held["VmRSS"],
        "peak_rss_bytes": held["VmHWM"],
        "after_imports_bytes": imported,
        "first": "".join(piece.text for piece in pieces),
        "backend": engine.decoder.backend,
    }


def _memory() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    rows = (line.split() for line in lines if line.startswith(("VmRSS:", "VmHWM:")))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in rows}


# ---- quality --------------------------------------------------------------------------------------------------------
def quality(args: argparse.Namespace) -> dict:
    """Perplexity of the first windows of 1024 tokens of a text: every token but a window's first is scored.

    `native` feeds windows as prompts are fed, `single` token by token as they are when a model answers, `reference`
    runs the unpacked weights in float32.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    text = args.text_file.read_text(encoding="utf-8")
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)
    windows = ids[: args.windows * CONTEXT].reshape(-1, CONTEXT)
    score = _reference_losses(args) if args.path == "reference" else _native_losses(args)
    losses = np.array([score(window) for window in windows])
    return {"perplexity": math.exp(losses.mean()), "losses": losses.tolist(), "tokens": losses.size * (CONTEXT - 1)}


def _native_losses(args: argparse.Namespace):
    decoder = opened(args, CONTEXT)
    pace = 1 if args.path == "single" else min(decoder.max_rows, 128)  # logits of 1024 rows would take 200 MB

    def loss(window) -> float:
        sequence, total = Sequence(decoder, CONTEXT), 0.0
        for start in range(0, CONTEXT - 1, pace):
            stop = min(start + pace, CONTEXT - 1)
            logits = sequence.feed(window[start:stop], all_logits=True).astype(np.float64)
            top = logits.max(1)
            chosen = logits[np.arange(stop - start), window[start + 1 : stop + 1]]
            total += float((np.log(np.exp(logits - top[:, None]).sum(1)) + top - chosen).sum())
        return total / (CONTEXT - 1)

    return loss


def _reference_losses(args: argparse.Namespace):
    import torch

    from gulliver.tasks import get_task

    torch.set_num_threads(args.threads)
    model = get_task("language").load(args.model)

    def loss(window) -> float:
        ids = torch.from_numpy(window.astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].float()
            return torch.nn.functional.cross_entropy(logits, ids[1:]).item()

    return loss


PARTS = {one.__name__: one for one in (decode, prefill, limits, cold, quality)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", default="")
    parser.add_argument("--text-file", type=Path)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--path", choices=("native", "single", "reference"), default="native")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    print(json.dumps(PARTS[args.part](args)))


if __name__ == "__main__":
    main()
