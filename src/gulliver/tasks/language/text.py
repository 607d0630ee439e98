"""Text as examples and as tokens: reading files, holding a part out, the token stream of a split, batches.

The stream of a split is the tokenizer applied to the split's texts joined in order; a text that does not end in a
newline is followed by a blank line. For a single text it is exactly the tokenizer applied to that text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tokenizers
import torch
import transformers
from torch import Tensor

from gulliver.core.errors import ArtifactError, ConfigError, DataError
from gulliver.core.records import EXAMPLES
from gulliver.core.store.artifact import Artifact, open_artifact
from gulliver.tasks.base import Batch

SUFFIXES = (".txt", ".jsonl", ".parquet")
END_OF_TEXT = "<|end|>"
MIN_PASSAGE_CHARACTERS = 20


# ---- reading ------------------------------------------------------------------------------------------------------
def read_examples(source: str | Path, split: str, holdout: float, text_column: str) -> list[dict[str, Any]]:
    """Rows {"text", "source"} of `split` from a dataset artifact, a text file or a folder of text files."""
    if split not in ("train", "eval"):
        raise ConfigError(f"split is {split!r}; it must be 'train' or 'eval'")
    path = Path(source)
    if (path / "gulliver.json").is_file():
        return [row for row in _artifact_rows(open_artifact(path)) if row["split"] == split]
    rows: list[dict[str, Any]] = []
    for file in text_files(path):
        texts = _texts(file, text_column)
        kept = split_texts(texts, holdout)[0 if split == "train" else 1]
        rows += [{"text": text, "source": file.name} for text in kept]
    return rows


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


def split_texts(texts: list[str], holdout: float) -> tuple[list[str], list[str]]:
    """Cut off the last `holdout` fraction of characters; a single text at a paragraph's end, several between texts."""
    if not 0 <= holdout < 1:
        raise ConfigError(f"holdout is {holdout}; it must lie between 0 and 1, for example 0.1")
    if holdout == 0:
        return texts, []
    if len(texts) == 1:
        train, held_out = _cut(texts[0], holdout)
        return [train], [held_out] if held_out.strip() else []
    total, seen = sum(map(len, texts)), 0
    for number, text in enumerate(texts):
        if seen >= (1 - holdout) * total:
            return texts[:number], texts[number:]
        seen += len(text)
    return texts[:-1], texts[-1:]


def _cut(text: str, holdout: float) -> tuple[str, str]:
    wanted = int(len(text) * (1 - holdout))
    for boundary in (re.compile(r"\n[ \t\r]*\n\s*"), re.compile(r"\n\s*"), re.compile(r"\s+")):
        found = boundary.search(text, wanted)
        if found and found.end() < len(text):
            return text[: found.end()], text[found.end() :]
    return text[:wanted], text[wanted:]


def _texts(path: Path, column: str) -> list[str]:
    try:
        if path.suffix == ".txt":
            with open(path, encoding="utf-8") as stream:
                return [stream.read()]
        if path.suffix == ".jsonl":
            return _jsonl(path, column)
        names = pyarrow.parquet.read_schema(path).names
        if column not in names:
            raise DataError(
                f"{path.name} has no column {column!r}; it has {', '.join(names)}; say which by text_column"
            )
        values = pyarrow.parquet.read_table(path, columns=[column]).column(0).to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 text (byte {error.start}); convert it first") from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{path.name} is no readable Parquet file: {error}") from error
    if not all(isinstance(value, str) for value in values):
        raise DataError(f"{path.name}: column {column!r} holds values that are not text")
    return values


def _jsonl(path: Path, column: str) -> list[str]:
    texts = []
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
            texts.append(row[column])
    return texts


def _artifact_rows(dataset: Artifact) -> list[dict[str, Any]]:
    try:
        table = pyarrow.parquet.read_table(dataset.file(EXAMPLES), columns=["text", "split", "source"])
    except (pyarrow.ArrowException, KeyError) as error:
        raise ArtifactError(f"{EXAMPLES} of dataset {dataset.id[:12]} is no table of text, split, source") from error
    return table.to_pylist()


