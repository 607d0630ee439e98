#!/usr/bin/env python3
"""GGUF files of ours beside a peer's of the same bytes, both judged by llama.cpp itself.

    python benchmarks/peers_gguf.py --bin LLAMA_BIN --source MODEL-bf16.gguf --parent NAME=HF_DIR --texts FOLDER \
        --calibration wikitext-2.valid.txt --work SCRATCH [--types Q4_K_M IQ4_XS …] [LABEL=FILE.gguf …]
    python benchmarks/peers_gguf.py table

LLAMA_BIN holds llama-quantize, llama-imatrix and llama-perplexity; llama.cpp's convert_hf_to_gguf.py makes the source
of HF_DIR (`--outtype bf16`). For each type llama-quantize makes a file with an importance matrix from --calibration; a
LABEL=FILE is what another tool made of the same model. Beside each, `gulliver fit --for gguf` gets as many bytes as
that file and the same text for calibration. FOLDER holds one NAME.txt for each kind of text; of each, the first
--chunks of 512 tokens go through llama-perplexity, which compares each file with the source: the ratio of perplexities
and the divergence, over the later half of each chunk. Every file gets a row in results/gguf.json; `table` draws that of
docs/gguf.md. Files and fits that are in SCRATCH already are used again.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress_common import Results, gulliver, write_atomic
from compress_table import ROOT, markdown, replaced
from peers_llama_cpp import contents, run

RESULTS = ROOT / "benchmarks/results/gguf.json"
PAGE = ROOT / "docs/gguf.md"
CONTEXT, IMATRIX_CHUNKS = 512, 100
FOUND = {"loss": r"Mean PPL\(Q\)/PPL\(base\)\s*:\s*(\S+)", "divergence": r"Mean\s+KLD:\s*(\S+)"}
"""What llama-perplexity prints: the first number after each."""
THREADS = {"-t": os.cpu_count() or 1}


def peers_of(args: argparse.Namespace) -> dict[str, Path]:
    """The files of llama-quantize by type, made where they are not there yet, and what other tools made by label."""
    imatrix, made = args.work / "imatrix.gguf", {}
    if not imatrix.exists():
        run(
            [args.bin / "llama-imatrix", "-m", args.source, "-f", args.calibration, "-o", imatrix, "--process-output"],
            {"--chunks": IMATRIX_CHUNKS, "-c": CONTEXT, "-b": CONTEXT, **THREADS},
        )
    for kind in args.types:
        made[kind], unfinished = args.work / f"{kind}.gguf", args.work / "unfinished.gguf"
        if not made[kind].exists():
            run([args.bin / "llama-quantize", "--imatrix", imatrix, args.source, unfinished, kind])
            unfinished.rename(made[kind])
    return made | {label: Path(path) for label, _, path in (one.partition("=") for one in args.others)}


def ours(args: argparse.Namespace, folder: str, size: int) -> Path:
    """Our file of `size` bytes of tensors, fitted and exported where it is not there yet."""
    whole = args.work / f"ours-{args.effort}-{size}"
    if not whole.exists():
        unfinished, home = args.work / "fitted", args.work / "home"
        for stale in (unfinished, args.work / "exported"):
            shutil.rmtree(stale, ignore_errors=True)
        options = ["--data", args.calibration, "--effort", args.effort, "--max-drop", "50%"]
        gulliver("fit", folder, "--for", "gguf", "--size", size, *options, "--out", unfinished, home=home)
        gulliver("export", unfinished, "--format", "gguf", "--out", args.work / "exported", home=home)
        (args.work / "exported").rename(whole)
    return next(whole.glob("*.gguf"))


def judged(args: argparse.Namespace, files: Mapping[str, Path]) -> dict[str, dict[str, dict[str, float]]]:
    """By label and text: the ratio of perplexities to the source's less one, and the divergence from it."""
    found: dict[str, dict[str, dict[str, float]]] = {label: {} for label in files}
    for text in sorted(args.texts.glob("*.txt")):
        base = args.work / "base.bin"
        where = ["-f", text, "--kl-divergence-base", base]
        sizes = {"-c": CONTEXT, "-b": CONTEXT, "--chunks": args.chunks, **THREADS}
        run([args.bin / "llama-perplexity", "-m", args.source, *where], sizes)
        for label, path in files.items():
            log = run([args.bin / "llama-perplexity", "-m", path, *where, "--kl-divergence"], sizes)
            matches = {name: re.search(pattern, log) for name, pattern in FOUND.items()}
            missing = [name for name, match in matches.items() if match is None]
            if missing:
                raise SystemExit(f"llama-perplexity printed no {missing[0]}: {log[-800:]}")
            numbers = {name: float(match.group(1)) for name, match in matches.items() if match is not None}
            found[label][text.stem] = {**numbers, "loss": numbers["loss"] - 1}
        base.unlink()
    return found


