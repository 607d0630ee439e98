"""Parts of runtime.py without HTTP: decode, bandwidth, prefill, cold start, and what native arithmetic costs."""

from __future__ import annotations

import argparse
import math
import statistics

from peers_runtime_llama import Llama
from peers_runtime_openvino import OpenVino
from runtime_common import (
    EIGHT,
    FITTED,
    LARGE,
    OPENVINO,
    answer,
    in_turn,
    llama_name,
    ours,
    rounded,
    summary,
    weight_bytes,
)
from runtime_models import bytes_per_token, eight_bit_model, large_model, prefill_operations
from scipy.special import stdtrit

LARGE_PEER = "llama.cpp large Q4_0"
DEPTH = 64
TWENTY_TOKENS = "Every evening the old man walked to the end of the pier, sat down on the bench and watched"


# ---- decode ---------------------------------------------------------------------------------------------------------
def decode(args: argparse.Namespace) -> dict:
    """Tokens per second at batch 1 after a prompt of 64 tokens: ours and llama.cpp's types, in turn."""
    llama, paths = Llama(args.peers), {}

    def own(name: str, folder):
        def run(index: int) -> float:
            found = ours("decode", folder, "--threads", args.threads, "--prompt", DEPTH, "--tokens", args.tokens,
                         "--seed", index)  # fmt: skip
            paths[name] = found["backend"]
            return found["tokens_s"]

        return run

    def peer(kind: str):
        return lambda _: llama.tokens_per_second(kind, tokens=args.tokens, depth=DEPTH, threads=args.threads)

    eight = eight_bit_model(args)
    engines = {FITTED: own(FITTED, args.model), EIGHT: own(EIGHT, eight)}
    engines |= {llama_name(kind): peer(kind) for kind in ("Q4_K_M", "Q4_0", "Q8_0")}
    sizes = {FITTED: weight_bytes(args.model), EIGHT: weight_bytes(eight)}
    sizes |= {llama_name(kind): llama.file(kind).stat().st_size for kind in ("Q4_K_M", "Q4_0", "Q8_0")}
    rounds = in_turn(engines, args.rounds)
    return {**rounds.row([FITTED, EIGHT]), "size_bytes": sizes, "tokens": args.tokens, "prompt": DEPTH, "path": paths}


# ---- bandwidth ------------------------------------------------------------------------------------------------------
def bandwidth(args: argparse.Namespace) -> dict:
    """Share of the bandwidth limit, batch 1: tokens per second × bytes of weights a token ÷ GB/s read in that round.

    The cache that attention reads, too, is left out, so the share is understated by one or two per cent.
    """
    llama, large = Llama(args.peers), large_model(args)
    sizes = {LARGE: bytes_per_token(large), FITTED: bytes_per_token(args.model)}

    def own(folder):
        return lambda index: ours("decode", folder, "--threads", args.threads, "--prompt", 16, "--tokens",
                                  args.tokens, "--seed", index)["tokens_s"]  # fmt: skip

    engines = {
        "limit": lambda _: ours("limits")["bandwidth_gb_s"],
        LARGE: own(large),
        FITTED: own(args.model),
    }
    file = llama.file("Q4_0", "large")
    if file.exists():
        sizes[LARGE_PEER] = file.stat().st_size
        engines[LARGE_PEER] = lambda _: llama.tokens_per_second(
            "Q4_0", tokens=args.tokens, depth=16, threads=args.threads, name="large"
        )
    values = in_turn(engines, args.rounds).values
    shares = {
        name: summary([speed * size / limit / 1e9 for speed, limit in zip(values[name], values["limit"], strict=True)])
        for name, size in sizes.items()
    }
    return {
        "share": shares,
        "bytes_per_token": sizes,
        "bandwidth_gb_s": summary(values["limit"]),
        "engines": {name: summary(values[name]) for name in sizes},
    }


