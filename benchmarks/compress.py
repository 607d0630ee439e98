#!/usr/bin/env python3
"""What `gulliver fit` achieves, measured through the command line that users type: the script behind `make bench`.

    python benchmarks/compress.py --data-folder DATA --parent HF_DIR fit --effort high --size 84MB --max-drop 8%
    python benchmarks/compress.py --data-folder DATA --parent HF_DIR memory --ram 1.5GB
    python benchmarks/compress.py --data-folder DATA --parent HF_DIR resume --kills 20
    python benchmarks/compress.py --data-folder DATA encoder --bits 4.5
    python benchmarks/compress.py quickstart
    python benchmarks/compress.py table
    python benchmarks/compress.py --data-folder DATA --parent HF_DIR all

DATA holds wikitext-2.valid.txt (calibration), wikitext-2.test.txt and tinyshakespeare.txt (measurement). HF_DIR is the
parent: the one whose peers stand in benchmarks/results/peers.json, for the table to compare like with like. Each part
writes its row into --out and leaves all others alone; one that was broken off goes on where it stopped. `all` runs the
parts that have no row yet (BENCH, below). Every command is a process of its own; wall time and peak resident memory
are taken from outside.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compress_common import Done, Results, Stages, gulliver, measured
from compress_resume import resume_row
from compress_table import ROOT, draw_all

BENCH = (
    ("fit", "--effort", "high", "--size", "72MB"),
    ("fit", "--effort", "high", "--size", "62MB"),
    ("fit", "--effort", "normal", "--size", "72MB"),
    ("fit", "--effort", "normal", "--size", "100MB"),
    ("fit", "--effort", "fast", "--size", "84MB"),
    ("memory", "--ram", "1.5GB"),
    ("resume", "--kills", "20", "--model", "catalog:all-minilm-l6-v2"),
    ("encoder", "--bits", "4.5"),
    ("encoder", "--bits", "4.25"),
    ("encoder", "--bits", "4.25", "--effort", "high"),
    ("quickstart",),
    ("table",),
)
"""What `all` runs, in this order."""
CALIBRATION, WIKITEXT, SHAKESPEARE = "wikitext-2.valid.txt", "wikitext-2.test.txt", "tinyshakespeare.txt"
WINDOWS = {WIKITEXT: 24, SHAKESPEARE: 12}
ENCODER = "catalog:all-minilm-l6-v2"
CLEAN = ("HOME", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")


# ---- fit ------------------------------------------------------------------------------------------------------------
def fit(args: argparse.Namespace, results: Results) -> None:
    """One fit, its evidence, and the perplexity of what it exports, by transformers alone."""
    work = Stages(args.home / f"fit-{args.effort}-{args.size}", fresh=args.fresh)
    row = work.stage("fit", lambda: _fitted(args, work))
    asked = {"effort": args.effort, "size": args.size, "max_drop": args.max_drop}
    if row["outcome"] == "fitted":
        after = work.stage("score", lambda: _score(args, _exported(work)))
        products = after.pop("products")
        parent_id = weights_hash(args.parent) + ("" if products == "bfloat16" else f" {products}")
        before = results.parent(parent_id, lambda: _score(args, args.parent))
        ratios = {name: round(after[name]["perplexity"] / before[name]["perplexity"], 5) for name in after}
        lost = {name: ratio - 1 for name, ratio in ratios.items()}
        wikitext, shakespeare = lost[Path(WIKITEXT).stem], lost[Path(SHAKESPEARE).stem]
        row |= {
            "parent": parent_id,
            "independent": {name: {**after[name], "ratio": ratios[name]} for name in after},
            "domain_ratio": round(shakespeare / wikitext, 4) if wikitext > 0 else None,
        }
    results.put("fit", key_of(args), {**asked, **row})
    work.finish(keep=args.keep)


def _fitted(args: argparse.Namespace, work: Stages) -> dict:
    limits = ["--max-drop", args.max_drop] if args.max_drop else []
    data = ["--data", args.data_folder / CALIBRATION, "--eval-data", args.data_folder / WIKITEXT]
    words = ["fit", args.parent, "--size", args.size, "--effort", args.effort, *limits, *data]
    done = gulliver(*words, "--out", work.folder / "fitted", home=work.home, may_refuse=True)
    cost = {**done.cost, "from_scratch": work.whole}
    if done.code:
        return {"outcome": "infeasible", "message": reason(done), **cost}
    found = done.document
    return {
        "outcome": "fitted",
        "artifact_id": found["id"],
        "size_bytes": found["weight_bytes"],
        "evidence": newest(found["evidence"]),
        **cost,
    }


def reason(done: Done) -> str:
    """Why a budget is infeasible, without the path of the report: paths of this machine stay out of the results."""
    return done.document["message"].split("; report:")[0]


def newest(evidence: list[dict]) -> dict[str, dict]:
    """{metric: value, low, high, n} of the last measurement of each metric."""
    return {item["metric"]: {name: item[name] for name in ("value", "low", "high", "n")} for item in evidence}


def _exported(work: Stages) -> Path:
    plain = work.folder / "plain"
    if not (plain / "config.json").exists():
        gulliver("export", work.folder / "fitted", "--format", "safetensors", "--out", plain, home=work.home)
    return plain


def _score(args: argparse.Namespace, model: Path) -> dict:
    texts = [word for name, count in WINDOWS.items() for word in ("--text", args.data_folder / name, count)]
    done = measured([sys.executable, Path(__file__).with_name("compress_score.py"), model, *texts])
    if done.code:
        raise SystemExit(f"compress_score.py {model}: exit {done.code}")
    return json.loads(done.output.strip().splitlines()[-1])


def weights_hash(folder: Path) -> str:
    """The first 16 digits of the SHA-256 over the weight files, which names a parent in the results."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


