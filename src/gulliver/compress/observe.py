"""Watching modules while calibration data pass: second moments of their inputs, squared gradients at their outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gulliver.core.errors import ConfigError
from gulliver.tasks.base import Batch

STRIP = 256


class Moments:
    """Accumulates H over the batches of one block. Modules that read the same tensor share one H.

    `full` keeps H [columns, columns], else its diagonal. `shared` maps a module's weight name to the key of its H;
    `tables` counts how often each row of a lookup table was read.
    """

    def __init__(self, watched: Iterable[tuple[str, nn.Module]], full: bool) -> None:
        self.full = full
        self.sums: dict[str, Tensor] = {}
        self.positions: dict[str, int] = {}
        self.shared: dict[str, str] = {}
        self.tables: dict[str, Tensor] = {}
        self.output_power: dict[str, float] = {}
        self.mask: Tensor | None = None
        self._seen: list[tuple[Tensor, str]] = []
        self._hooks: list[Any] = []
        for name, module in watched:
            self._hooks.append(module.register_forward_pre_hook(partial(self._read, name), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(partial(self._written, name)))

    def begin(self, batch: Batch) -> None:
        """Say which batch comes next; what its mask [batch, tokens] calls padding does not count."""
        self._seen = []
        self.mask = batch["mask"].bool() if "mask" in batch else None

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def stored(self) -> dict[str, Tensor]:
        """What one block's file holds, given away: means "moment:KEY" [columns, columns] or [columns], empty marks

        "leader:KEY:NAME" of who shares which, "count:NAME" [rows of the table] and scalars "power:NAME" [1].
        """
        tensors = {}
        for key in list(self.sums):
            mean = self.sums.pop(key).div_(self.positions[key])
            tensors[f"moment:{key}"] = mirrored(mean) if self.full else mean
        tensors |= {f"leader:{key}:{name}": torch.zeros(1) for name, key in self.shared.items()}
        tensors |= {f"count:{name}": counts for name, counts in self.tables.items()}
        return tensors | {f"power:{name}": torch.tensor([power]) for name, power in self.output_power.items()}

    def _read(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "forward" in module.__dict__:
            return  # a stand-in of the streamer: nothing real passes through
        x = args[0] if args else next(iter(kwargs.values()))
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            if isinstance(module, nn.Embedding):
                ids = x[self.mask] if self.mask is not None and x.shape == self.mask.shape else x.flatten()
                counts = torch.bincount(ids, minlength=module.num_embeddings).float()
                self.tables[name] = self.tables.get(name, 0) + counts
            elif self._leads(name, x):
                rows = as_rows(module, x.detach().float())
                if self.mask is not None and x.shape[: self.mask.dim()] == self.mask.shape:
                    rows = rows[self.mask.flatten()]
                if name not in self.sums:
                    columns = rows.shape[1]
                    self.sums[name] = torch.zeros((columns, columns) if self.full else (columns,))
                if self.full:
                    add_upper_products(self.sums[name], rows)
                else:
                    self.sums[name] += rows.square().sum(0)
                self.positions[name] = self.positions.get(name, 0) + len(rows)

    def _leads(self, name: str, x: Tensor) -> bool:
        """Whether x must be added to the module's own H: no module before it in this batch has read the same x."""
        leader = next((key for seen, key in self._seen if seen is x), None)
        if leader is not None and self.shared.get(name, leader) == leader:
            self.shared[name] = leader
            return False
        self._seen.append((x, name))
        self.shared[name] = name
        return True

    def _written(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if "forward" not in module.__dict__ and isinstance(output, Tensor):
            with torch.no_grad():
                power = float(output.float().square().mean())
            self.output_power[name] = self.output_power.get(name, 0.0) + power


def add_upper_products(total: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows to `total` [columns, columns], its upper triangle and some of the lower: half of the work."""
    for start in range(0, len(total), STRIP):
        strip = slice(start, start + STRIP)
        total[strip, start:].addmm_(rows[:, strip].T, rows[:, start:])


def mirrored(total: Tensor) -> Tensor:
    """`total` [columns, columns] with its upper triangle in the place of the lower; overwrites and returns it."""
    for start in range(0, len(total), STRIP):
        strip = slice(start, start + STRIP)
        total[start + STRIP :, strip] = total[strip, start + STRIP :].T
    return total


def as_rows(module: nn.Module, x: Tensor) -> Tensor:
    """The inputs of a linear or convolution as a matrix [positions, columns of its weight]."""
    if isinstance(module, nn.Conv2d):
        if module.groups != 1 or isinstance(module.padding, str):
            raise ConfigError(f"a convolution with groups {module.groups}, padding {module.padding} cannot be packed")
        patches = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        return patches.transpose(1, 2).flatten(0, 1)
    return x.reshape(-1, x.shape[-1])


@contextmanager
def output_gradients(model: nn.Module, watched: Sequence[tuple[str, nn.Module]]) -> Iterator[dict[str, Tensor]]:
    """While the block runs, backward passes add their squared gradients at each watched module's output to the dict

    this yields: name -> [outputs], summed over examples and positions. Parameters get no gradients.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if "forward" in module.__dict__:
            return output  # a stand-in of the streamer
        if not output.requires_grad:
            output.requires_grad_(True)
        output.register_hook(partial(add, name, 1 if isinstance(module, nn.Conv2d) else output.dim() - 1))
        return output

    def add(name: str, channel: int, grad: Tensor) -> None:
        total = grad.float().square().sum([axis for axis in range(grad.dim()) if axis != channel])
        found[name] = found[name] + total if name in found else total

    model.requires_grad_(False)
    hooks = [module.register_forward_hook(partial(watch, name)) for name, module in watched]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
