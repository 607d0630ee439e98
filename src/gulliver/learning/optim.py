"""The optimizers of the one loop, over parameter groups that may each have their own rate, decay and rule.

    sgd      m <- momentum * m + g + decay * p ;  p <- p - rate * m        (Nesterov: p - rate * (g + momentum * m))
    adamw    p <- p - rate * (decay * p + mean / (sqrt(variance) + epsilon)), bias-corrected
             (Decoupled weight decay regularization, 2017, arXiv 1711.05101)
    muon     m <- momentum * m + g ;  p <- p - rate * (decay * p + scale * orthogonalized(g + momentum * m))
             (learning/orthogonal.py) for the matrices of hidden layers; adamw for all other parameters

torch's fused kernels update in one pass over memory without temporaries; they are used wherever every parameter is a
float tensor on a device that has them. State is float32. Weights of bfloat16 are updated in float32, one tensor at a
time, and put back as learning/rounding.py says: never to nearest.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from gulliver.core.errors import ConfigError
from gulliver.learning.orthogonal import matched_scale, orthogonalized
from gulliver.learning.rounding import Rounding, store_rounded, widened

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
BETA1 = 0.9
"""Momentum of the parameters that muon leaves to adamw."""
KEYS = ("params", "learning_rate", "weight_decay", "orthogonal")
Group = dict[str, Any]


@dataclass(frozen=True)
class OptimizerConfig:
    """`learning_rate` is the peak, before the schedule, of every group that names none.

    `momentum` is beta1 for adamw; `nesterov` is for sgd (muon always looks ahead); `rounding` is how weights of
    bfloat16 are put back.
    """

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    nesterov: bool = False
    rounding: Rounding = "compensated"


class Updater:
    """What the groups' rules keep of each parameter, and how they change it.

    `param_groups`: {"params", "lr", "initial_lr", "momentum", "weight_decay", "rule"}; `lr` and `momentum` are read at
    every step. `state`: parameter -> tensors by name, float32 of the parameter's shape or a scalar.
    """

    def __init__(self, groups: list[Group], config: OptimizerConfig) -> None:
        self.param_groups, self.config = groups, config
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def step(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """Change every parameter that has a gradient; both of any shape, the gradient float32 or as the parameter."""
        for group in self.param_groups:
            rule = RULES[group["rule"]]
            moved = [parameter for parameter in group["params"] if parameter in gradients]
            exact = [parameter for parameter in moved if parameter.dtype != torch.bfloat16]
            if exact:
                grads, states = [gradients[one] for one in exact], [self.state[one] for one in exact]
                rule(exact, grads, states, group, self.config)
            for parameter in moved:
                if parameter.dtype == torch.bfloat16:
                    state = self.state[parameter]
                    value = widened(parameter, state)
                    rule([value], [gradients[parameter].float()], [state], group, self.config)
                    store_rounded(value, parameter, state, self.config.rounding)


def _kept(states: Sequence[dict[str, Tensor]], name: str, like: Sequence[Tensor]) -> list[Tensor]:
    """The state `name` of each parameter; zeros where there is none yet."""
    for state, one in zip(states, like, strict=True):
        if name not in state:
            state[name] = torch.zeros_like(one, requires_grad=False)
    return [state[name] for state in states]


def _sgd(
    values: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], group: Group, config: OptimizerConfig
) -> None:
    dials = {"lr": group["lr"], "momentum": group["momentum"], "weight_decay": group["weight_decay"]}
    momenta: list[Tensor | None] = [*_kept(states, "momentum", values)]
    sgd(
        values,
        grads,
        momenta,
        fused=_fused(values),
        dampening=0.0,
        nesterov=config.nesterov,
        maximize=False,
        **dials,
    )


def _adamw(
    values: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], group: Group, config: OptimizerConfig
) -> None:
    steps = _kept(states, "step", [torch.zeros((), device=value.device) for value in values])
    adamw(
        values,
        grads,
        _kept(states, "mean", values),
        _kept(states, "variance", values),
        [],
        steps,
        fused=_fused(values),
        amsgrad=False,
        beta1=group["momentum"],
        beta2=config.beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=config.epsilon,
        maximize=False,
    )


def _muon(
    values: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], group: Group, config: OptimizerConfig
) -> None:
    momenta = _kept(states, "momentum", values)
    for value, grad, momentum in zip(values, grads, momenta, strict=True):
        momentum.mul_(group["momentum"]).add_(grad)
        ahead = grad.add(momentum, alpha=group["momentum"])
        matrix = ahead.flatten(1) if ahead.dim() == 4 else ahead  # a convolution's kernel is one matrix of its patches
        update = orthogonalized(matrix).view_as(value)
        value.mul_(1 - group["lr"] * group["weight_decay"])
        value.add_(update, alpha=-group["lr"] * matched_scale(*matrix.shape[-2:]))


RULES = {"sgd": _sgd, "adamw": _adamw, "muon": _muon}


def _fused(values: Sequence[Tensor]) -> bool:
    return all(value.is_floating_point() and value.device.type in FUSED_DEVICES for value in values)


def build_optimizer(parameters: Sequence[Group], config: OptimizerConfig) -> Updater:
    """The updater over `parameters`: groups of {"params", "learning_rate"?, "weight_decay"?, "orthogonal"?}.

    Every group keeps its peak rate as `initial_lr`; muon orthogonalises those that say so. ConfigError for no
    parameter, a parameter twice, an unknown key, a vector that is to be orthogonal.
    """
    groups = []
    for group in parameters:
        unknown = sorted(set(group) - set(KEYS))
        if unknown:
            raise ConfigError(f"unknown key {unknown[0]!r} in a parameter group; it takes {', '.join(KEYS)}")
        rate = float(group.get("learning_rate", config.learning_rate))
        if not 0.0 <= rate < math.inf:
            raise ConfigError(f"a group's learning_rate is {rate}; it must be a finite number, 0 or more")
        rule = "adamw" if config.name == "muon" and not group.get("orthogonal") else config.name
        if rule == "muon" and any(tensor.dim() < 2 for tensor in group["params"]):
            raise ConfigError("a vector cannot be made orthogonal; give it to a group that is not `orthogonal`")
        rest = {"weight_decay": float(group.get("weight_decay", config.weight_decay)), "rule": rule}
        momentum = config.momentum if rule == config.name else BETA1
        groups.append({"params": list(group["params"]), "lr": rate, "initial_lr": rate, "momentum": momentum, **rest})
    tensors = [tensor for group in groups for tensor in group["params"]]
    if not tensors:
        raise ConfigError("there is nothing to train: no parameter requires a gradient")
    if len({id(tensor) for tensor in tensors}) != len(tensors):
        raise ConfigError("duplicate parameter in the optimizer's groups; give each to one group")
    return Updater(groups, config)