# ---- memory ---------------------------------------------------------------------------------------------------------
def memory(args: argparse.Namespace, results: Results) -> None:
    """Calibrate and quantize a model of random weights that is larger than the memory allowed."""
    from compress_llama import Shape, write_llama

    shape = Shape(args.layers, args.hidden, args.intermediate, args.heads)
    work = Stages(args.home / f"memory-{args.ram}", fresh=args.fresh)
    model = args.home / f"llama-{args.layers}-{args.hidden}-{args.intermediate}-{args.heads}"
    parameters = write_llama(model, args.parent, shape)
    limit = ["--max-ram-bytes", args.ram]
    few = ["--examples", args.examples, "--tokens", args.tokens, "--batch-size", 1]
    texts = [args.data_folder / CALIBRATION, "--eval-data", args.data_folder / WIKITEXT]
    data = work.stage("read", lambda: _cost("read", *texts, home=work.home))
    pulled = work.stage("pull", lambda: _cost("pull", model, home=work.home))
    calibrated = work.stage(
        "calibrate", lambda: _cost("calibrate", pulled["id"], "--data", data["id"], *few, *limit, home=work.home)
    )
    quantized = work.stage(
        "quantize",
        lambda: _cost("quantize", pulled["id"], "--calibration", calibrated["id"], *limit, home=work.home),
    )
    row = {
        "ram": args.ram,
        "parameters": parameters,
        "parent_bytes": pulled["weight_bytes"],
        "size_bytes": quantized["weight_bytes"],
        "examples": args.examples,
        "tokens": args.tokens,
        "from_scratch": work.whole,
        "commands": {"pull": pulled, "calibrate": calibrated, "quantize": quantized},
        "seconds": round(calibrated["seconds"] + quantized["seconds"], 1),
        "peak_rss_bytes": max(calibrated["peak_rss_bytes"], quantized["peak_rss_bytes"]),
    }
    results.put("memory", key_of(args), row)
    work.finish(keep=args.keep)


def _cost(*words: object, home: Path) -> dict:
    done = gulliver(*words, home=home)
    return {**done.cost, "id": done.document["id"], "weight_bytes": done.document["weight_bytes"]}


