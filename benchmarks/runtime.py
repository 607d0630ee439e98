#!/usr/bin/env python3
"""How fast a fitted model runs and serves here, with its peers measured beside it in the same run.

    python benchmarks/peers_runtime_llama.py --peers PEERS --parent OFFGRID      # once: build llama.cpp, make its files
    python benchmarks/peers_runtime_openvino.py build --peers PEERS --parent OFFGRID
    python benchmarks/runtime.py --model FITTED --parent OFFGRID --home SCRATCH --data-folder DATA --peers PEERS models
    python benchmarks/runtime.py --model FITTED --parent OFFGRID --home SCRATCH --data-folder DATA --peers PEERS all
    python benchmarks/runtime.py … decode --rounds 9
    python benchmarks/runtime.py table

FITTED is a model that `gulliver fit` made from OFFGRID, the Hugging Face folder that the peers' files come from, too.
DATA holds wikitext-2.valid.txt and wikitext-2.test.txt. Each part takes less than ten minutes and writes its row, with
machine, date and versions, into --out; `all` runs the parts that have no row yet, `PART` alone runs one again. `models`
makes what is measured besides: the parent in 8 bits, and a large model of random weights (minutes, once).

Nothing else should run meanwhile: what others used of the machine stands in each row, and the table marks rows in which
that was more than a twentieth.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from compress_common import Results
from compress_table import ROOT
from peers_runtime_llama import Llama
from runtime_common import Watch, noisy
from runtime_extras import lookup, reuse
from runtime_http import load, overhead, streams
from runtime_models import eight_bit_model, large_model, large_parent
from runtime_speed import bandwidth, cold, decode, prefill, quality
from runtime_table import draw_all
from runtime_two_engines import two

PARTS: dict[str, Callable[[argparse.Namespace], dict]] = {
    one.__name__: one
    for one in (decode, bandwidth, prefill, streams, overhead, cold, load, two, lookup, reuse, quality)
}
"""What `all` runs, in this order."""
PEERS_OF = {"decode", "bandwidth", "prefill", "streams"}
DATA_OF = {"lookup", "quality"}
ROUNDS = {"decode": 7, "bandwidth": 7, "prefill": 7, "streams": 7, "overhead": 131, "two": 21, "lookup": 6, "reuse": 6}


def measure(args: argparse.Namespace, results: Results) -> None:
    """One part, and its row."""
    with Watch() as watch:
        row = PARTS[args.part](args)
    row |= {"threads": args.threads, "weight_file": weight_name(args.model), **watch.row}
    if args.part in PEERS_OF:
        row["peer_versions"] = {**Llama(args.peers).version, **row.get("peer_versions", {})}
    if noisy(row):
        print(f"{args.part}: others used {row['others_share']:.0%} of the machine meanwhile", file=sys.stderr)
    results.put(args.part, args.part, row)


def weight_name(model: Path) -> str:
    """The content id of the measured model, or what its folder is called."""
    card = model / "gulliver.json"
    return json.loads(card.read_text(encoding="utf-8")).get("id", model.name) if card.exists() else model.name


def models(args: argparse.Namespace, results: Results) -> None:
    """Make the models that the parts need besides the fitted one."""
    for path in (eight_bit_model(args), large_parent(args), large_model(args)):
        print(path)


def everything(args: argparse.Namespace, results: Results) -> None:
    """All parts that have no row yet, then the table."""
    for part in PARTS:
        if not results.has(part, part):
            measure(checked(arguments([*args.given, part])), results)
    table(args, results)


def table(args: argparse.Namespace, results: Results) -> None:
    """Draw the table in the READMEs again."""
    for path in draw_all(results.path):
        print(path)


# ---- arguments ------------------------------------------------------------------------------------------------------
def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the fitted model")
    parser.add_argument("--parent", type=Path, help="its parent, a Hugging Face folder")
    parser.add_argument("--data-folder", type=Path, help="folder with wikitext-2.valid.txt and wikitext-2.test.txt")
    parser.add_argument("--home", type=Path, default=ROOT / "out" / "bench-runtime", help="scratch")
    parser.add_argument("--peers", type=Path, help="folder that the peers_runtime_*.py filled (default HOME/peers)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "runtime.json")
    parser.add_argument("--threads", type=int, default=2)
    parts = parser.add_subparsers(dest="part", required=True)
    for name, act in PARTS.items():
        one = parts.add_parser(name, help=act.__doc__, description=act.__doc__)
        one.set_defaults(act=measure)
        if name in ROUNDS:
            one.add_argument("--rounds", type=int, default=ROUNDS[name])
        if name in ("decode", "bandwidth", "streams", "overhead", "two", "lookup", "reuse"):
            one.add_argument("--tokens", type=int, default={"bandwidth": 64, "reuse": 16}.get(name, 128))
    choices = parts.choices
    choices["prefill"].add_argument("--prompt", type=int, default=512)
    choices["streams"].add_argument("--temperature", type=float, default=0.0)
    choices["cold"].add_argument("--runs", type=int, default=9)
    choices["load"].add_argument("--clients", type=int, default=200)
    choices["load"].add_argument("--seconds", type=float, default=180.0)
    choices["load"].add_argument("--killed", type=float, default=0.1)
    choices["quality"].add_argument("--windows", type=int, default=24)
    choices["quality"].add_argument("--single-windows", type=int, default=6)
    for name, act in (("models", models), ("all", everything), ("table", table)):
        parts.add_parser(name, help=act.__doc__, description=act.__doc__).set_defaults(act=act)
    args = parser.parse_args(words)
    args.given = (sys.argv[1:] if words is None else words)[:-1]  # for `all`: what stands before it
    return args


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """Ends the program where a path that the part needs is missing."""
    if args.part == "table":
        return args
    for name in ("model", "parent"):
        path = getattr(args, name)
        if path is None or not (path / "config.json").exists():
            raise SystemExit(f"{args.part} needs --{name}, a Hugging Face folder; got {path}")
    if args.part in DATA_OF | {"all", "models"} and args.data_folder is None:
        raise SystemExit(f"{args.part} needs --data-folder, a folder with wikitext-2.test.txt")
    args.home, args.model = args.home.resolve(), args.model.resolve()
    args.peers = (args.peers or args.home / "peers").resolve()
    if args.part in PEERS_OF | {"all"} and not (Llama(args.peers).bin / "llama-bench").exists():
        raise SystemExit(f"{args.peers} holds no llama.cpp; run peers_runtime_llama.py --peers {args.peers} first")
    args.home.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    args = checked(arguments())
    args.act(args, Results(args.out))


if __name__ == "__main__":
    main()
