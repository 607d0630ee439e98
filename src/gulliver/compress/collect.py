"""What `calibrate` keeps of what it saw: for each weight its moments and row weights, or why it is left at 16 bits.

Calibration data need not reach everything. A matrix that it did not reach (an expert that no token was sent to) gets
the mean of what is known about its likes: the other matrices of its stack, or the weights of its block whose names
differ in numbers only and whose shapes are equal. Row weights that the backward pass did not give are such means too.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from gulliver.compress.observe import slot_of, table_slot
from gulliver.compress.products import CUT
from gulliver.compress.statistics import ROWS
from gulliver.core.records import WeightRow
from gulliver.core.store.manifest import rows_of
from gulliver.runtime.formats import Format
from gulliver.runtime.shards import save
from gulliver.tasks.base import Block

SMALLEST = Format(4, 32, "uniform")
"""A weight stays at 16 bits that is not smaller in this format, or has fewer inputs than one of its groups."""
UNREACHED = "calibration saw no product with it: it is used otherwise, or no data reached it"
SMALL = "so small that packing would add bytes"
ELSEWHERE = 0.3
"""How much of what rows of a table matter is set aside for data unlike those of calibration."""
TWO_WAYS = "it is multiplied along two of its dimensions"


@dataclass
class Kept:
    """The rows of the table, and what is to be told: names of weights left at 16 bits, and of those not reached."""

    weights: dict[str, WeightRow] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)
    unreached: dict[str, str] = field(default_factory=dict)


class Collector:
    """Joins the files of all blocks; `chosen` are squared output gradients by slot, None: outputs count by power."""

    def __init__(self, network: nn.Module, chosen: Mapping[str, Tensor] | None, work: Path, folder: Path) -> None:
        self._network, self._chosen, self._folder = network, chosen, folder
        self._home: dict[str, tuple[str, str]] = {}  # slot -> (file, key) of its moment
        self._counts: dict[str, Tensor] = {}
        self._energies: dict[str, Tensor] = {}
        self._power: dict[str, float] = {}
        self._inputs: dict[str, set[int]] = {}
        self._odd: set[str] = set()
        self._likely: dict[str, Tensor] = {}  # probabilities of the network's own outputs, summed over positions
        self._expected: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}
        for path in sorted(work.glob("block-*.safetensors")):
            self._read(path)

    def _read(self, path: Path) -> None:
        stored = load_file(path)
        large = path.with_name(path.name.replace("block-", "moments-"))
        for key, tensor in stored.items():
            kind, _, name = key.partition(":")
            if kind == "leader":
                leader, _, name = name.partition(":")
                self._home[name] = (large.name, f"moment:{leader}")
            elif kind == "count":
                self._counts[name] = self._counts.get(name, torch.zeros(())) + tensor
            elif kind == "energy":
                self._energies[name] = tensor
            elif kind == "power":
                self._power[name] = self._power.get(name, 0.0) + float(tensor)
            elif kind == "inputs":
                self._inputs.setdefault(name, set()).update(tensor.tolist())
            elif kind == "odd":
                self._odd.add(name)
            elif kind in ("likely", "expected"):
                (self._likely if kind == "likely" else self._expected)[name] = tensor
        if large.is_file():
            same_file(large, self._folder / large.name)

    def collect(self, blocks: Sequence[Block]) -> Kept:
        """The rows of all weights; their row weights go to the artifact's file ROWS."""
        kept = Kept()
        for block in blocks:
            for name in block.weights:
                row = self._row(name, block, kept)
                if isinstance(row, WeightRow):
                    kept.weights[name] = row
                else:
                    kept.plain[name] = row
        save(self._rows, self._folder / ROWS)
        return kept

    def _row(self, name: str, block: Block, kept: Kept) -> WeightRow | str:
        """The weight's row, or the reason why it has none."""
        shape = tuple(self._network.get_parameter(name).shape)
        likes = [one for one in self._likes(name, block) if one in self._inputs]
        seen = self._inputs.get(name) or (self._inputs[likes[0]] if likes else set())
        if name in self._odd or len(seen) != 1:
            return CUT if name in self._odd else TWO_WAYS if seen else UNREACHED
        dim = next(iter(seen))
        inputs = None if dim < 0 or (len(shape) == 2 and dim == 1) else dim
        rows = rows_of(shape, inputs)
        columns = torch.Size(shape).numel() // rows
        if columns < SMALLEST.group_size or SMALLEST.packed_bytes(rows, columns) >= 2 * rows * columns:
            return SMALL
        matrices = shape[0] if len(shape) == 3 and inputs else 1
        slots = [slot_of(name, number) for number in range(matrices)] if matrices > 1 else [name]
        uses = []
        if name in self._counts or name in self._energies:
            self._rows[f"moment:{name}"] = self._outputs(table_slot(name), [], columns)
            known = self._counts.get(name)
            read = shares(self._energies[name]) if known is None else elsewhere(self._frequencies(known))
            self._rows[f"rows:{table_slot(name)}"] = read
            uses.append((ROWS, f"moment:{name}", f"rows:{table_slot(name)}"))
        if matrices == 1 and len(shape) == 3 and inputs:
            slots = [slot_of(name, 0)]
        missing = [slot for slot in slots if slot not in self._home]
        if missing and uses:
            slots = []
        elif missing:
            others = [slot for slot in slots if slot in self._home]
            others = others or [slot for slot in likes if slot in self._home]
            if not others:
                return UNREACHED
            self._rows[f"moment:{name}@mean"] = self._mean_moment(others)
            kept.unreached[name] = _told(missing, slots)
            likes = others
        siblings = slots if matrices > 1 else likes
        for slot in slots:
            self._rows[f"rows:{slot}"] = self._outputs(slot, siblings, rows // matrices)
            uses.append((*self._home.get(slot, (ROWS, f"moment:{name}@mean")), f"rows:{slot}"))
        return WeightRow(shape=shape, block=block.name, uses=tuple(uses), inputs=inputs, matrices=matrices)

    def _likes(self, name: str, block: Block) -> Iterator[str]:
        """Other weights of the block whose names differ in numbers only, of the same shape."""
        pattern = re.compile(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)))
        shape = self._network.get_parameter(name).shape
        for other in block.weights:
            if other != name and pattern.fullmatch(other) and self._network.get_parameter(other).shape == shape:
                yield other

    def _mean_moment(self, slots: Sequence[str]) -> Tensor:
        """The mean of the moments of these slots, [columns, columns] or [columns]."""
        total, homes = torch.zeros(()), [self._home[slot] for slot in slots]
        for file, key in homes:
            with safe_open(self._folder / file, framework="pt") as opened:
                total = total + opened.get_tensor(key) / len(homes)
        return total

    def _frequencies(self, counts: Tensor) -> Tensor:
        """How often each row of a table is looked up, float32 [rows], sum 1.

        Where the network says how likely each row comes next, every position of calibration counts as one more, cut
        into these shares: that tells rows apart that were not seen.
        """
        likely = next((one for one in self._likely.values() if len(one) == len(counts)), None)
        return frequencies(counts) if likely is None else (counts + likely) / (counts.sum() + likely.sum())

    def _outputs(self, slot: str, siblings: Sequence[str], width: int) -> Tensor:
        """How much each of the slot's outputs matters, float32 [width].

        Of the network's own outputs the squared gradients that are expected: those of the tokens that did come are a
        sample of them, which says next to nothing of rare ones. Their sum is kept, since logits may be scaled.
        """
        found, expected = self._observed(slot, siblings, width), self._expected.get(slot)
        if expected is None or len(expected) != width or not float(expected.sum()) > 0:
            return found
        return elsewhere(expected * (found.sum() / expected.sum()))

    def _observed(self, slot: str, siblings: Sequence[str], width: int) -> Tensor:
        """The squared output gradients that were seen, or the power of the outputs; float32 [width]."""
        if self._chosen is None:
            known = [self._power[one] for one in siblings if one in self._power]
            mean = sum(known) / len(known) if known else 0.0
            return torch.full((width,), 1.0 / (width * max(self._power.get(slot, mean), 1e-20)))
        found = self._chosen.get(slot)
        if found is None:
            known = [self._chosen[one] for one in siblings if one in self._chosen and len(self._chosen[one]) == width]
            if not known:
                known = [torch.full((width,), float(one.mean())) for one in self._chosen.values()]
            found = torch.stack(known).mean(0) if known else torch.ones(width)
        return found