# ---- prefill --------------------------------------------------------------------------------------------------------
def prefill(args: argparse.Namespace) -> dict:
    """Tokens per second of a prompt: ours, llama.cpp and OpenVINO, in turn; and the share of the machine's peaks."""
    llama, openvino, found = Llama(args.peers), OpenVino(args.peers), {}

    def own(index: int) -> float:
        found["ours"] = ours("prefill", args.model, "--threads", args.threads, "--prompt", args.prompt, "--seed", index)
        return found["ours"]["tokens_s"]

    def other(_: int) -> float:
        found["openvino"] = answer(*openvino.command(prompt=args.prompt, tokens=1, threads=args.threads))
        return found["openvino"]["prefill_tokens_s"]

    engines = {FITTED: own, OPENVINO: other}
    for kind in ("Q4_0", "Q4_K_M", "BF16"):
        engines[llama_name(kind)] = lambda _, kind=kind: llama.tokens_per_second(
            kind, prompt=args.prompt, threads=args.threads
        )
    limits: list[dict] = []

    def peaks(_: int) -> float:
        limits.append(ours("limits"))
        return limits[-1]["int8_gop_s"] or limits[-1]["bf16_gflop_s"]

    rounds = in_turn({**engines, "peak": peaks}, args.rounds)
    speeds = rounds.values[FITTED]
    rounds.values.pop("peak")
    work = prefill_operations(args.parent, args.prompt) / args.prompt / 1e9
    shares = {
        name: summary([speed * work / peak[name] for speed, peak in zip(speeds, limits, strict=True)])
        for name in ("int8_gop_s", "bf16_gflop_s")
        if all(peak[name] for peak in limits)
    }
    versions = {"openvino-genai": found["openvino"]["version"]}
    return {**rounds.row([FITTED]), "share_of_peak": shares, "prompt": args.prompt, "giga_operations_per_token": work,
            "path": found["ours"]["backend"], "peer_versions": versions}  # fmt: skip


# ---- cold -----------------------------------------------------------------------------------------------------------
def cold(args: argparse.Namespace) -> dict:
    """From the end of the imports to the first token of 20 tokens, in new processes; peak memory beyond the file.

    The files are in the page cache: the first process, which puts them there, is not counted.
    """
    runs = [ours("cold", args.model, "--threads", args.threads, "--text", TWENTY_TOKENS) for _ in range(args.runs + 1)]
    runs = runs[1:]
    wrong = {run["prompt_tokens"] for run in runs} - {20}
    if wrong:
        raise SystemExit(f"the prompt has {wrong} tokens in this model's vocabulary, not 20")
    file = weight_bytes(args.model)
    timed = ("seconds", "open_seconds", "first_token_seconds")
    return {
        **{name: summary([run[name] for run in runs]) for name in timed},
        "beyond_file_bytes": max(run["peak_rss_bytes"] for run in runs) - file,
        "rss_bytes": summary([run["rss_bytes"] for run in runs]),
        "after_imports_bytes": summary([run["after_imports_bytes"] for run in runs]),
        "file_bytes": file,
        "page_cache": "warm",
        "path": runs[-1]["backend"],
    }


# ---- quality --------------------------------------------------------------------------------------------------------
def quality(args: argparse.Namespace) -> dict:
    """Perplexity of the native path over that of the unpacked weights in float32, on the same windows of wikitext-2.

    `native`: windows fed as prompts are; `single`: token by token, on fewer windows, since that is what an answer goes
    through. The difference is what int8 activations and an int8 cache cost.
    """
    file = args.data_folder / "wikitext-2.test.txt"
    counts = {"reference": args.windows, "native": args.windows, "single": min(args.single_windows, args.windows)}
    found = {
        path: ours("quality", args.model, "--threads", args.threads, "--text-file", file, "--windows", count,
                   "--path", path)
        for path, count in counts.items()
    }  # fmt: skip
    ratios = {path: loss_ratio(found[path]["losses"], found["reference"]["losses"]) for path in ("native", "single")}
    return {
        "ratio": ratios,
        "perplexity": {path: rounded(one["perplexity"], 6) for path, one in found.items()},
        "windows": counts,
    }


def loss_ratio(losses: list[float], reference: list[float]) -> dict:
    """exp of the mean difference of paired losses (windows beyond the shorter list are left out), with 95 %.

    At least two windows.
    """
    pairs = list(zip(losses, reference, strict=False))
    gaps = [one - other for one, other in pairs]
    mean = statistics.fmean(gaps)
    width = float(stdtrit(len(gaps) - 1, 0.975)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return {"value": rounded(math.exp(mean), 6), "low": rounded(math.exp(mean - width), 6),
            "high": rounded(math.exp(mean + width), 6), "n": len(gaps)}  # fmt: skip