# ---- resume, encoder ------------------------------------------------------------------------------------------------
def resume(args: argparse.Namespace, results: Results) -> None:
    """Kill calibrate and quantize at random instants, run them again, and compare what they made."""
    work = Stages(args.home / "resume", fresh=True)
    texts = (args.data_folder / CALIBRATION, args.data_folder / WIKITEXT)
    row = {
        "model": args.model or weights_hash(args.parent),
        **resume_row(args.model or args.parent, texts, work.folder, args),
    }
    results.put("resume", key_of(args), row)
    work.finish(keep=args.keep)


def encoder(args: argparse.Namespace, results: Results) -> None:
    """Fit the catalog's sentence encoder at a size that gives `bits` for each of its parameters."""
    work = Stages(args.home / f"encoder-{args.bits}", fresh=args.fresh)
    pulled = work.stage("pull", lambda: gulliver("pull", ENCODER, home=work.home).document)
    parameters = parameter_count(Path(pulled["path"]))
    size_bytes = math.floor(args.bits * parameters / 8)
    data = ["--data", args.data_folder / CALIBRATION, "--eval-data", args.data_folder / WIKITEXT]
    words = ["fit", pulled["id"], "--size", size_bytes, "--effort", args.effort, *data]
    done = gulliver(*words, "--out", work.folder / "fitted", home=work.home, may_refuse=True)
    row = {"bits": args.bits, "effort": args.effort, "budget_bytes": size_bytes, "parameters": parameters, **done.cost}
    row["from_scratch"] = work.whole
    if done.code:
        row |= {"outcome": "infeasible", "message": reason(done)}
    else:
        evidence = newest(done.document["evidence"])
        assert evidence["parameter_count"]["value"] == parameters, "the files hold another number of parameters"
        row |= {"outcome": "fitted", "size_bytes": done.document["weight_bytes"], "evidence": evidence}
    results.put("encoder", key_of(args), row)
    work.finish(keep=args.keep)


