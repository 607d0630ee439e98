"""Watching products while calibration data pass: second moments of their inputs, squared gradients at their outputs.

A *slot* is what has a moment and row weights of its own: a weight's name, NAME@3 for the fourth matrix of a stack
(experts), NAME@table for a table of which rows are looked up (an embedding may be both a table and the head).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from gulliver.compress.products import Product, Watch

STRIP = 256
POWER_ROWS = 256
"""Rows of an output, at least, that tell its power."""
STACK_BYTES = 2**30
"""Most bytes of one stack's moments; beyond, all its matrices share one."""


def slot_of(name: str, matrix: int | None) -> str:
    """The slot of a weight that is one matrix (None), or of one of its matrices."""
    return name if matrix is None else f"{name}@{matrix}"


def table_slot(name: str) -> str:
    """The slot of a weight as a table."""
    return f"{name}@table"


class Moments:
    """Accumulates H over the batches of one block; a context manager. Slots that read the same tensor share one H.

    `full` keeps H [columns, columns], else its diagonal. `shared` maps a slot to the key of its H; `tables` counts how
    often each row of a lookup table was read, `energies` sums the squares of what rows were weighed with (and counts
    how often any were); `inputs` says along which dimensions a weight was multiplied.
    """

    def __init__(self, weights: Mapping[str, Tensor], full: bool) -> None:
        self.full = full
        self.sums: dict[str, Tensor] = {}
        self.positions: dict[str, int] = {}
        self.shared: dict[str, str] = {}
        self.tables: dict[str, Tensor] = {}
        self.energies: dict[str, tuple[Tensor, int]] = {}
        self.power: dict[str, tuple[float, int]] = {}
        self.inputs: dict[str, set[int | None]] = {}
        self.likely: dict[str, tuple[Tensor, Tensor]] = {}
        self.mask: Tensor | None = None
        self._weights = weights
        self._half = False
        self._seen: list[tuple[Tensor, int, str]] = []
        self._watch = Watch(weights, self._product)

    def __enter__(self) -> Moments:
        self._watch.__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        self._watch.__exit__(*failure)

    @property
    def widest(self) -> int:
        """Most rows of a weight that has its numbers."""
        return max((len(weight) for weight in self._weights.values() if not weight.is_meta), default=1)

    def begin(self, mask: Tensor | None) -> None:
        """Say that a batch, or the next positions of one, comes next; what `mask` [batch, tokens] hides counts not."""
        self._seen = []
        self.mask = None if mask is None else mask.bool()

    def expect(self, outputs: tuple[Tensor, Tensor] | None) -> None:
        """Add what a chunk of the network's outputs says of its last weight, [rows] each (see `Task.expected`)."""
        if outputs is None or self.mask is not None:
            return
        for name in self.inputs:
            if len(self._weights[name]) == len(outputs[0]) and self._weights[name].dim() == 2:
                before = self.likely.get(name, (0, 0))
                self.likely[name] = (before[0] + outputs[0], before[1] + outputs[1])

    def stored(self) -> dict[str, Tensor]:
        """What one block's file holds, given away: means "moment:KEY" [columns, columns] or [columns], empty marks

        "leader:KEY:SLOT" of who shares which, "count:NAME" and "energy:NAME" [rows of the table], scalars
        "power:SLOT" [1], "inputs:NAME" (dimensions, -1 for all but the first), "odd:NAME" (see `Watch`), and of the
        weight whose outputs are the network's own "likely:NAME" and "expected:NAME" [rows] (see `expect`).
        """
        tensors = {}
        for key in list(self.sums):
            mean = self.sums.pop(key).div_(max(1, self.positions[key]))
            tensors[f"moment:{key}"] = mirrored(mean) if self.full else mean
        tensors |= {f"leader:{key}:{slot}": torch.zeros(1) for slot, key in self.shared.items()}
        tensors |= {f"count:{name}": counts for name, counts in self.tables.items()}
        tensors |= {f"energy:{name}": total / max(1, count) for name, (total, count) in self.energies.items()}
        dims = {name: sorted(-1 if dim is None else dim for dim in found) for name, found in self.inputs.items()}
        tensors |= {f"inputs:{name}": torch.tensor(found) for name, found in dims.items()}
        for name, (likely, expected) in self.likely.items():
            tensors |= {f"likely:{name}": likely, f"expected:{name}": expected}
        tensors |= {f"odd:{name}": torch.zeros(1) for name in self._watch.odd}
        return tensors | {f"power:{slot}": torch.tensor([total / count]) for slot, (total, count) in self.power.items()}

    def _product(self, product: Product, output: Tensor) -> None:
        call, name = product.call, product.name
        self.inputs.setdefault(name, set()).add(product.inputs)
        self._half = torch.is_autocast_enabled("cpu")  # then the network's own products round their factors too
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            if call.table:
                ids = call.x[self.mask] if self.mask is not None and call.x.shape == self.mask.shape else call.x
                counts = torch.bincount(ids.flatten().long(), minlength=len(call.weight)).float()
                self.tables[name] = self.tables.get(name, 0) + counts
                self._power(table_slot(name), output)
                return
            if product.weighed:
                self._energy(product)
                self._power(table_slot(name), output)
                return
            for place, matrix in enumerate(product.matrices or (None,)):
                x, part = call.x, output
                if product.batched:
                    x = x[place] if x.dim() > 2 and len(x) > 1 else x.reshape(-1, x.shape[-1])
                    part = output[place] if output.shape[0] == len(product.matrices) else output
                if x.numel():
                    self._input(self._home(name, matrix, x.shape[-1]), slot_of(name, matrix), x, (call.x, place))
                    self._power(slot_of(name, matrix), part)

    def _home(self, name: str, matrix: int | None, columns: int) -> str:
        """The key under which a slot's own H is kept."""
        whole = self._weights[name]
        bytes_of_all = 4 * columns * (columns if self.full else 1) * whole.shape[0]
        return name if matrix is not None and bytes_of_all > STACK_BYTES else slot_of(name, matrix)

    def _input(self, key: str, slot: str, x: Tensor, origin: tuple[Tensor, int]) -> None:
        """Add x [..., columns] to the slot's H, unless a slot before it in this batch has read the same x."""
        leader = next((one for seen, place, one in self._seen if seen is origin[0] and place == origin[1]), None)
        if leader is not None and self.shared.get(slot, leader) == leader:
            self.shared[slot] = leader
            return
        self._seen.append((*origin, key))
        self.shared[slot] = key
        rows = x.detach().to(torch.bfloat16 if self._half else torch.float32).reshape(-1, x.shape[-1])
        if self.mask is not None and x.shape[: self.mask.dim()] == self.mask.shape:
            rows = rows[self.mask.flatten()]
        if key not in self.sums:
            columns = rows.shape[1]
            self.sums[key] = torch.zeros((columns, columns) if self.full else (columns,))
        if self.full:
            turned = rows.T.contiguous()  # one batch's product has the type of its factors; batches add up in float32
            for start in range(0, len(turned), STRIP):  # the upper triangle and some of the lower: half the work
                strip = slice(start, start + STRIP)
                self.sums[key][strip, start:] += torch.nn.functional.linear(turned[strip], turned[start:])
        else:
            self.sums[key] += rows.float().square().sum(0)
        self.positions[key] = self.positions.get(key, 0) + len(rows)

    def _energy(self, product: Product) -> None:
        """Add the squares of what some rows of a weight were weighed with."""
        x, whole, start = product.call.x, self._weights[product.name], product.first_row or 0
        if self.mask is not None and x.shape[: self.mask.dim()] == self.mask.shape:
            x = x[self.mask]
        squares = x.detach().float().reshape(-1, x.shape[-1]).square()
        total, count = self.energies.get(product.name, (torch.zeros(len(whole)), 0))
        total[start : start + x.shape[-1]] += squares.sum(0)
        self.energies[product.name] = total, count + len(squares)

    def _power(self, slot: str, output: Tensor) -> None:
        before, count = self.power.get(slot, (0.0, 0))
        rows = output.reshape(-1, output.shape[-1])
        some = rows[:: max(1, len(rows) // POWER_ROWS)].float()
        self.power[slot] = (before + float(some.square().sum()), count + some.numel())


def mirrored(total: Tensor) -> Tensor:
    """`total` [columns, columns] with its upper triangle in the place of the lower; overwrites and returns it."""
    for start in range(0, len(total), STRIP):
        strip = slice(start, start + STRIP)
        total[start + STRIP :, strip] = total[strip, start + STRIP :].T
    return total


@contextmanager
def output_gradients(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """While the block runs, backward passes add their squared gradients at the outputs of products with `weights` to

    the dict this yields: slot -> [rows] (of a table: [columns]), summed over examples and positions. Parameters get no
    gradients.
    """
    found: dict[str, Tensor] = {}

    def watch(product: Product, output: Tensor) -> Tensor | None:
        if not output.is_floating_point() or not torch.is_grad_enabled():
            return None
        if not output.requires_grad:
            output = output + torch.zeros((), dtype=output.dtype, requires_grad=True)
        output.register_hook(partial(add, product))
        return output

    def add(product: Product, grad: Tensor) -> None:
        squares = grad.float().square()
        if product.call.table or product.weighed:
            columns = squares.movedim(product.call.channel, -1)
            one = columns.reshape(-1, columns.shape[-1]).sum(0)
            found[table_slot(product.name)] = found.get(table_slot(product.name), 0) + one
        elif product.first_row is not None:
            channel = product.call.channel % squares.dim()
            if product.batched:
                for place, matrix in enumerate(product.matrices):
                    put(product, matrix, squares[place], channel - 1)
            else:
                put(product, product.matrices[0] if product.matrices else None, squares, channel)

    def put(product: Product, matrix: int | None, squares: Tensor, channel: int) -> None:
        weight, slot = weights[product.name], slot_of(product.name, matrix)
        total = squares.movedim(channel, -1).reshape(-1, squares.shape[channel]).sum(0)
        columns = weight[0].numel() if product.inputs is None else weight.shape[product.inputs]
        rows = weight.numel() // columns // (len(weight) if product.matrices else 1)
        start = product.first_row or 0
        found.setdefault(slot, torch.zeros(rows))[start : start + len(total)] += total

    model.requires_grad_(False)
    with Watch(weights, watch):
        yield found
