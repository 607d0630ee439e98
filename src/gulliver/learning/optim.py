"""The two optimizers of the one loop, built from parameter groups that may each have their own learning rate.

    sgd      m <- momentum * m + g + decay * p ;  p <- p - rate * m
    adamw    p <- p - rate * (decay * p + mean / (sqrt(variance) + epsilon)), bias-corrected
             (Decoupled weight decay regularization, 2017, arXiv 1711.05101)

torch's fused kernels update in one pass over memory without temporaries; they are used wherever every parameter is a
float tensor on a device that has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gulliver.core.errors import ConfigError

NAMES = ("adamw", "sgd")
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True)
class OptimizerConfig:
    """`learning_rate` is the peak, before the schedule, of every group that names none; `momentum` is for sgd only."""

    name: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError(f"optimizer is {self.name!r}; choose one of {', '.join(NAMES)}")
        for key in ("learning_rate", "weight_decay", "epsilon"):
            value = getattr(self, key)
            if not 0.0 <= value < float("inf"):
                raise ConfigError(f"{key} is {value}; it must be a finite number, 0 or more")
        for key in ("beta1", "beta2", "momentum"):
            value = getattr(self, key)
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"{key} is {value}; it must be at least 0 and below 1")


def build_optimizer(parameters: Sequence[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over `parameters`: groups {"params": tensors, "learning_rate"?: float, "weight_decay"?: float}.

    Every group keeps its peak rate as `initial_lr`. ConfigError for no parameter, a parameter twice, an unknown key.
    """
    groups = [_group(group, config) for group in parameters]
    tensors = [tensor for group in groups for tensor in group["params"]]
    if not tensors:
        raise ConfigError("there is nothing to train: no parameter requires a gradient")
    if len({id(tensor) for tensor in tensors}) != len(tensors):
        raise ConfigError("duplicate parameter in the optimizer's groups; give each to one group")
    fused = can_fuse(tensors)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=fused)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=fused)


def can_fuse(tensors: Iterable[Tensor]) -> bool:
    """Whether torch's fused update takes all of `tensors`, of any shape."""
    return all(tensor.is_floating_point() and tensor.device.type in FUSED_DEVICES for tensor in tensors)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices and convolutions decay, vectors (biases, norms) do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if parameter.ndim >= 2]
    plain = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _group(group: dict[str, Any], config: OptimizerConfig) -> dict[str, Any]:
    unknown = sorted(set(group) - {"params", "learning_rate", "weight_decay"})
    if unknown:
        raise ConfigError(
            f"unknown key {unknown[0]!r} in a parameter group; it takes params, learning_rate, weight_decay"
        )
    rate = float(group.get("learning_rate", config.learning_rate))
    decay = float(group.get("weight_decay", config.weight_decay))
    if not 0.0 <= rate < float("inf"):
        raise ConfigError(f"a group's learning_rate is {rate}; it must be a finite number, 0 or more")
    return {"params": list(group["params"]), "lr": rate, "initial_lr": rate, "weight_decay": decay}
