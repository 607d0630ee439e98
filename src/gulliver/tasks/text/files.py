"""Text as examples: rows {"text", "source"} from files or a dataset artifact, one at a time, and a part held out.

A part is held out by characters: the last `holdout` of them, cut at a paragraph's end in a single text, between texts
where there are several.
"""

from __future__ import annotations

import json
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from gulliver.core.errors import ArtifactError, DataError
from gulliver.core.records import EXAMPLES
from gulliver.core.store.artifact import Artifact, open_artifact
from gulliver.core.store.manifest import MANIFEST
from gulliver.tasks.options import TextOptions

SUFFIXES = (".txt", ".jsonl", ".parquet")
SCHEMA = pyarrow.schema([("text", pyarrow.string()), ("source", pyarrow.string())])
BATCH_ROWS = 1024
MIN_CHARACTERS = 200
"""Shorter passages occur in many texts by chance (headings, set phrases)."""
PHRASE_END = re.compile(r"[\r\n\v\f\x85\u2028\u2029]+|(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])")


# ---- reading ------------------------------------------------------------------------------------------------------
def text_batches(source: Path, split: str, options: TextOptions) -> Iterator[pyarrow.RecordBatch]:
    """Record batches of SCHEMA with the rows of `split` ("train", "eval", or "all": nothing is held out)."""
    rows = _rows(source, split, options)
    while part := list(islice(rows, BATCH_ROWS)):
        yield pyarrow.RecordBatch.from_pylist(part, schema=SCHEMA)


def dataset_texts(dataset: Artifact, split: str) -> Iterator[str]:
    """The texts of a split of a dataset artifact, in order."""
    for row in _artifact_rows(dataset, split):
        yield row["text"]


def _rows(source: Path, split: str, options: TextOptions) -> Iterator[dict[str, str]]:
    if (source / MANIFEST).is_file():
        yield from _artifact_rows(open_artifact(source), split)
        return
    for file in text_files(source):
        for text in _part(file, split, options):
            yield {"text": text, "source": file.name}


def _part(file: Path, split: str, options: TextOptions) -> Iterator[str]:
    """The texts of one file that belong to a split. Reads the file twice: where the cut is depends on its length."""
    if split == "all":
        yield from _texts(file, options.text_column)
        return
    lengths = [len(text) for text in _texts(file, options.text_column)]
    if len(lengths) == 1:
        train, held_out = _cut(next(_texts(file, options.text_column)), options.holdout)
        if split == "train":
            yield train
        elif held_out.strip():
            yield held_out
        return
    seen = list(accumulate(lengths, initial=0))
    border = min(bisect_left(seen, (1 - options.holdout) * seen[-1]), len(lengths) - 1)
    for number, text in enumerate(_texts(file, options.text_column)):
        if (number < border) == (split == "train"):
            yield text


def text_files(path: Path) -> list[Path]:
    """The file itself, or the text files inside a folder, sorted by name. DataError when there is none."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"{path} holds no {', '.join(SUFFIXES)} file")
        return files
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a {', '.join(SUFFIXES)} file, a folder, or catalog:NAME")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path.name}: text is read from {', '.join(SUFFIXES)} files, not {path.suffix or 'this kind'}")
    return [path]


def _cut(text: str, holdout: float) -> tuple[str, str]:
    wanted = int(len(text) * (1 - holdout))
    for boundary in (re.compile(r"\n[ \t\r]*\n\s*"), re.compile(r"\n\s*"), re.compile(r"\s+")):
        found = boundary.search(text, wanted)
        if found and found.end() < len(text):
            return text[: found.end()], text[found.end() :]
    return text[:wanted], text[wanted:]


def _texts(path: Path, column: str) -> Iterator[str]:
    try:
        if path.suffix == ".txt":
            with open(path, encoding="utf-8") as stream:
                yield stream.read()
        elif path.suffix == ".jsonl":
            yield from _jsonl(path, column)
        else:
            yield from _parquet(path, column)
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 text (byte {error.start}); convert it first") from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{path.name} is not a readable Parquet file: {error}") from error


def _parquet(path: Path, column: str) -> Iterator[str]:
    names = pyarrow.parquet.read_schema(path).names
    if column not in names:
        raise DataError(f"{path.name} has no column {column!r}; it has {', '.join(names)}; say which by text_column")
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=[column]):
            for value in batch.column(0).to_pylist():
                if not isinstance(value, str):
                    raise DataError(f"{path.name}: column {column!r} holds values that are not text")
                yield value


def _jsonl(path: Path, column: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path.name} line {number} is not JSON: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                known = ", ".join(row) if isinstance(row, dict) else "no keys"
                raise DataError(f"{path.name} line {number} has no text {column!r} (it has {known}); set text_column")
            yield row[column]


def _artifact_rows(dataset: Artifact, split: str) -> Iterator[dict[str, Any]]:
    try:
        with pyarrow.parquet.ParquetFile(dataset.file(EXAMPLES)) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=["text", "split", "source"]):
                for row in batch.to_pylist():
                    if split in ("all", row.pop("split")):
                        yield row
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise ArtifactError(f"{EXAMPLES} of dataset {dataset.id[:12]} is not a table of text, split, source") from error


# ---- what may not be in two parts -----------------------------------------------------------------------------------
def paragraphs(text: str) -> Iterator[str]:
    """The units of `text`, each at least MIN_CHARACTERS long, in order; a line that is its own paragraph once."""
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            block.append(line)
            continue
        whole = "\n".join(block).strip()
        if len(whole) >= MIN_CHARACTERS:
            yield whole
        if len(block) > 1:
            yield from (inner.strip() for inner in block if len(inner.strip()) >= MIN_CHARACTERS)
        block = []


def phrases(text: str) -> Iterator[str]:
    """The lines of `text`, cut into sentences, without a difference in spaces, case or width."""
    for sentence in PHRASE_END.split(text):
        words = unicodedata.normalize("NFKC", sentence).casefold().split()
        if words:
            yield " ".join(words)