def frequencies(counts: Tensor) -> Tensor:
    """How often each row of a table is looked up in text like that in which it was counted, float32 [rows], sum 1.

    Rows not seen share what those seen once made up (Good, The population frequencies of species and the estimation of
    population parameters, 1953), at most half.
    """
    total, unseen = counts.sum().clamp_min(1), counts == 0
    if not unseen.any():
        return counts / total
    missing = ((counts == 1).sum().clamp_min(1) / total).clamp_max(0.5)
    return torch.where(unseen, missing / unseen.sum(), counts / total * (1 - missing))


def elsewhere(rows: Tensor) -> Tensor:
    """What rows [rows] of a table or of the outputs matter here, and, a part ELSEWHERE of their sum, in other data.

    There rare ones are frequent and frequent ones rare: that part is in proportion to square roots.
    """
    roots = rows.clamp_min(0).sqrt()
    return rows * (1 - ELSEWHERE) + roots * (ELSEWHERE * rows.sum() / roots.sum().clamp_min(1e-30))


def shares(energies: Tensor) -> Tensor:
    """How much rows count that are weighed with numbers of these mean squares [rows]; those not reached as others."""
    seen = energies > 0
    return torch.where(seen, energies, energies[seen].mean()) if bool(seen.any()) else torch.ones_like(energies)


def leave(stored: Mapping[str, Tensor], work: Path, number: int) -> None:
    """Put what was seen of block `number`, tensors of any shape, where a Collector finds it: moments, which are large,

    in a file of their own.
    """
    moments = {key: tensor for key, tensor in stored.items() if key.startswith("moment:")}
    if moments:
        save(moments, work / f"moments-{number:04}.safetensors")
    save({key: tensor for key, tensor in stored.items() if key not in moments}, work / f"block-{number:04}.safetensors")


def same_file(source: Path, target: Path) -> None:
    """Make `target` the file `source` under another name, or a copy of it where the disk has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _told(missing: Sequence[str], slots: Sequence[str]) -> str:
    """What is said about the matrices of a weight that no data reached."""
    if len(slots) == 1:
        return "no calibration data passed through it; it gets the mean of its likes"
    numbers = ", ".join(slot.rpartition("@")[2] for slot in missing[:8]) + (", …" if len(missing) > 8 else "")
    return (
        f"no calibration data passed through {len(missing)} of its {len(slots)} matrices ({numbers}); they get the mean"
    )
