"""The two optimizers of the one loop, over parameter groups that may each have their own rate; and how rates change.

    sgd      m <- momentum * m + g + decay * p ;  p <- p - rate * m
    adamw    p <- p - rate * (decay * p + mean / (sqrt(variance) + epsilon)), bias-corrected
             (Decoupled weight decay regularization, 2017, arXiv 1711.05101)

torch's fused kernels update in one pass over memory without temporaries; they are used wherever every parameter is a
float tensor on a device that has them. With T steps, w of them warmup, the factor on every group's rate at step t is

    (t + 1) / w                                    for t < w
    (1 + cos(pi * (t - w) / (T - w))) / 2          after that (SGDR, 2016, arXiv 1608.03983)

so that the first update is not wasted on a rate of zero, and the last one still moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from gulliver.core.errors import ConfigError

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True)
class OptimizerConfig:
    """`learning_rate` is the peak, before the schedule, of every group that names none; `momentum` is for sgd only."""

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    momentum: float = 0.9


@dataclass(frozen=True)
class Schedule:
    """`warmup_steps` (0 or more) of linear warmup, then a cosine to zero."""

    warmup_steps: int = 0

    def factor(self, step: int, steps: int) -> float:
        """What every learning rate is multiplied by at 0-based `step` of `steps`."""
        assert 0 <= step < steps, f"step {step} is not within {steps} steps"
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return 0.5 * (1.0 + math.cos(math.pi * (step - self.warmup_steps) / max(steps - self.warmup_steps, 1)))


def build_optimizer(parameters: Sequence[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over `parameters`: groups {"params": tensors, "learning_rate"?: float, "weight_decay"?: float}.

    Every group keeps its peak rate as `initial_lr`. ConfigError for no parameter, a parameter twice, an unknown key.
    """
    groups = []
    for group in parameters:
        unknown = sorted(set(group) - {"params", "learning_rate", "weight_decay"})
        if unknown:
            known = "params, learning_rate, weight_decay"
            raise ConfigError(f"unknown key {unknown[0]!r} in a parameter group; it takes {known}")
        rate = float(group.get("learning_rate", config.learning_rate))
        if not 0.0 <= rate < float("inf"):
            raise ConfigError(f"a group's learning_rate is {rate}; it must be a finite number, 0 or more")
        decay = float(group.get("weight_decay", config.weight_decay))
        groups.append({"params": list(group["params"]), "lr": rate, "initial_lr": rate, "weight_decay": decay})
    tensors = [tensor for group in groups for tensor in group["params"]]
    if not tensors:
        raise ConfigError("there is nothing to train: no parameter requires a gradient")
    if len({id(tensor) for tensor in tensors}) != len(tensors):
        raise ConfigError("duplicate parameter in the optimizer's groups; give each to one group")
    fused = all(tensor.is_floating_point() and tensor.device.type in FUSED_DEVICES for tensor in tensors)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=fused)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=fused)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices and convolutions decay, vectors (biases, norms) do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if parameter.ndim >= 2]
    plain = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