def parameter_count(folder: Path) -> int:
    """Floating-point values in the safetensors files of a folder, read from their headers."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        rows = [row for name, row in header.items() if name != "__metadata__"]
        total += sum(math.prod(row["shape"]) for row in rows if row["dtype"] in ("F32", "F16", "BF16"))
    return total


# ---- quickstart, table, all -----------------------------------------------------------------------------------------
def quickstart(args: argparse.Namespace, results: Results) -> None:
    """`make quickstart` in a new clone of HEAD, with a home folder that has nothing in it."""
    with tempfile.TemporaryDirectory(prefix="gulliver-quickstart-", dir=args.home) as scratch:
        clone, home = Path(scratch) / "gulliver", Path(scratch) / "user"
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(args.repository), str(clone)], check=True)
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, check=True, capture_output=True, text=True)
        environment = {name: value for name, value in os.environ.items() if name not in CLEAN} | {"HOME": str(home)}
        began = time.time()
        done = measured(["make", "quickstart", *args.make_arg], env=environment, cwd=clone)
        if done.code:
            raise SystemExit(f"make quickstart: exit {done.code}\n{done.output[-2000:]}")
        install = (clone / ".venv" / "installed").stat().st_mtime - began
        weights = [path.stat().st_size for path in (clone / "out").rglob("*.safetensors")]
        row = {
            "commit": head.stdout.strip(),
            "seconds": round(done.seconds, 1),
            "install_seconds": round(install, 1),
            "fit_seconds": round(done.seconds - install, 1),
            "size_bytes": sum(weights),
            "report": any((clone / "out").rglob("report.html")),
        }
    results.put("quickstart", key_of(args), row)


def table(args: argparse.Namespace, results: Results) -> None:
    """Draw the tables and the plot again."""
    for path in draw_all(results.path, args.peers):
        print(path)


def everything(args: argparse.Namespace, results: Results) -> None:
    """All of BENCH that has no row yet."""
    for words in BENCH:
        chosen = arguments([*args.given, *words])
        if chosen.part == "table" or not results.has(chosen.part, key_of(chosen)):
            chosen.act(checked(chosen), results)


def key_of(args: argparse.Namespace) -> str:
    """What tells the rows of a part apart."""
    names = {
        "fit": ("effort", "size"),
        "memory": ("ram", "layers", "hidden", "intermediate", "heads"),
        "resume": ("kills",),
        "encoder": ("effort", "bits"),
        "quickstart": ("part",),
    }[args.part]
    return " ".join(str(getattr(args, name)) for name in names)


# ---- arguments ------------------------------------------------------------------------------------------------------
def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path, help=f"folder with {CALIBRATION}, {WIKITEXT}, {SHAKESPEARE}")
    parser.add_argument("--parent", type=Path, help="the parent, a Hugging Face folder")
    parser.add_argument("--home", type=Path, default=ROOT / "out" / "bench", help="scratch (default out/bench)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "compress.json")
    parser.add_argument("--peers", type=Path, default=ROOT / "benchmarks" / "results" / "peers.json")
    parser.add_argument("--fresh", action="store_true", help="forget what a run that was broken off had done")
    parser.add_argument("--keep", action="store_true", help="keep the scratch of a finished part")
    parts = parser.add_subparsers(dest="part", required=True)
    one = _part(parts, "fit", fit)
    one.add_argument("--effort", choices=("fast", "normal", "high"), default="normal")
    one.add_argument("--size", required=True)
    one.add_argument("--max-drop")
    one = _part(parts, "memory", memory)
    one.add_argument("--ram", default="1.5GB")
    for name, default in (("layers", 24), ("hidden", 2048), ("intermediate", 5632), ("heads", 16)):
        one.add_argument(f"--{name}", type=int, default=default)
    _few(one, examples=8, tokens=512)
    one = _part(parts, "resume", resume)
    one.add_argument("--kills", type=int, default=20)
    one.add_argument("--model", help="the model (default: the parent)")
    one.add_argument("--seed", type=int, default=0, help="of the instants")
    _few(one, examples=16, tokens=256)
    one = _part(parts, "encoder", encoder)
    one.add_argument("--bits", type=float, default=4.5)
    one.add_argument("--effort", choices=("fast", "normal", "high"), default="normal")
    one = _part(parts, "quickstart", quickstart)
    one.add_argument("--repository", type=Path, default=ROOT, help="what to clone (default: this one)")
    one.add_argument("--make-arg", action="append", default=[], metavar="NAME=VALUE", help="for make, e.g. PIP_ARGS=…")
    _part(parts, "table", table)
    _part(parts, "all", everything)
    args = parser.parse_args(words)
    args.given = (sys.argv[1:] if words is None else words)[:-1]  # for `all`: what stands before it
    return args


def _part(parts, name: str, act) -> argparse.ArgumentParser:
    parser = parts.add_parser(name, help=act.__doc__, description=act.__doc__)
    parser.set_defaults(act=act)
    return parser


def _few(parser: argparse.ArgumentParser, examples: int, tokens: int) -> None:
    parser.add_argument("--examples", type=int, default=examples, help="calibration examples")
    parser.add_argument("--tokens", type=int, default=tokens, help="tokens of each")


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """Ends the program where a path that the part needs is missing."""
    needs_data = args.part in ("fit", "memory", "resume", "encoder", "all")
    needs_parent = args.part in ("fit", "memory", "all") or (args.part == "resume" and not args.model)
    if needs_data and args.data_folder is None:
        raise SystemExit(f"{args.part} needs --data-folder, a folder with {CALIBRATION} and {WIKITEXT}")
    if needs_parent and (args.parent is None or not (args.parent / "config.json").exists()):
        raise SystemExit(f"{args.part} needs --parent, a Hugging Face folder; got {args.parent}")
    args.home = args.home.resolve()  # commands run in other folders, too
    args.home.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    args = checked(arguments())
    args.act(args, Results(args.out))


if __name__ == "__main__":
    main()
