"""What tests of compression share: a trained toy language model and a digits classifier, each in a store of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from toy_language import write_model, write_text

from gulliver.core.progress import Progress
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.store import Store
from gulliver.pipeline.call import call
from gulliver.tasks import get_task

TOKENS = 64


@dataclass(frozen=True)
class Lab:
    """A store that holds a plain model and its dataset; steps that were done once are found again."""

    store: Store
    model: Artifact
    dataset: Artifact

    def step(
        self, name: str, config: Mapping[str, Any] | None = None, *, seed: int = 0, **inputs: Artifact
    ) -> Artifact:
        """One call of a step in this store."""
        return call(name, config or {}, inputs, store=self.store, seed=seed, progress=Progress(quiet=True))

    @property
    def dials(self) -> dict[str, Any]:
        """Window length, for the family that has one."""
        return {"tokens": TOKENS} if self.model.task == "language" else {}

    @property
    def calibration(self) -> Artifact:
        """The statistics of the model, made on first use."""
        return self.step("calibrate", {"examples": 32, **self.dials}, model=self.model, dataset=self.dataset)

    def quantize(self, *, plan: Artifact | None = None, seed: int = 0, **config: Any) -> Artifact:
        """The model, packed by a plan or in one format."""
        inputs = {"model": self.model, "calibration": self.calibration}
        return self.step("quantize", config, seed=seed, **inputs, **({"plan": plan} if plan else {}))

    def plan(self, size_bytes: int, *, seed: int = 0, **config: Any) -> Artifact:
        """A plan of the model, measured roughly."""
        inputs = {"model": self.model, "calibration": self.calibration}
        quick = {"size_bytes": size_bytes, "probe_rows": 8, "gptq": False}
        return self.step("plan", quick | config, seed=seed, **inputs)


def language_lab(folder: Path) -> Lab:
    """A Llama of two blocks that learned a small grammar."""
    store = Store(folder / "home")
    shared: dict[str, Any] = {"store": store, "progress": Progress(quiet=True)}
    model = call("pull", {"source": str(write_model(folder / "model"))}, {}, **shared)
    return Lab(store, model, call("read", {"data": str(write_text(folder / "text.txt"))}, {}, **shared))


def vision_lab(folder: Path) -> Lab:
    """A small classifier of digits, trained for a few seconds."""
    store = Store(folder / "home")
    shared: dict[str, Any] = {"store": store, "progress": Progress(quiet=True)}
    dataset = call("read", {"data": "catalog:digits", "task": "vision"}, {}, **shared)
    training = {"size": 1, "steps": 60, "batch_size": 32, "warmup_steps": 5}
    return Lab(store, call("train", training, {"dataset": dataset}, **shared), dataset)


def divergence(lab: Lab, packed: Artifact, batches: int = 4) -> float:
    """Mean KL(parent || packed) on held-out data."""
    task = get_task(lab.model.task)
    parent, model = task.load(lab.model.path), task.load(packed.path)
    stream = task.batches(lab.dataset, "eval", 8, 0, 0, folder=lab.model.path, options=task.chosen(lab.dials))
    with torch.no_grad():
        losses = [task.loss(model, next(stream), parent).mean() for _ in range(batches)]
    return float(torch.stack(losses).mean())


def contents(artifact: Artifact, name: str) -> Any:
    """A JSON file of an artifact."""
    return json.loads(artifact.file(name).read_text(encoding="utf-8"))
