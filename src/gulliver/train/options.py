"""The options of the steps that make or change weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gulliver.core.options import MaxRam, Options
from gulliver.runtime.packing import is_compressed
from gulliver.tasks.options import KnownTask

UPDATES = "how weights are updated"
RATES = "how rates change"
HABITS = "what keeps it from learning by heart"
JUDGED = "measuring held-out data, and which weights are kept"
MEMORY = "memory and precision"
"""What help calls the groups of options."""
LIMITS = {"max_grad_norm": "norm", "max_grad_value": "value", "max_unit_ratio": "unit"}
"""Option -> how gradients are clipped by it (learning/clip.py)."""
MOMENTA = {"adamw": 0.9, "sgd": 0.9, "muon": 0.95}
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _in(group: str, default: Any, about: str, **bounds: Any) -> Any:
    """A field of one group of the help."""
    number = {"allow_inf_nan": False} if isinstance(default, float) else {}
    return Field(default, description=about, json_schema_extra={"group": group}, **number, **bounds)


class TrainOptions(Options):
    """Options of `train`; docs/training.md says where each method comes from."""

    task: Annotated[str | None, KnownTask] = Field(
        None, description="family of the network; the dataset's own when left out"
    )
    size: int = Field(1, ge=1, description="the one dial: larger means more parameters")
    steps: int = Field(300, ge=1, description="updates of the weights, at most")
    batch_size: int = Field(64, ge=1, description="examples per update")
    family: dict[str, Any] = Field(default_factory=dict, description="options of the model's family")
    # ---- updates
    optimizer: Literal["adamw", "sgd", "muon"] = _in(
        UPDATES, "adamw", "adamw, sgd, or muon for matrices of hidden layers with adamw for the rest"
    )
    learning_rate: Positive | Literal["auto"] = Field(
        1e-3,
        description="peak learning rate; auto: what a test of rates suggests, a short run before the first step",
        json_schema_extra={"group": UPDATES},
    )
    momentum: float | None = _in(
        UPDATES, None, "momentum, beta1 of adamw (default: 0.95 for muon, else 0.9)", ge=0, lt=1
    )
    nesterov: bool = _in(UPDATES, False, "sgd looks ahead along its momentum")
    weight_decay: float = _in(UPDATES, 0.01, "decay of matrices and convolutions", ge=0)
    layer_decay: float = _in(UPDATES, 1.0, "the rate of each layer as a share of the next one's", gt=0, le=1)
    edge_rate: float = _in(UPDATES, 1.0, "rate of embeddings, stem and head as a share of learning_rate", ge=0)
    vector_rate: float = _in(UPDATES, 1.0, "rate of norms and biases as a share of learning_rate", ge=0)
    max_grad_norm: Positive | None = _in(
        UPDATES, None, "gradients longer than this are shortened (default: 1, where no other limit is given)"
    )
    max_grad_value: Positive | None = _in(UPDATES, None, "numbers of gradients beyond this are cut")
    max_unit_ratio: Positive | None = _in(
        UPDATES, None, "gradients of units longer than this share of their weights are shortened; 0.01 is usual"
    )
    # ---- rates
    schedule: Literal["cosine", "wsd", "one-cycle", "plateau", "constant"] = _in(
        RATES, "cosine", "how rates change after the warmup; wsd: constant, then down to zero"
    )
    warmup_steps: int = _in(RATES, 20, "steps of linear warmup; of the rise of one-cycle", ge=0)
    decay_steps: int | None = _in(RATES, None, "last steps of wsd, in which rates fall (default: a fifth)", ge=1)
    plateau_patience: int | None = _in(
        RATES, None, "measurements without a better one after which plateau cuts rates (default: 2)", ge=1
    )
    plateau_shrink: float | None = _in(
        RATES, None, "what plateau multiplies rates by (default: 0.5)", gt=0, lt=1, allow_inf_nan=False
    )
    # ---- regularization
    label_smoothing: float = _in(HABITS, 0.0, "share of each target that is spread over all classes", ge=0, lt=1)
    dropout: float = _in(HABITS, 0.0, "share of numbers that dropout layers and attentions leave out", ge=0, lt=1)
    stochastic_depth: float = _in(
        HABITS, 0.0, "share of examples for which the last residual layer is left out, earlier ones less", ge=0, lt=1
    )
    average: Literal["none", "ema", "mean"] = _in(
        HABITS, "none", "what is measured and kept in place of the trained weights: an average over steps"
    )
    ema_decay: float | None = _in(
        HABITS, None, "share of an ema that stays at each step (default: 0.999)", ge=0, lt=1, allow_inf_nan=False
    )
    average_from: int | None = _in(HABITS, None, "updates before the first that is averaged (default: 0)", ge=0)
    # ---- evaluation
    evaluate_every: int = _in(JUDGED, 0, "updates between measurements on held-out data; 0: none", ge=0)
    evaluate_batches: int = _in(
        JUDGED, 8, "most held-out batches of batch_size that are measured, each example once", ge=1
    )
    patience: int | None = _in(JUDGED, None, "measurements without a better one after which training stops", ge=1)
    keep: Literal["last", "best"] = _in(JUDGED, "last", "the last weights, or those that measured best")
    # ---- memory
    accumulate: int = _in(MEMORY, 1, "parts in which a batch is computed; the result is the same", ge=1)
    recompute: bool = _in(MEMORY, False, "compute layers again in the backward pass, and keep no activations")
    precision: Literal["float32", "autocast", "stochastic", "compensated"] = _in(
        MEMORY,
        "float32",
        "float32; autocast: products in bfloat16; stochastic or compensated: matrices are stored in bfloat16 too",
    )
    checkpoint_every: int = _in(MEMORY, 50, "updates between checkpoints; no effect on the weights", ge=1)

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        """ValueError, by name, for options that contradict each other or would do nothing."""
        given = [name for name in LIMITS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} are two ways to clip; give one of them")
        if self.batch_size % self.accumulate:
            told = f"accumulate is {self.accumulate}, which does not divide batch_size {self.batch_size}"
            raise ValueError(f"{told}; take a divisor of it")
        averages = self.average != "none"
        useless = {
            "nesterov": self.nesterov and self.optimizer != "sgd" and "is for optimizer = sgd",
            "momentum": self._lost(self.momentum, self.schedule != "one-cycle", "other schedules than one-cycle"),
            "decay_steps": self._lost(self.decay_steps, self.schedule == "wsd", "schedule = wsd"),
            "plateau_patience": self._lost(self.plateau_patience, self.schedule == "plateau", "schedule = plateau"),
            "plateau_shrink": self._lost(self.plateau_shrink, self.schedule == "plateau", "schedule = plateau"),
            "ema_decay": self._lost(self.ema_decay, self.average == "ema", "average = ema"),
            "average_from": self._lost(self.average_from, averages, "average = ema or mean"),
        }
        evaluated = {"patience": self.patience, "keep": self.keep == "best", "schedule": self.schedule == "plateau"}
        for name, asked in evaluated.items():
            useless[name] = bool(asked) and not self.evaluate_every and "needs held-out data; set evaluate_every"
        for name, why in useless.items():
            if why:
                raise ValueError(f"{name} = {getattr(self, name)!r} {why}")
        return self

    @staticmethod
    def _lost(value: Any, used: bool, by: str) -> str:
        return "" if value is None or used else f"is for {by}"

    def resolved(self, inputs: Mapping[str, Any]) -> Self:
        """The family is the dataset's own where none is named; what depends on other options is filled in."""
        found: dict[str, Any] = {"task": self.task or inputs["dataset"].task}
        if self.momentum is None and self.schedule != "one-cycle":
            found["momentum"] = MOMENTA[self.optimizer]
        if all(getattr(self, name) is None for name in LIMITS):
            found["max_grad_norm"] = 1.0
        defaults = {
            "decay_steps": (self.schedule == "wsd", max(1, self.steps // 5)),
            "plateau_patience": (self.schedule == "plateau", 2),
            "plateau_shrink": (self.schedule == "plateau", 0.5),
            "ema_decay": (self.average == "ema", 0.999),
            "average_from": (self.average != "none", 0),
        }
        found |= {name: value for name, (used, value) in defaults.items() if used and getattr(self, name) is None}
        return self.model_copy(update=found)


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
