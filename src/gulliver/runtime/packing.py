"""packing.json: which weights of a model folder are packed, and how. Knows no torch; docs/artifact.md has the rules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.store.manifest import PACKING, read_json, rows_of
from gulliver.nets.files import stored_tensors
from gulliver.runtime.formats import KEPT_BITS, Format

FORMAT = 1
MAX_PARTS = 16
MAX_DIMENSIONS = 8
MAX_PACKING_BYTES = 64 * 2**20

PIECE = re.compile(r"\.(?:(?:tiles|codebook)\.\d+|rows)$")  # the end of a stored name that belongs to a packed weight
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.(.*)")
_LAYER_ORDER = (
    *("input_layernorm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "gate_proj", "up_proj", "down_proj", "post_feedforward_layernorm"),
)
"""How Llama and its relatives name the parts of a layer, in the order of use.

The one list of names here: it decides only where tensors are in a file. Those of other networks follow by name.
"""
_USE = {name: place for place, name in enumerate(_LAYER_ORDER)}


def order_of_use(name: str) -> tuple[int, int, int, str]:
    """Sorts names of (stored) tensors as a decoder reads them: embedding, layer by layer, final norm, head.

    Inside a layer: norm, q, k, v, o, norm, gate, up, down. What has no known place comes in the order of its name.
    """
    layer = _LAYER.search(name)
    if layer:
        place = next((_USE[part] for part in layer[2].split(".") if part in _USE), len(_USE))
        return 1, int(layer[1][:9]), place, name
    return 0 if "embed" in name else 3 if "head" in name else 2 if "norm" in name else 1, 0, len(_USE), name


def is_packed(folder: Path) -> bool:
    """Whether the model in `folder` has packed weights."""
    return (folder / PACKING).is_file()


def is_compressed(folder: Path) -> bool:
    """Whether weights were packed by a step; other tools' blocks, kept as they came, are what a model was pulled as."""
    return is_packed(folder) and any(
        fmt.kind not in KEPT_BITS for entry in read_packing(folder).values() for fmt, _ in entry.parts
    )


@dataclass(frozen=True)
class Entry:
    """One packed weight: its shape, (format, rows) of each part, and the dimension of its inputs (see `as_matrix`)."""

    shape: tuple[int, ...]
    parts: list[tuple[Format, int]]
    inputs: int | None = None

    @property
    def columns(self) -> int:
        """Inputs of a row."""
        return math.prod(self.shape[1:]) if self.inputs is None else self.shape[self.inputs]


def read_packing(folder: Path) -> dict[str, Entry]:
    """The packed weights by name, from packing.json. ArtifactError when it breaks a rule."""
    path = folder / PACKING
    if path.stat().st_size > MAX_PACKING_BYTES:
        raise ArtifactError(f"{path} has {path.stat().st_size} bytes; at most {MAX_PACKING_BYTES} are allowed")
    body = read_json(path.read_bytes(), PACKING)
    if not isinstance(body, dict) or set(body) != {"format", "tensors"} or not isinstance(body["tensors"], dict):
        raise ArtifactError(f"{path} must hold format and tensors, nothing else; it is damaged")
    if type(body["format"]) is not int or body["format"] != FORMAT:
        raise ArtifactError(f"{path} has format {body['format']!r}; this Gulliver reads {FORMAT}: upgrade it")
    return {name: _entry(row, f"{PACKING}: {name[:200]}") for name, row in body["tensors"].items()}


def _entry(row: Any, what: str) -> Entry:
    if not isinstance(row, dict) or set(row) - {"inputs"} != {"shape", "parts"}:
        raise ArtifactError(f"{what} must hold shape and parts; the file is damaged")
    shape, parts, inputs = row["shape"], row["parts"], row.get("inputs")
    sized = isinstance(shape, list) and 2 <= len(shape) <= MAX_DIMENSIONS
    if not sized or not all(type(size) is int and size > 0 for size in shape):
        raise ArtifactError(f"{what}: shape is {str(shape)[:80]}; it must be 2 to {MAX_DIMENSIONS} positive sizes")
    if not isinstance(parts, list) or not 1 <= len(parts) <= MAX_PARTS:
        raise ArtifactError(f"{what} must have 1 to {MAX_PARTS} parts; the file is damaged")
    if inputs is not None and (type(inputs) is not int or not 0 <= inputs < len(shape)):
        raise ArtifactError(f"{what}: inputs is {str(inputs)[:80]}; it must be one of the {len(shape)} dimensions")
    found, wanted = [_part(part, what) for part in parts], rows_of(shape, inputs)
    if min(rows for _, rows in found) < 1 or sum(rows for _, rows in found) != wanted:
        raise ArtifactError(f"{what}: its parts have {[rows for _, rows in found]} rows, the weight has {wanted}")
    return Entry(tuple(shape), found, inputs)


def _part(part: Any, what: str) -> tuple[Format, int]:
    match part:
        case {"format": str(name), "rows": int(rows)} if len(part) == 2 and not isinstance(rows, bool):
            try:
                found = Format.parse(name)
            except ConfigError as error:
                raise ArtifactError(f"{what}: {error}") from error
            if found.tiles != found:
                raise ArtifactError(f"{what}: {name} is stored as {found.tiles.name}; the file is damaged")
            return found, rows
    told = "a part must hold format and rows; its format must be text, its rows a number"
    raise ArtifactError(f"{what}: {told}; the file is damaged")


def stored_names(name: str, parts: list[tuple[Format, int]]) -> Iterator[str]:
    """The names under which the weight files hold a packed weight's pieces."""
    for index, (fmt, _) in enumerate(parts):
        yield f"{name}.tiles.{index}"
        if fmt.kind == "codebook":
            yield f"{name}.codebook.{index}"
    if len(parts) > 1:
        yield f"{name}.rows"


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of a model folder by name: what a packed one is unpacked to, a plain one as stored."""
    packing = read_packing(folder) if is_packed(folder) else {}
    pieces = {piece for name, entry in packing.items() for piece in stored_names(name, entry.parts)}
    plain = {name: tensor.shape for name, tensor in stored_tensors(folder).items() if name not in pieces}
    return plain | {name: entry.shape for name, entry in packing.items()}
