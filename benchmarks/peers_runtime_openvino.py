#!/usr/bin/env python3
"""OpenVINO GenAI as a peer of the runtime: an environment of its own outside the repository, its model, its speed.

    python benchmarks/peers_runtime_openvino.py build --peers PEERS --parent HF_DIR
    PEERS/ov-venv/bin/python benchmarks/peers_runtime_openvino.py measure --folder PEERS/ov-int4-g64 --prompt 512

`build` makes PEERS/ov-venv and converts the parent with optimum-intel: int4 in groups of 64, an int8 embedding that is
the head as well. `measure` runs in that environment and prints one JSON line; it imports nothing of Gulliver.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("openvino-genai", "openvino-tokenizers", "nncf", "optimum-intel", "sentencepiece")
EXPORT = ("--task", "text-generation-with-past", "--weight-format", "int4", "--group-size", "64", "--ratio", "1.0")
FIRST_WORD, LAST_WORD = 1000, 40000


@dataclass(frozen=True)
class OpenVino:
    """OpenVINO GenAI and its model in a folder of peers."""

    peers: Path

    @property
    def python(self) -> Path:
        return self.peers / "ov-venv" / "bin" / "python"

    @property
    def folder(self) -> Path:
        return self.peers / "ov-int4-g64"

    def command(self, *, prompt: int, tokens: int, threads: int) -> list[object]:
        sizes = ["--prompt", prompt, "--tokens", tokens, "--threads", threads]
        return [self.python, Path(__file__), "measure", "--folder", self.folder, *sizes]


def build(args: argparse.Namespace) -> None:
    """Environment and model; what is there stays."""
    peer = OpenVino(args.peers.resolve())
    if not peer.python.exists():
        _run(sys.executable, "-m", "venv", peer.python.parent.parent)
        _run(peer.python, "-m", "pip", "install", "--quiet", *PACKAGES)
    if not (peer.folder / "openvino_model.bin").exists():
        tool = peer.python.with_name("optimum-cli")
        _run(tool, "export", "openvino", "--model", args.parent, *EXPORT, peer.folder)
    _run(*peer.command(prompt=20, tokens=16, threads=1))


def measure(args: argparse.Namespace) -> None:
    """Tokens per second of prefill (to the first new token) and of decode, after one generation to warm up.

    Each generation has a prompt of its own: the pipeline keeps prompts, and would answer a known one at once.
    """
    import numpy
    import openvino
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(str(args.folder), "CPU", INFERENCE_NUM_THREADS=args.threads)
    for seed in range(2):
        ids = [random.Random(seed).randrange(FIRST_WORD, LAST_WORD) for _ in range(args.prompt)]
        tensor = openvino.Tensor(numpy.array([ids], dtype=numpy.int64))
        began = time.perf_counter()
        result = pipeline.generate(tensor, max_new_tokens=args.tokens, do_sample=False, ignore_eos=True)
        seconds = time.perf_counter() - began
    metrics = result.perf_metrics
    first_ms, each_ms = metrics.get_ttft().mean, metrics.get_tpot().mean
    told = openvino_genai.LLMPipeline.get_tokenizer(pipeline).decode(_greedy(pipeline, openvino, numpy))
    print(
        json.dumps(
            {
                "prefill_tokens_s": 1000 * args.prompt / first_ms,
                "decode_tokens_s": 1000 / each_ms if args.tokens > 1 else None,
                "generated": len(result.tokens[0]),
                "seconds": seconds,
                "says": told,
                "version": openvino_genai.__version__,
            }
        )
    )


def _greedy(pipeline, openvino, numpy) -> list[int]:
    """Twelve tokens after "The capital of France is": shows that the model is whole."""
    ids = pipeline.get_tokenizer().encode("The capital of France is").input_ids.data
    result = pipeline.generate(openvino.Tensor(numpy.array(ids)), max_new_tokens=12, do_sample=False)
    return list(result.tokens[0])


def _run(*command: object) -> None:
    words = [str(word) for word in command]
    code = subprocess.run(words).returncode
    if code:
        raise SystemExit(f"{' '.join(words)}: exit {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    one = parts.add_parser("build", help=build.__doc__)
    one.set_defaults(act=build)
    one.add_argument("--peers", type=Path, required=True)
    one.add_argument("--parent", type=Path, required=True)
    one = parts.add_parser("measure", help="one measurement")
    one.set_defaults(act=measure)
    one.add_argument("--folder", type=Path, required=True)
    one.add_argument("--prompt", type=int, default=512)
    one.add_argument("--tokens", type=int, default=1)
    one.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.act(args)


if __name__ == "__main__":
    main()
