"""The options of the steps that make or change weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from gulliver.core.options import MaxRam, Options
from gulliver.runtime.packing import is_compressed
from gulliver.tasks.options import KnownTask


class TrainOptions(Options):
    """Options of `train`. The rate warms up linearly over `warmup_steps`, then falls as a cosine to zero."""

    task: Annotated[str | None, KnownTask] = Field(
        None, description="family of the network; the dataset's own when left out"
    )
    size: int = Field(1, ge=1, description="the one dial: larger means more parameters")
    steps: int = Field(300, ge=1, description="updates of the weights")
    batch_size: int = Field(64, ge=1, description="examples per update")
    family: dict[str, Any] = Field(default_factory=dict, description="options of the model's family")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="adamw, or sgd with momentum 0.9")
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False, description="peak learning rate")
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False, description="decay of matrices and convolutions")
    warmup_steps: int = Field(20, ge=0, description="steps of linear warmup")
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False, description="gradients longer than this are clipped")
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints; no effect on the weights")

    def resolved(self, inputs: Mapping[str, Any]) -> Self:
        """The family is the dataset's own where none is named."""
        return self.model_copy(update={"task": self.task or inputs["dataset"].task})


class DistillOptions(Options):
    """Options of `distill`. Rates warm up linearly over `warmup_steps`, then fall as a cosine to zero."""

    steps: int = Field(100, ge=1, description="updates")
    batch_size: int = Field(2, ge=1, description="examples per update")
    family: dict[str, Any] = Field(default_factory=dict, description="options of the model's family")
    learning_rate: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="peak rate of the weights: packed, in distances between grid values (auto: 7e-3); dense, as a "
        "share of a matrix's root mean square (auto: 1e-2)",
    )
    scale_rate: float = Field(
        5e-4, ge=0, allow_inf_nan=False, description="peak rate of the scales, as a ratio; packed models only"
    )
    vector_rate: float = Field(3e-4, ge=0, allow_inf_nan=False, description="peak rate of norms and biases")
    warmup_steps: int = Field(5, ge=0, description="steps of linear warmup")
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False, description="gradients longer than this are clipped")
    checkpoint_every: int = Field(25, ge=1, description="steps between checkpoints; no effect on the result")
    max_ram_bytes: MaxRam = None

    def resolved(self, inputs: Mapping[str, Any]) -> Self:
        """The weights' rate by whether they are packed, where none is given."""
        rate = self.learning_rate or (7e-3 if is_compressed(inputs["model"].path) else 1e-2)
        return self.model_copy(update={"learning_rate": rate})
