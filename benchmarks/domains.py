#!/usr/bin/env python3
"""Loss of packed models against their parent on several kinds of text, by transformers alone, paired by window.

    python benchmarks/domains.py --texts FOLDER --parent NAME=HF_DIR LABEL=MODEL_DIR …
    python benchmarks/domains.py table

FOLDER holds one file NAME.txt for each kind of text. Models are Hugging Face folders with plain weights (what `gulliver
export --format safetensors` writes, a peer's file dequantized: its own bytes are given by --bytes) or packed folders;
their weights are read into the parent's network. The first windows of 1024 tokens of each text are scored, in bfloat16
where the CPU multiplies it and in float32 elsewhere: the ratio of perplexities with twice its standard error, and the
divergence from the parent over its 256 likeliest tokens and the rest as one. Every model gets a row in
results/domains.json; `table` draws that of docs/models.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress_common import Results, write_atomic
from compress_table import ROOT, markdown, replaced

RESULTS = ROOT / "benchmarks/results/domains.json"
PAGE = ROOT / "docs/models.md"
CONTEXT, LIKELIEST = 1024, 256


def windows_of(folder: Path, tokenizer: Any, count: int) -> dict[str, Any]:
    """The first `count` windows of every text in the folder, int64 [windows, CONTEXT] by the file's stem."""
    found = {}
    for path in sorted(folder.glob("*.txt")):
        text = path.read_text(encoding="utf-8")[: count * 12 * CONTEXT]
        ids = tokenizer(text, return_tensors="pt").input_ids[0]
        whole = min(count, len(ids) // CONTEXT)
        if whole < 2:
            raise SystemExit(f"{path} has {len(ids)} tokens, too few for two windows of {CONTEXT}")
        found[path.stem] = ids[: whole * CONTEXT].view(whole, CONTEXT)
    return found


def log_probabilities(model: Any, windows: Mapping[str, Any]) -> Iterator[tuple[str, int, Any, Any]]:
    """Of each window (text, number, tokens after the first, log-probabilities float32 [CONTEXT - 1, vocabulary])."""
    import torch

    from gulliver.nets.precision import has_bfloat16, products_in

    for name, rows in windows.items():
        for number, row in enumerate(rows):
            with torch.no_grad(), products_in(has_bfloat16()):
                logits = model(row[None]).logits[0, :-1].float()
            yield name, number, row[1:], torch.log_softmax(logits, -1)


def parents_view(model: Any, windows: Mapping[str, Any]) -> dict[tuple[str, int], tuple[float, Any, Any]]:
    """By text and window: mean loss, and the log-probabilities and ids of the LIKELIEST tokens at each position."""
    found = {}
    for name, number, targets, logs in log_probabilities(model, windows):
        best, ids = logs.topk(LIKELIEST, -1)
        found[name, number] = -logs.gather(1, targets[:, None]).mean().item(), best.half(), ids.int()
    return found


def compared(model: Any, windows: Mapping[str, Any], parent: Mapping[tuple[str, int], tuple[float, Any, Any]]) -> dict:
    """By text: the ratio of perplexities less one, twice its standard error, and the divergence from the parent."""
    differences: dict[str, list[float]] = {name: [] for name in windows}
    divergences: dict[str, list[float]] = {name: [] for name in windows}
    for name, number, targets, logs in log_probabilities(model, windows):
        loss, best, ids = parent[name, number]
        differences[name].append(-logs.gather(1, targets[:, None]).mean().item() - loss)
        theirs, ours = best.float(), logs.gather(1, ids.long())
        rest, other = ((1 - part.exp().sum(1)).clamp_min(1e-9) for part in (theirs, ours))
        positions = (theirs.exp() * (theirs - ours)).sum(1) + rest * (rest / other).log()
        divergences[name].append(positions.mean().item())
    return {
        name: {
            "loss": math.expm1(statistics.mean(found)),
            "error": 2 * statistics.stdev(found) / math.sqrt(len(found)),
            "divergence": statistics.mean(divergences[name]),
            "windows": len(found),
        }
        for name, found in differences.items()
    }


def fill(model: Any, folder: Path) -> None:
    """Put the weights of a folder, plain or packed, into the parent's network in memory."""
    import torch

    from gulliver.runtime.reference import read_tensors

    names, missing = dict(model.named_parameters()), set(dict(model.named_parameters()))
    with torch.no_grad():
        for name, tensor in read_tensors(folder):
            if name in names:
                names[name].copy_(tensor)
                missing.discard(name)
    if missing:
        raise SystemExit(f"{folder} holds no weights for {min(missing)}")


def measure(args: argparse.Namespace) -> None:
    """A row for every model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, _, parent = args.parent.partition("=")
    windows = windows_of(args.texts, AutoTokenizer.from_pretrained(parent), args.windows)
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32).eval()
    reference = parents_view(model, windows)
    for asked in args.models:
        label, _, folder = asked.partition("=")
        fill(model, Path(folder))
        texts = compared(model, windows, reference)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        mean = math.expm1(statistics.mean(math.log1p(one["loss"]) for one in texts.values()))
        row = {"parent": name, "label": label, "size_bytes": args.bytes or size, "mean_loss": mean, "texts": texts}
        Results(args.out).put("domains", f"{name} {label}", row)


def table(results: Mapping[str, Any]) -> str:
    """All rows, by parent and falling size: the loss and the divergence on each text, and their means."""
    rows = sorted(results["rows"], key=lambda row: (row["parent"], -row["size_bytes"]))
    names = list(dict.fromkeys(name for row in rows for name in row["texts"]))
    body = []
    for row in rows:
        divergence = statistics.mean(one["divergence"] for one in row["texts"].values())
        cells = (row["texts"].get(name) for name in names)
        told = ["" if one is None else f"{one['loss']:+.1%} ± {one['error']:.1%}" for one in cells]
        size = f"{row['size_bytes'] / 1e6:.0f}"
        body.append([row["parent"], row["label"], size, *told, f"{row['mean_loss']:+.1%}", f"{divergence:.3f}"])
    return markdown(["parent", "model", "MB", *names, "mean", "divergence"], body, right=range(2, 5 + len(names)))


def main() -> None:
    """Measure, or draw the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="LABEL=FOLDER", help="what is measured; or `table`")
    parser.add_argument("--parent", metavar="NAME=HF_DIR")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--bytes", type=int, help="bytes of weights of a peer's own file")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.models == ["table"]:
        page = PAGE.read_text(encoding="utf-8")
        write_atomic(PAGE, replaced(page, "domains", table(Results(args.out).read())))
    elif args.parent is None or args.texts is None:
        sys.exit("give --parent NAME=HF_DIR and --texts FOLDER")
    else:
        measure(args)


if __name__ == "__main__":
    main()
