"""A structured fuzz of the six readers of strangers' files: valid seeds, changed, must be read or refused in one line.

    python benchmarks/fuzz_readers.py --count 100000 [--reader gguf] [--seed 1] [--keep FOLDER] [--out FILE]

A fault is an exception that is not a GulliverError (a traceback), more than 2 s of processor time, more than 500 MB of
memory beyond what the process had, or its death. Files run in children of one process that has imported everything;
file number n of a seed is the same in every run, and those that are faults are kept.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import fuzz_mutations as mutations
import fuzz_seeds as seeds

from gulliver.core.errors import GulliverError
from gulliver.pipeline import recipe
from gulliver.runtime.text.chat_template import ChatTemplate
from gulliver.runtime.text.tokenizer import Text
from gulliver.tasks import converter, detect_task, foreign_files, get_task
from gulliver.tasks.options import TextOptions
from gulliver.tasks.text.files import text_batches
from gulliver.tasks.text.tokenizer import load_tokenizer, tokens_of

CPU_S, WALL_S, EXTRA_BYTES, HARD_BYTES = 2, 60, 500_000_000, 4_000_000_000
FILES_OF_A_CHILD = 100
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
]


# ---- the readers ----------------------------------------------------------------------------------------------------
def read_model(folder: Path) -> None:
    get_task(detect_task(folder)).load(folder)


def read_tokenizer(folder: Path) -> None:
    Text(folder).encode("Hello, world 12 漢字")
    tokens_of(load_tokenizer(folder), "Hello, world 12 漢字")


def read_gguf(folder: Path) -> None:
    (folder / "made").mkdir()
    files = foreign_files(folder / "model.gguf")
    converter(files[0])[1](files[0], folder / "made")


def read_template(folder: Path) -> None:
    template = ChatTemplate({"default": (folder / "template.jinja").read_text(errors="replace")}, {"eos_token": "</s>"})
    template.render(MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])


def read_recipe(folder: Path) -> None:
    recipe.load(folder / "recipe.toml")


def read_data(folder: Path) -> None:
    for split in ("train", "eval"):
        for batch in text_batches(folder, split, TextOptions.model_validate({})):
            assert batch.num_rows


@dataclass(frozen=True)
class Reader:
    """What is fuzzed: how seeds are written (a folder each), how a folder is read, and what changes which file."""

    seeds: Callable[[Path], list[Path]]
    read: Callable[[Path], None]
    changes: dict[str, tuple[mutations.Mutation, ...]]  # how a file's name ends -> what changes it


WORDS = {
    "toml": (
        "=",
        ".",
        "[",
        "]",
        "[[",
        "]]",
        "{",
        "}",
        '"',
        '"""',
        "'''",
        "#",
        ",",
        "inf",
        "nan",
        "1979-05-27",
        "a",
        "\n",
    ),
    "jinja": (
        *(
            "{{",
            "}}",
            "{%",
            "%}",
            "{%-",
            "-%}",
            "(",
            ")",
            "[",
            "]",
            "{",
            "}",
            "|",
            "~",
            "*",
            "**",
            "'",
            "for m in messages",
        ),
        *("endfor", "if", "else", "endif", "set x = ", "namespace(", "macro f()", "endmacro", "range(", "loop.index"),
        *("tojson", "join", "messages", ".__class__", "['x'*1000]", "recursive", "raise_exception('x')", "f()", "\n"),
    ),
}
READERS = {
    "model": Reader(seeds.write_models, read_model, {"config.json": mutations.JSON, ".safetensors": mutations.BYTES}),
    "tokenizer": Reader(seeds.write_tokenizers, read_tokenizer, {".json": mutations.JSON}),
    "gguf": Reader(seeds.write_ggufs, read_gguf, {".gguf": mutations.BYTES}),
    "template": Reader(
        lambda root: seeds.write_text(root / "chat", "template.jinja", seeds.TEMPLATE),
        read_template,
        {".jinja": mutations.tokens(WORDS["jinja"])},
    ),
    "recipe": Reader(
        lambda root: seeds.write_text(root / "toml", "recipe.toml", seeds.RECIPE),
        read_recipe,
        {".toml": mutations.tokens(WORDS["toml"])},
    ),
    "data": Reader(
        seeds.write_texts, read_data, {".parquet": mutations.BYTES, ".jsonl": (*mutations.BYTES, mutations.json_value)}
    ),
}


# ---- one file -------------------------------------------------------------------------------------------------------
def changed_folder(reader: Reader, folders: Sequence[Path], rng: random.Random, folder: Path) -> None:
    """A seed's folder, one file of which is changed."""
    shutil.copytree(rng.choice(folders), folder)
    rows = [(path, ways) for end, ways in reader.changes.items() for path in sorted(folder.rglob(f"*{end}"))]
    path, ways = rng.choice(rows)
    data = path.read_bytes()
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        try:
            data = rng.choice(ways)(rng, data)
        except (ValueError, RecursionError):  # what was changed before is no JSON any more
            data = mutations.flip(rng, data)
    path.write_bytes(data)


