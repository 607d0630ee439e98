"""A small convolutional network of inception blocks with one size dial.

    image -> stem -> inceptions.0 -> ... -> head -> logits

An inception block looks at its input at four scales at once and joins what it sees (Going deeper with convolutions,
2014, arXiv 1409.4842; the 5x5 as two 3x3: Rethinking the Inception architecture, 2015, arXiv 1512.00567):

    1x1  |  1x1 -> 3x3  |  1x1 -> 3x3 -> 3x3  |  3x3 max pool -> 1x1

Group norm (2018, arXiv 1803.08494) and not batch norm: an example's output never depends on the batch it is in, so the
loss of one example is its own, and there are no running statistics beside the weights. Every convolution is dense with
stride 1, and channels come in multiples of 16, the rows of a packed tile.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from gulliver.core.errors import ConfigError

MAX_SIZE = 64
GRID = 2
"""The head sees the last feature map averaged onto GRID x GRID cells."""


@dataclass(frozen=True)
class InceptionConfig:
    """`size` scales the channels of every stage; images are [channels, height, width] with values in [0, 1]."""

    size: int
    classes: int = 10
    channels: int = 1
    height: int = 8
    width: int = 8

    def __post_init__(self) -> None:
        limits = {"size": (1, MAX_SIZE), "classes": (2, 65536), "channels": (1, 64)}
        limits |= dict.fromkeys(("height", "width"), (4, 4096))
        for key, (least, most) in limits.items():
            value = getattr(self, key)
            if type(value) is not int or not least <= value <= most:
                raise ConfigError(f"{key} is {value!r}; it must be a whole number from {least} to {most}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """[channels, height, width] of one image."""
        return self.channels, self.height, self.width


class Convolution(nn.Sequential):
    """Convolution without bias, group norm, ReLU: [batch, channels, h, w] -> [batch, outputs, h, w]."""

    def __init__(self, channels: int, outputs: int, kernel: int) -> None:
        conv = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2, bias=False)
        super().__init__(OrderedDict(conv=conv, norm=nn.GroupNorm(outputs // 8, outputs), relu=nn.ReLU()))


class InceptionBlock(nn.Module):
    """Four branches of `outputs` / 4 channels each, joined; with `halve`, a 2x2 max pool before them.

    [batch, channels, h, w] -> [batch, outputs, h, w], or [batch, outputs, h / 2, w / 2] with `halve`.
    """

    def __init__(self, channels: int, outputs: int, halve: bool) -> None:
        super().__init__()
        branch, middle = outputs // 4, outputs // 2
        self.halve = halve
        self.point = Convolution(channels, branch, 1)
        self.near = nn.Sequential(Convolution(channels, middle, 1), Convolution(middle, branch, 3))
        self.far = nn.Sequential(
            Convolution(channels, middle, 1), Convolution(middle, middle, 3), Convolution(middle, branch, 3)
        )
        self.pooled = Convolution(channels, branch, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.halve:
            x = functional.max_pool2d(x, 2)
        pooled = self.pooled(functional.max_pool2d(x, 3, stride=1, padding=1))
        return torch.cat([self.point(x), self.near(x), self.far(x), pooled], 1)


class Head(nn.Sequential):
    """Average onto a small grid, one hidden layer, logits [batch, classes]."""

    def __init__(self, channels: int, classes: int) -> None:
        hidden, output = nn.Linear(channels * GRID * GRID, channels), nn.Linear(channels, classes)
        cells = nn.AdaptiveAvgPool2d(GRID)
        super().__init__(OrderedDict(cells=cells, flat=nn.Flatten(), hidden=hidden, relu=nn.ReLU(), output=output))


class Inception(nn.Sequential):
    """The network: images [batch, channels, height, width] -> logits float32 [batch, classes].

    `sequence()` lists its stages in the order in which activations pass through them.
    """

    def __init__(self, config: InceptionConfig) -> None:
        channels = 32 * config.size
        inceptions = nn.Sequential(
            InceptionBlock(channels, 2 * channels, halve=False),
            InceptionBlock(2 * channels, 2 * channels, halve=True),
            InceptionBlock(2 * channels, 2 * channels, halve=False),
        )
        stem, head = Convolution(config.channels, channels, 3), Head(2 * channels, config.classes)
        super().__init__(OrderedDict(stem=stem, inceptions=inceptions, head=head))
        self.config = config

    def sequence(self) -> list[tuple[str, nn.Module]]:
        """(dotted name, module) of every stage; all parameters are below exactly one of them."""
        inceptions = self.get_submodule("inceptions").named_children()
        blocks = [(f"inceptions.{index}", block) for index, block in inceptions]
        return [("stem", self.get_submodule("stem")), *blocks, ("head", self.get_submodule("head"))]