# ---- tokens -------------------------------------------------------------------------------------------------------
def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder. ArtifactError when there is none."""
    stamp = max((file.stat().st_mtime_ns for file in folder.glob("*token*")), default=0)
    return _tokenizer(str(folder), stamp)


@lru_cache(maxsize=4)
def _tokenizer(folder: str, stamp: int) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ArtifactError(f"{folder} has no usable tokenizer: {str(error).splitlines()[0]}") from error


def joined(texts: list[str]) -> str:
    """The texts as one, with a blank line after each that does not end its last line."""
    ended = [text if text.endswith("\n") else text + "\n\n" for text in texts[:-1]]
    return "".join([*ended, *texts[-1:]])


def token_stream(dataset: Artifact, split: str, folder: Path) -> Tensor:
    """All tokens of a split, int64 [n], kept in memory for the next call."""
    return _stream(str(dataset.path), dataset.id, split, load_tokenizer(folder))


@lru_cache(maxsize=4)
def _stream(path: str, dataset_id: str, split: str, tokenizer: Any) -> Tensor:
    texts = [row["text"] for row in _artifact_rows(open_artifact(path)) if row["split"] == split]
    if not texts:
        return torch.empty(0, dtype=torch.int64)
    return torch.tensor(tokenizer(joined(texts), verbose=False)["input_ids"], dtype=torch.int64)


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose token k < 256 is byte k, and whose token 256 ends a text."""
    from gulliver.tasks.language.network import BYTE_VOCABULARY

    alphabet = {character: byte for byte, character in _byte_characters().items()}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=alphabet | {END_OF_TEXT: BYTE_VOCABULARY - 1}, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END_OF_TEXT).save_pretrained(folder)


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte, which the byte-level pre-tokenizer writes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in printable}
    hidden = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + number) for number, byte in enumerate(hidden)}


# ---- batches ------------------------------------------------------------------------------------------------------
def shuffled(count: int, batch_size: int, seed: int, step: int) -> Iterator[list[tuple[int, int]]]:
    """Endless batches of (epoch, item) from `step` on; every item once per epoch, order from (seed, epoch)."""
    while True:
        places = [divmod(place, count) for place in range(step * batch_size, (step + 1) * batch_size)]
        yield [(epoch, int(_permutation(seed, epoch, count)[place])) for epoch, place in places]
        step += 1


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 1]).permutation(count)


def window_batches(stream: Tensor, tokens: int, batch_size: int, seed: int, step: int) -> Iterator[Batch]:
    """Random windows {"tokens": int64 [batch, tokens]}: a new offset each epoch, then every window once."""
    if tokens < 2:
        raise ConfigError(f"tokens is {tokens}; a window needs at least 2")
    if len(stream) < tokens:
        raise DataError(
            f"the split has {len(stream)} tokens, one window needs {tokens}; give more text or fewer tokens"
        )
    slack = min(tokens - 1, len(stream) - tokens)
    count = (len(stream) - slack) // tokens
    for places in shuffled(count, batch_size, seed, step):
        starts = [_offset(seed, epoch, slack) + item * tokens for epoch, item in places]
        yield {"tokens": torch.stack([stream[start : start + tokens] for start in starts])}


@lru_cache(maxsize=64)
def _offset(seed: int, epoch: int, slack: int) -> int:
    return int(np.random.default_rng([seed, epoch, 2]).integers(0, slack + 1))


def passages(dataset: Artifact, split: str) -> list[str]:
    """The lines of a split's texts that are long enough to mean something, for sentence encoders."""
    rows = [row for row in _artifact_rows(open_artifact(dataset.path)) if row["split"] == split]
    lines = (line.strip() for row in rows for line in row["text"].splitlines())
    return [line for line in lines if len(line) >= MIN_PASSAGE_CHARACTERS]


def encode_texts(texts: list[str], folder: Path, tokens: int) -> Batch:
    """Padded texts {"tokens", "mask"}, int64 [batch, longest], cut to the model's own limit and to `tokens`."""
    limit = min(tokens, _max_tokens(folder))
    tokenizer = load_tokenizer(folder)
    coded = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt", verbose=False)
    return {"tokens": coded["input_ids"], "mask": coded["attention_mask"]}


def _max_tokens(folder: Path) -> int:
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("config.json", "max_position_embeddings")):
        if (folder / name).is_file():
            value = json.loads((folder / name).read_text(encoding="utf-8")).get(key)
            if isinstance(value, int) and value > 0:
                return value
    return 512


def passage_batches(
    texts: list[str], folder: Path, tokens: int, batch_size: int, seed: int, step: int
) -> Iterator[Batch]:
    """Batches of padded passages; every passage once per epoch."""
    if not texts:
        raise DataError(f"the split has no line of {MIN_PASSAGE_CHARACTERS} characters or more; give more text")
    for places in shuffled(len(texts), batch_size, seed, step):
        yield encode_texts([texts[item] for _, item in places], folder, tokens)