def measure(args: argparse.Namespace) -> None:
    """Two rows for every peer's file: its own, and that of ours of the same bytes."""
    name, _, folder = args.parent.partition("=")
    args.work.mkdir(parents=True, exist_ok=True)
    peers = peers_of(args)
    bytes_of = {label: path.stat().st_size for label, path in peers.items()}
    mine = {f"ours for {label}": ours(args, folder, size) for label, size in bytes_of.items()}
    files = peers | mine
    for label, texts in judged(args, files).items():
        row = {"parent": name, "label": label, "peer": label.removeprefix("ours for "), "texts": texts}
        row |= {"size_bytes": files[label].stat().st_size, "types": contents(files[label])[1], "chunks": args.chunks}
        row |= {"effort": args.effort} if label in mine else {}
        row |= {"mean_loss": math.expm1(statistics.mean(math.log1p(one["loss"]) for one in texts.values()))}
        row |= {"mean_divergence": statistics.mean(one["divergence"] for one in texts.values())}
        Results(args.out).put("gguf", f"{name} {label}", row)


def table(results: Mapping[str, Any]) -> str:
    """Peers by parent and falling size, ours of the same bytes below each."""
    rows = sorted(results["rows"], key=lambda row: (row["parent"], row["peer"], row["label"].startswith("ours")))
    names = list(dict.fromkeys(name for row in rows for name in row["texts"]))
    body = []
    for row in rows:
        told = [f"{row['texts'][name]['loss']:+.1%}" if name in row["texts"] else "" for name in names]
        size, divergence = f"{row['size_bytes'] / 1e6:.1f}", f"{row['mean_divergence']:.4f}"
        mine = f"`fit --for gguf`, effort {row['effort']}" if "effort" in row else row["label"]
        body.append([row["parent"], mine, size, *told, f"{row['mean_loss']:+.1%}", divergence])
    return markdown(["parent", "file", "MB", *names, "mean", "divergence"], body, right=range(2, 5 + len(names)))


def main() -> None:
    """Measure, or draw the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("others", nargs="*", metavar="LABEL=FILE", help="files that other tools made; or `table`")
    parser.add_argument("--bin", type=Path, help="folder with llama.cpp's programs")
    parser.add_argument("--source", type=Path, help="the parent as a GGUF file of bfloat16")
    parser.add_argument("--parent", metavar="NAME=HF_DIR")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--types", nargs="*", default=[], help="types of llama-quantize")
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    needed = (args.bin, args.source, args.parent, args.texts, args.calibration, args.work)
    if args.others == ["table"]:
        page = PAGE.read_text(encoding="utf-8")
        write_atomic(PAGE, replaced(page, "gguf", table(Results(args.out).read())))
    elif any(one is None for one in needed):
        sys.exit("give --bin, --source, --parent, --texts, --calibration and --work")
    else:
        measure(args)


if __name__ == "__main__":
    main()
