"""Reading labelled images, and cutting them into a train and an eval part that share no image.

Understood: a dataset artifact (`examples.parquet`), a parquet file with columns image (list of floats in [0, 1]), label
(whole number) and perhaps split ("train" or "eval"), and the csv (or csv.gz) in which scikit-learn carries its digits
(64 pixels of 0 ... 16, then the label).

The cut depends on contents alone, not on the order of the file: images are grouped by their bytes, groups of one label
are ordered by the SHA-256 of seed and bytes, and the first 30 % of each label's images are held out.
"""

from __future__ import annotations

import gzip
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gulliver.core.errors import DataError
from gulliver.core.foreign import foreign
from gulliver.core.records import EXAMPLES, SPLITS
from gulliver.core.store.artifact import MANIFEST, open_artifact
from gulliver.tasks.parquet import read_table

EVAL_FRACTION = 0.3
SPLIT_SEED = 0
DIGITS_PIXELS, DIGITS_LEVELS = 64, 16
MAX_CSV_BYTES = 2**26
"""A hundred times what the digits take."""


@dataclass(frozen=True)
class Examples:
    """`images` float32 [n, pixels] in [0, 1], row-major; `labels` int64 [n]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def data_hash(self) -> str:
        """SHA-256 of pixels and labels, 64 hex digits."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images, "<f4").tobytes())
        digest.update(np.ascontiguousarray(self.labels, "<i8").tobytes())
        return digest.hexdigest()

    def take(self, rows: np.ndarray) -> Examples:
        """The examples at `rows` (indices, or a mask [examples]), in that order."""
        return Examples(self.images[rows], self.labels[rows])


def read_split(source: str | Path, split: str) -> Examples:
    """The examples of `split` in `source`. DataError for what cannot be read, and for an image in both splits."""
    if split not in SPLITS:
        raise DataError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    examples, names = _read(Path(source))
    held_out = split_by_content(examples) if names is None else names == "eval"
    trained = {image.tobytes() for image in examples.images[~held_out]} if names is not None else ()
    both = sum(image.tobytes() in trained for image in examples.images[held_out]) if trained else 0
    if both:
        raise DataError(f"{source}: {both} images of the eval split are also in the train split; remove them from one")
    return examples.take(held_out if split == "eval" else ~held_out)


def split_by_content(examples: Examples, seed: int = SPLIT_SEED, fraction: float = EVAL_FRACTION) -> np.ndarray:
    """Which examples are held out, bool [n]: about `fraction` of each label, equal images always together."""
    groups: dict[bytes, list[int]] = {}
    for index, image in enumerate(examples.images):
        groups.setdefault(image.tobytes(), []).append(index)
    held_out = np.zeros(len(examples), dtype=bool)
    by_label: dict[int, list[tuple[bytes, list[int]]]] = {}
    for image, rows in groups.items():
        key = hashlib.sha256(f"{seed}:".encode() + image).digest()
        by_label.setdefault(int(examples.labels[rows].min()), []).append((key, rows))
    for members in by_label.values():
        wanted = fraction * sum(len(rows) for _, rows in members)
        taken = 0
        for _, rows in sorted(members):
            if taken + len(rows) / 2 > wanted:
                break
            held_out[rows] = True
            taken += len(rows)
    return held_out


def _read(path: Path) -> tuple[Examples, np.ndarray | None]:
    """All examples, and the name of each one's split where the source has them."""
    if (path / MANIFEST).is_file():
        artifact = open_artifact(path)
        if artifact.kind != "dataset" or artifact.task != "vision":
            raise DataError(f"{path} is a {artifact.kind} for {artifact.task}; give a vision dataset")
        return _read_parquet(artifact.file(EXAMPLES))
    if not path.is_file():
        raise DataError(f"{path} is not a file or a dataset artifact; give a .parquet, a digits .csv, or a dataset")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.name.endswith((".csv", ".csv.gz")):
        return _read_digits(path), None
    raise DataError(f"{path.name} holds no images that vision can read; give a .parquet or a digits .csv")


def _read_parquet(path: Path) -> tuple[Examples, np.ndarray | None]:
    table = read_table(path, ("image", "label"))
    for column in ("image", "label"):
        if table[column].null_count:
            raise DataError(f"{path}: column {column!r} has empty cells; leave those rows out")
    examples = _checked(_pixels(table["image"], path), table["label"], path)
    if "split" not in table.column_names:
        return examples, None
    names = np.asarray([str(name)[:40] for name in table["split"].to_pylist()], dtype=object)
    strange = sorted({repr(name) for name in names} - {repr(name) for name in SPLITS})
    if strange:
        raise DataError(f"{path}: column 'split' holds {strange[0]}; it may hold {' and '.join(SPLITS)}")
    return examples, names


def _pixels(column: pa.ChunkedArray, path: Path) -> np.ndarray:
    """float32 [n, pixels] of a column of equally long lists."""
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise DataError(f"{path}: column 'image' is {kind}; it must be a list of numbers from 0 to 1")
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()  # type: ignore[attr-defined]
    if len(lengths) > 1 or 0 in lengths:
        raise DataError(f"{path}: images have {sorted(lengths)[:4]} pixels; all must have the same number")
    flat = pc.list_flatten(column)  # type: ignore[attr-defined]
    if flat.null_count or not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)):
        raise DataError(f"{path}: column 'image' must be a list of numbers from 0 to 1, none of them empty")
    width = lengths[0] if lengths else 0
    return flat.to_numpy().astype(np.float32).reshape(len(column), width)


def _read_digits(path: Path) -> Examples:
    unpacked = gzip.open if path.name.endswith(".gz") else open
    with foreign(f"{path} cannot be read as csv", DataError), unpacked(path, "rb") as whole:
        text = whole.read(MAX_CSV_BYTES + 1)
        if len(text) > MAX_CSV_BYTES:
            raise DataError(f"{path} unpacks to more than {MAX_CSV_BYTES:,} bytes; give a .parquet of the images")
        table = np.loadtxt(io.BytesIO(text), delimiter=",", ndmin=2)
    if table.shape[1] != DIGITS_PIXELS + 1:
        raise DataError(f"{path} has {table.shape[1]} columns; a digits csv has {DIGITS_PIXELS} pixels and a label")
    labels = table[:, -1]
    if not np.array_equal(labels, labels.astype(np.int64)):
        raise DataError(f"{path}: the last column must be the label, a whole number")
    return _checked((table[:, :-1] / DIGITS_LEVELS).astype(np.float32), pa.array(labels.astype(np.int64)), path)


def _checked(images: np.ndarray, labels: pa.Array | pa.ChunkedArray, path: Path) -> Examples:
    if not pa.types.is_integer(labels.type):
        raise DataError(f"{path}: column 'label' is {labels.type}; it must be a whole number from 0")
    numbers = labels.to_numpy().astype(np.int64)
    if len(numbers) and numbers.min() < 0:
        raise DataError(f"{path}: a label is {numbers.min()}; labels count from 0")
    if not np.isfinite(images).all() or (images.size and (images.min() < 0.0 or images.max() > 1.0)):
        raise DataError(f"{path}: pixels must lie between 0 and 1; scale them")
    return Examples(images + 0.0, numbers)
