"""Which format each weight gets: a multiple-choice knapsack.

With b bytes, D the predicted increase of the loss and x in {0, 1}, for items i and formats f:

    minimise  Σ D[i, f] x[i, f]    subject to  Σ b[i, f] x[i, f] <= budget,   Σ_f x[i, f] = 1 for every item i

solved exactly by HiGHS (Huangfu and Hall, Parallelizing the dual revised simplex method, 2018).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from gulliver.core.records import PlannedPoint
from gulliver.core.stdout import stdout_into
from gulliver.runtime.formats import Format

TABLE_BITS, FORBIDDEN = 3, 1e3
"""Fewest bits of a lookup table's rows unless nothing else fits: rows that calibration hardly reads cost a text of
another language far more than is predicted. Fewer bits cost FORBIDDEN times the mean loss increase."""
FRONTIER_POINTS = 12
GAP = 1e-4
ENTRY_BYTES = 96
"""Room for one tensor's entry in a safetensors header beside its name: dtype, shape and offsets, written out."""


@dataclass(frozen=True)
class Item:
    """Something that gets one format: `rows` of a weight, with a predicted loss increase for each format."""

    name: str
    rows: int
    columns: int
    loss_increases: tuple[float, ...]
    table: bool = False
    alike: str = ""  # what those have in common that must get one format; "" where it is free

    def bytes(self, fmt: Format) -> int:
        """Bytes in the weight files, at most, the header's entries (tiles, codebook, list of rows) included."""
        entries = (len(self.name) + 16 + ENTRY_BYTES) * (3 if fmt.kind in ("codebook", "symmetric") else 2)
        return fmt.packed_bytes(self.rows, self.columns) + entries


def sizes_of(items: Sequence[Item], formats: Sequence[Format]) -> np.ndarray:
    """Bytes of every item in every format, float64 [items, formats]; infinite where it cannot hold its rows."""
    return np.array([[item.bytes(fmt) if fmt.holds(item.columns) else np.inf for fmt in formats] for item in items])


def solve(items: Sequence[Item], formats: Sequence[Format], budget_bytes: int) -> list[int] | None:
    """The index of each item's format, or None when even the smallest formats are too large."""
    sizes = alike(items, sizes_of(items, formats))
    if sizes.min(1).sum() > budget_bytes:
        return None
    count, width = sizes.shape
    rows = np.repeat(np.arange(count), width)
    one_each = csr_matrix((np.ones(count * width), (rows, np.arange(count * width))))
    held = np.isfinite(sizes).ravel()
    costs = np.where(held, alike(items, np.array([item.loss_increases for item in items])).ravel(), 0.0)
    weights = np.where(held, sizes.ravel(), 0.0)
    scale = costs.sum() / len(costs) or 1.0
    barred = np.array([[one.table and fmt.bits < TABLE_BITS for fmt in formats] for one in items], np.float64)
    costs += FORBIDDEN * scale * alike(items, barred).ravel()
    with open(os.devnull, "wb") as nowhere, stdout_into(nowhere.fileno()):  # HiGHS chatters past Python
        found = milp(
            costs / scale,
            constraints=[
                LinearConstraint(csr_matrix(weights[None] / 1e6), -np.inf, budget_bytes / 1e6),
                LinearConstraint(one_each, 1, 1),
            ],
            integrality=np.ones(count * width),
            bounds=Bounds(np.zeros(count * width), held.astype(np.float64)),  # type: ignore[arg-type]
            options={"mip_rel_gap": GAP, "time_limit": 30.0},
        )
    assert found.x is not None, f"HiGHS found no plan within {budget_bytes} bytes: {found.message}"
    chosen = found.x.reshape(count, width).argmax(1)
    assert sizes[np.arange(count), chosen].sum() <= budget_bytes + 1, "the solver's plan is larger than the budget"
    return [int(chosen[number]) for number in numbers(items)]


def numbers(items: Sequence[Item]) -> list[int]:
    """The number of each item's decision; those that must be alike share one."""
    keys = [item.alike or f"\0{place}" for place, item in enumerate(items)]
    places = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [places[key] for key in keys]


def alike(items: Sequence[Item], table: np.ndarray) -> np.ndarray:
    """A row for each decision, the sum of its items' rows of `table` [items, formats]."""
    which = numbers(items)
    found = np.zeros((max(which) + 1, table.shape[1]))
    np.add.at(found, which, table)
    return found


def point(items: Sequence[Item], formats: Sequence[Format], chosen: Sequence[int], fixed: int) -> PlannedPoint:
    """Bytes of all weight files and predicted loss increase of a choice."""
    pairs = list(zip(items, chosen, strict=True))
    return PlannedPoint(
        size_bytes=fixed + sum(item.bytes(formats[index]) for item, index in pairs),
        loss_increase=sum(item.loss_increases[index] for item, index in pairs),
    )


def frontier(items: Sequence[Item], formats: Sequence[Format], fixed: int) -> Iterator[PlannedPoint]:
    """The best plans at evenly spread budgets, from the smallest that is possible to the largest."""
    sizes = sizes_of(items, formats)
    least, most = (
        int(np.ceil(alike(items, sizes).min(1).sum())),
        int(np.where(np.isfinite(sizes), sizes, 0).max(1).sum()),
    )
    for share in np.linspace(0.0, 1.0, FRONTIER_POINTS):
        chosen = solve(items, formats, int(least + share * (most - least)) + 1)
        assert chosen is not None
        yield point(items, formats, chosen, fixed)
