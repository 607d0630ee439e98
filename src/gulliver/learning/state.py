"""What changes from step to step of the loop, and is in its checkpoints.

Parameters, the optimizer's state, averages, the best weights, the caller's state, torch's generators, and the history
of the run: all that a resumed run needs to end bitwise where the uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from gulliver.core.errors import ConfigError
from gulliver.core.training import HeldOut
from gulliver.learning.average import Average, Averaging
from gulliver.learning.checkpoint import Checkpoint
from gulliver.learning.optim import OptimizerConfig, build_optimizer


@dataclass
class History:
    """What happened: `losses`, `rates` (of a group that names none) and `clipped` of every step.

    `norm_steps` are the 0-based steps at which the norms of blocks were taken: gradients after division by the number
    of trained positions and before clipping, weights after the update, [step][block].
    """

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    clipped: list[float] = field(default_factory=list)
    evaluations: list[HeldOut] = field(default_factory=list)
    norm_steps: list[int] = field(default_factory=list)
    gradient_norms: list[list[float]] = field(default_factory=list)
    weight_norms: list[list[float]] = field(default_factory=list)

    @property
    def held_out(self) -> list[float]:
        """The held-out losses so far."""
        return [one.loss for one in self.evaluations]

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> History:
        """The history of a checkpoint's scalars."""
        return cls(**{**raw, "evaluations": [HeldOut(**one) for one in raw["evaluations"]]})


class RunState:
    """All of it; `tensors` are the parameters [any shape] in the order of their groups, `state` those of the caller."""

    def __init__(
        self,
        parameters: list[dict[str, Any]],
        optimizer: OptimizerConfig,
        state: Mapping[str, Tensor],
        averaging: Averaging | None,
    ) -> None:
        self.updater = build_optimizer(parameters, optimizer)
        self.tensors: list[Tensor] = [tensor for group in self.updater.param_groups for tensor in group["params"]]
        for tensor in self.tensors:
            tensor.grad = None
        trained = {id(tensor) for tensor in self.tensors}
        self.state = {name: tensor for name, tensor in state.items() if id(tensor) not in trained}
        self.live = {f"parameter.{index}": tensor for index, tensor in enumerate(self.tensors)}
        self.live |= {f"state.{name}": tensor for name, tensor in self.state.items()}
        self.average = Average(averaging, self.live) if averaging is not None else None
        self.best: dict[str, Tensor] = {}
        self.history = History()

    def shapes(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be one of this run, beside the dials; as JSON."""
        keys = ("weight_decay", "rule")
        groups = [
            {
                "learning_rate": group["initial_lr"],
                **{key: group[key] for key in keys},
                "shapes": [[str(tensor.dtype), *tensor.shape] for tensor in group["params"]],
            }
            for group in self.updater.param_groups
        ]
        state = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in sorted(self.state.items())}
        return {"groups": groups, "state": state}

    # ---- the weights that are evaluated and kept --------------------------------------------------------------
    @contextmanager
    def candidate(self, step: int) -> Iterator[None]:
        """The weights that would be the result after 0-based `step` in place of those that are trained: averages."""
        if self.average is None or not self.average.ready(step):
            yield
            return
        held = {name: tensor.detach().clone() for name, tensor in self.live.items()}
        _copy(self.average.values, self.live)
        try:
            yield
        finally:
            _copy(held, self.live)

    def keep_as_best(self) -> None:
        """What is in place now is the best so far; called within `candidate`."""
        if not self.best:
            self.best = {name: torch.empty_like(tensor, requires_grad=False) for name, tensor in self.live.items()}
        _copy(self.live, self.best)

    def finish(self, step: int) -> None:
        """Put the result in place: the best where they were kept, else the average, else what was trained."""
        if self.best:
            _copy(self.best, self.live)
        elif self.average is not None and self.average.ready(step):
            _copy(self.average.values, self.live)

    # ---- checkpoints ------------------------------------------------------------------------------------------
    def content(self) -> dict[str, Tensor]:
        """Every tensor by name, of any shape, nothing copied."""
        content = dict(self.live)
        for index, tensor in enumerate(self.tensors):
            values = self.updater.state[tensor].items()
            content |= {f"optimizer.{index}.{key}": value for key, value in values}
        content |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        if self.average is not None:
            content |= {f"average.{name}": tensor for name, tensor in self.average.values.items()}
        for device in {tensor.device for tensor in self.tensors if tensor.device.type == "cuda"}:
            content[f"generator.cuda:{device.index}"] = torch.cuda.get_rng_state(device)
        return content | {"generator.cpu": torch.get_rng_state()}

    def meta(self, identity: dict[str, Any]) -> dict[str, Any]:
        """The scalars of a checkpoint."""
        measured = [one.model_dump() for one in self.history.evaluations]
        return {"identity": identity, "history": {**asdict(self.history), "evaluations": measured}}

    @torch.no_grad()
    def restore(self, found: Checkpoint, identity: dict[str, Any]) -> None:
        """Fill in what the checkpoint holds, tensor by tensor. ConfigError when it is of another run."""
        theirs = found.meta.get("identity") or {}
        for key in {**identity, **theirs}:
            if theirs.get(key) != identity.get(key):
                raise ConfigError(
                    f"the checkpoint {found.path} is of another run: {key} is {theirs.get(key)} there "
                    f"and {identity.get(key)} here; delete it to start afresh"
                )
        for name, value in found.tensors():
            part, _, rest = name.partition(".")
            if name in self.live:
                self.live[name].copy_(value)
            elif part == "average" and self.average is not None:
                self.average.values[rest].copy_(value)
            elif part == "best":
                self.best[rest] = torch.empty_like(self.live[rest], requires_grad=False).copy_(value)
            elif name == "generator.cpu":
                torch.set_rng_state(value.clone())
            elif part == "generator":
                torch.cuda.set_rng_state(value.clone(), rest)
            else:
                index, _, key = rest.partition(".")
                owner = self.tensors[int(index)]
                like = owner if value.shape == owner.shape else torch.empty(value.shape, device=owner.device)
                kept = torch.empty_like(like, dtype=value.dtype, requires_grad=False)
                self.updater.state[owner][key] = kept.copy_(value)
        self.history = History.of(found.meta["history"])


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
