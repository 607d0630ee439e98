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

from gulliver.core.errors import ArtifactError, DataError
from gulliver.core.foreign import files_below, foreign
from gulliver.core.records import EXAMPLES
from gulliver.core.store.artifact import Artifact, open_artifact
from gulliver.core.store.manifest import MANIFEST
from gulliver.tasks.options import TextOptions
from gulliver.tasks.parquet import rows_of

SUFFIXES = (".txt", ".jsonl", ".parquet")
SCHEMA = pyarrow.schema([("text", pyarrow.string()), ("source", pyarrow.string())])
BATCH_ROWS = 1024
MAX_LINE = 2**26
"""Characters of one line of JSON."""
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
        files = [file for file in files_below(path, DataError) if file.suffix in SUFFIXES]
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
    if path.suffix == ".parquet":
        yield from _parquet(path, column)
        return
    try:
        if path.suffix == ".txt":
            with open(path, encoding="utf-8") as stream:
                yield stream.read()
        else:
            yield from _jsonl(path, column)
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 text (byte {error.start}); convert it first") from error


def _parquet(path: Path, column: str) -> Iterator[str]:
    for row in rows_of(path, [column]):
        if not isinstance(row[column], str):
            told = f"{path.name}: column {column!r} holds values that are not text"
            raise DataError(f"{told}; say which column does by text_column")
        yield row[column]


def _jsonl(path: Path, column: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE), ""), 1):
            if not line.strip():
                continue
            if len(line) == MAX_LINE:
                raise DataError(f"{path.name} line {number} has more than {MAX_LINE:,} characters; cut its text")
            with foreign(f"{path.name} line {number} is not JSON", DataError):
                row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                known = ", ".join(map(repr, row))[:300] if isinstance(row, dict) else "no keys"
                raise DataError(f"{path.name} line {number} has no text {column!r} (it has {known}); set text_column")
            if not row[column].isascii():
                with foreign(f"{path.name} line {number} holds half a character (a lone surrogate)", DataError):
                    row[column].encode()
            yield row[column]


def _artifact_rows(dataset: Artifact, split: str) -> Iterator[dict[str, Any]]:
    path = dataset.file(EXAMPLES)
    try:
        for row in rows_of(path, ["text", "split", "source"], ArtifactError):
            if not all(isinstance(value, str) for value in row.values()):
                raise ArtifactError("a value is not text")
            if split in ("all", row.pop("split")):
                yield row
    except ArtifactError as error:
        told = f"{EXAMPLES} of dataset {dataset.id[:12]} is not a table of text, split, source"
        raise ArtifactError(f"{told}: {error}") from error


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
