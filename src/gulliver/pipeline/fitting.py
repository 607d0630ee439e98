"""One run of `fit`: what it asks of each step, by effort, and what it found on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gulliver.core.evidence.gate import Budget, Verdict
from gulliver.core.records import Point, StatisticsTable
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.store import Store
from gulliver.pipeline.call import Call, call
from gulliver.tasks import family

TARGETS: Mapping[str, str | None] = {
    "native": None,
    "gguf": "gguf",
    "vllm": "compressed-tensors",
    "transformers": "compressed-tensors",
}
"""What a model may be fitted for -> the format that `export` writes for it, whose bytes count too."""
COMPRESSING = ("sample", "calibrate", "plan", "quantize", "distill", "quality")
EFFORTS: Mapping[str, Mapping[str, Mapping[str, Any] | None]] = {
    "fast": {"sample": {"count": 32, "held_out": 8}, "calibrate": {"examples": 24, "gradient_examples": 8},
             "plan": {"probe_rows": 8}, "quantize": {"sweeps": 1}, "distill": None, "quality": {"share": 1 / 4}},
    "normal": {"sample": {"count": 96, "held_out": 16}, "calibrate": {"examples": 64, "gradient_examples": 16},
               "plan": {}, "quantize": {"sweeps": 3}, "distill": None, "quality": {}},
    "high": {"sample": {"count": 96, "held_out": 16}, "calibrate": {"examples": 96, "gradient_examples": 16},
             "plan": {}, "quantize": {"sweeps": 3}, "distill": {"steps": 200}, "quality": {}},
}  # fmt: skip
"""What each step gets; None leaves a step out. `sample`, for families whose models write data of their own, makes the
broad set: calibration mixes it in, and the model is judged on a part of it as on the user's data."""

JUDGED_SHARE = 1 / 2
"""Least share of the held-out data that is measured where a loss was asked for: it is judged by its upper bound."""
HELD_OUT_FACTOR = 2
"""Times as many examples of the broad set are held out then."""


@dataclass
class Fit:
    """One run of the loop: what was asked, what every call is given, and what was found on the way."""

    parent: Artifact
    dataset: Artifact | None
    """The user's data; None where there are none, and the broad set stands in."""
    samples: Artifact | None
    """The broad set; None where the family writes none, or the user's domain alone counts."""
    budget: Budget
    effort: str
    shared: dict[str, Any]
    target: str = "native"
    beside: int = 0
    """Bytes that the file of the engine that is fitted for has beside the weights, about."""
    rounds: list[Point] = field(default_factory=list)
    frontier: tuple[Point, ...] = ()
    calls: list[Call] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    told: str = ""
    """What the report must say beside the verdict."""

    @property
    def store(self) -> Store:
        return self.shared["store"]

    @property
    def data(self) -> dict[str, Artifact]:
        """What is calibrated and trained on, by the roles of the steps' inputs."""
        parts = [part for part in (self.dataset, self.samples) if part is not None]
        return dict(zip(("dataset", "samples"), parts, strict=False))

    def options(self, name: str) -> Mapping[str, Any] | None:
        """What this effort gives a step; None where it leaves the step out."""
        options = EFFORTS[self.effort].get(name, {})
        if name == "sample" and options and self.budget.max_drop is not None:
            return {**options, "held_out": HELD_OUT_FACTOR * options["held_out"]}
        return options

    def qualities(self, model: Artifact, parent: Artifact | None = None) -> None:
        """Measure the model's quality on held-out data: the user's, and the broad set's."""
        known, share = family(self.parent.task), (self.options("quality") or {}).get("share", 1.0)
        judged = {} if self.budget.max_drop is None else {"share": max(share, JUDGED_SHARE)}
        chosen = dict(known.judged) | dict({} if self.dataset is None else known.beside)
        for part in self.data.values():
            config = {"family": chosen} if part is self.samples else {}
            self.step("quality", judged | config, model=model, dataset=part, parent=parent)

    def tell_cost_of_limit(self, calibration: Artifact) -> None:
        """Say what the memory limit left out that would have made the model better."""
        limit = self.budget.max_ram_bytes
        powered = StatisticsTable.of(calibration).sensitivity == "power" and family(self.parent.task).own_loss
        if limit is not None and powered:
            lost = "outputs weighed by their power instead of the loss's gradient"
            self.shared["progress"].print(f"{limit / 1e9:.1f} GB of memory cost quality: {lost}")

    def step(self, name: str, config: Mapping[str, Any] | None = None, /, **inputs: Any) -> Artifact:
        """One call of a step with this effort's options; `config` adds to them."""
        options = {**(self.options(name) or {}), **(config or {})}
        if name == "plan":
            options["target"] = self.target
        if name in COMPRESSING:
            options["max_ram_bytes"] = self.budget.max_ram_bytes
        given = {role: artifact for role, artifact in inputs.items() if artifact is not None}
        return call(name, options, given, **self.shared, log=self.calls)