def outcome(reader: Reader, folder: Path) -> str:
    """ "read", "refused", "memory", or a traceback's text."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    before = _memory("VmRSS")
    try:
        reader.read(folder)
        told = "read"
    except GulliverError as refusal:
        told = "refused" if "\n" not in str(refusal) else f"more than one line: {refusal!r}"
    except BaseException as failure:  # a panic of a library in Rust is no Exception
        told = "".join(traceback.format_exception(failure)[-6:])
    return "memory" if _memory("VmHWM") - before > EXTRA_BYTES else told


def _memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


# ---- many -----------------------------------------------------------------------------------------------------------
def child(name: str, folders: Sequence[Path], numbers: Sequence[int], seed: int, scratch: Path, pipe: int) -> None:
    """Read files and tell of each, a line of JSON before and after."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where panics are printed
    most = _memory("VmSize") + HARD_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with os.fdopen(pipe, "w") as out:
        for number in numbers:
            folder = scratch / f"{name}-{seed}-{number}"
            shutil.rmtree(folder, ignore_errors=True)
            changed_folder(READERS[name], folders, random.Random(f"{name} {seed} {number}"), folder)
            print(json.dumps([number, "begun"]), file=out, flush=True)
            signal.setitimer(signal.ITIMER_PROF, CPU_S)
            signal.alarm(WALL_S)
            told = outcome(READERS[name], folder)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            print(json.dumps([number, told]), file=out, flush=True)
            if told in ("read", "refused"):
                shutil.rmtree(folder)


def outcomes(name: str, folders: Sequence[Path], count: int, seed: int, scratch: Path) -> Iterator[tuple[int, str]]:
    """(number, what came of it) of every file; a child that dies is replaced by one that goes on behind its last."""
    at = 0
    while at < count:
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reading)
            try:
                child(name, folders, range(at, min(at + FILES_OF_A_CHILD, count)), seed, scratch, writing)
            finally:
                os._exit(0)
        os.close(writing)
        open_file = None
        with os.fdopen(reading) as lines:
            for line in lines:
                at, told = json.loads(line)
                open_file = at if told == "begun" else None
                if told != "begun":
                    yield at, told
        _, status = os.waitpid(process, 0)
        if open_file is not None:
            slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
            yield at, "time" if slow else f"died: status {status}"
        at += 1


def fuzz(name: str, count: int, seed: int, keep: Path | None) -> dict[str, object]:
    """The counts of one reader; files that are faults are moved to `keep`, with what came of them."""
    start, found = time.monotonic(), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        root = Path(scratch)
        folders = READERS[name].seeds(root / "seeds")
        for folder in folders:
            READERS[name].read(
                shutil.copytree(folder, root / "whole" / folder.name)
            )  # a seed is valid, all is imported
        for number, told in outcomes(name, folders, count, seed, root):
            kind = (
                told if told in ("read", "refused", "memory", "time") else "died" if told[:4] == "died" else "traceback"
            )
            found[kind] += 1
            faulty = root / f"{name}-{seed}-{number}"
            if keep is not None and kind not in ("read", "refused"):
                shutil.copytree(faulty, keep / faulty.name, dirs_exist_ok=True)
                (keep / faulty.name / "came-of-it.txt").write_text(told)
            shutil.rmtree(faulty, ignore_errors=True)
    counts = {kind: found[kind] for kind in ("read", "refused", "traceback", "time", "memory", "died")}
    return {"reader": name, "seed": seed, "files": count, **counts, "seconds": round(time.monotonic() - start)}


def faults(row: dict[str, object]) -> int:
    """How many files of a row of counts are faults."""
    return sum(int(str(row[kind])) for kind in ("traceback", "time", "memory", "died"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="files for each reader")
    parser.add_argument("--reader", choices=sorted(READERS), action="append", help="one of the six (default: all)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for the files that are faults")
    parser.add_argument("--out", type=Path, help="JSON file for the counts; other rows in it stay")
    given = parser.parse_args()
    rows = []
    for name in given.reader or READERS:
        rows.append(fuzz(name, given.count, given.seed, given.keep))
        print(json.dumps(rows[-1]), flush=True)
    if given.out:
        old = json.loads(given.out.read_text())["rows"] if given.out.is_file() else []
        names = {(row["reader"], row["seed"]) for row in rows}
        whole = [row for row in old if (row["reader"], row["seed"]) not in names] + rows
        given.out.write_text(json.dumps({"rows": whole}, indent=1) + "\n")
    return 1 if any(faults(row) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
