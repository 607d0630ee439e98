"""The part of a family's contract that keeps its networks from learning their data by heart while they train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

from torch import nn

from gulliver.core.errors import ConfigError
from gulliver.nets.regularize import drop_layers, set_dropout


class Regularized:
    """What drops numbers, leaves out layers and softens targets; a family says what its networks have of it."""

    smooths: ClassVar[bool] = False
    """Whether its loss is a cross entropy over classes, whose targets can be softened (`smoothing`)."""

    @final
    def regularize(self, model: nn.Module, *, dropout: float, stochastic_depth: float, label_smoothing: float) -> None:
        """Make `model` drop numbers, leave out layers and soften its targets while it is in training mode.

        ConfigError, by name, for what a network of this family does not have. 0 leaves what is as it is.
        """
        places = {
            "dropout": set_dropout(model, dropout) if dropout else 1,
            "stochastic_depth": drop_layers(self._residual_layers(model), stochastic_depth) if stochastic_depth else 1,
            "label_smoothing": int(self.smooths or not label_smoothing),
        }
        for name, count in places.items():
            if not count:
                raise ConfigError(f"{name}: {type(model).__name__} has no place for it; leave it out")
        model.__dict__["label_smoothing"] = label_smoothing

    def _residual_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        return ()

    @final
    def smoothing(self, model: nn.Module) -> float:
        """The share of a target that is spread evenly over all classes, in training mode; for a family's `_loss`."""
        return model.__dict__.get("label_smoothing", 0.0) if model.training else 0.0
