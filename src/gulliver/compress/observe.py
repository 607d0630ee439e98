"""Watching modules while calibration data pass: second moments of their inputs, squared gradients at their outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gulliver.core.errors import ConfigError
from gulliver.tasks.base import Batch


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
        self._hooks = [
            hook
            for name, module in watched
            for hook in (
                module.register_forward_pre_hook(self._reader(name), with_kwargs=True),
                module.register_forward_hook(self._writer(name)),
            )
        ]

    def begin(self, batch: Batch) -> None:
        """Say which batch comes next; rows that its mask calls padding do not count."""
        self._seen = []
        self.mask = batch["mask"].bool() if "mask" in batch else None

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def moment(self, name: str) -> Tensor:
        """H of the module with the weight `name`, the mean over positions: [columns, columns] or diagonal [columns]."""
        key = self.shared[name]
        return self.sums[key] / self.positions[key]

    def _reader(self, name: str) -> Any:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if "forward" in module.__dict__:
                return  # a stand-in of the streamer: nothing real passes through
            x = args[0] if args else next(iter(kwargs.values()))
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                if isinstance(module, nn.Embedding):
                    ids = x[self.mask] if self.mask is not None and x.shape == self.mask.shape else x.flatten()
                    counts = torch.bincount(ids, minlength=module.num_embeddings).float()
                    self.tables[name] = self.tables.get(name, 0) + counts
                elif self._leads(name, x):
                    rows = self._rows(as_rows(module, x.detach().float()), x)
                    added = rows.T @ rows if self.full else rows.square().sum(0)
                    if name in self.sums:
                        self.sums[name] += added
                    else:
                        self.sums[name] = added
                    self.positions[name] = self.positions.get(name, 0) + len(rows)

        return read

    def _leads(self, name: str, x: Tensor) -> bool:
        """Whether x must be added to the module's own H: no module before it in this batch has read the same x."""
        leader = next((key for seen, key in self._seen if seen is x), None)
        if leader is not None and self.shared.get(name, leader) == leader:
            self.shared[name] = leader
            return False
        self._seen.append((x, name))
        self.shared[name] = name
        return True

    def _rows(self, rows: Tensor, x: Tensor) -> Tensor:
        if self.mask is None or x.shape[: self.mask.dim()] != self.mask.shape:
            return rows
        return rows[self.mask.flatten()]

    def _writer(self, name: str) -> Any:
        def written(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if "forward" not in module.__dict__ and isinstance(output, Tensor):
                with torch.no_grad():
                    power = float(output.float().square().mean())
                self.output_power[name] = self.output_power.get(name, 0.0) + power

        return written


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

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output.requires_grad_(True)
            output.register_hook(lambda grad: add(name, module, grad))
            return output

        return hook

    def add(name: str, module: nn.Module, grad: Tensor) -> None:
        channel = 1 if isinstance(module, nn.Conv2d) else grad.dim() - 1
        others = [axis for axis in range(grad.dim()) if axis != channel]
        total = grad.float().square().sum(others)
        found[name] = found[name] + total if name in found else total

    model.requires_grad_(False)
    hooks = [module.register_forward_hook(watch(name)) for name, module in watched]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
