"""Vision: image classifiers. Today one architecture, `nets/inception.py`, on images of one fixed shape.

A batch holds `image` float32 [batch, channels, height, width] in [0, 1] and `label` int64 [batch].
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow
import torch
from torch import Tensor, nn

from gulliver.core.errors import ArtifactError, ConfigError, DataError
from gulliver.core.evidence.evidence import Evidence
from gulliver.core.foreign import foreign
from gulliver.core.records import SPLITS
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.files import write_atomic
from gulliver.nets.inception import Inception, InceptionConfig
from gulliver.nets.kinds import model_config
from gulliver.nets.weights import assign, empty_parameters, room_of, unfilled
from gulliver.runtime.reference import read_tensors
from gulliver.runtime.shards import write_file
from gulliver.tasks.base import Advance, Batch, Block, Task, packable
from gulliver.tasks.order import Order
from gulliver.tasks.vision.config import ARCHITECTURE, MODEL_TYPE
from gulliver.tasks.vision.examples import Examples, read_split
from gulliver.tasks.vision.scores import divergences, evidence

WORKLOAD_IMAGES = SCORE_IMAGES = 256
BATCH_ROWS = 1024


class VisionTask(Task):
    """Image classification, trained with cross entropy, judged by accuracy."""

    name: ClassVar[str] = "vision"
    smooths: ClassVar[bool] = True

    # ---- data -------------------------------------------------------------------------------------------------
    def _examples(self, source: Path, split: str, options: Any) -> Iterator[pyarrow.RecordBatch]:
        for part in SPLITS if split == "all" else (split,):
            examples = read_split(source, part)
            for start in range(0, len(examples), BATCH_ROWS):
                rows = slice(start, start + BATCH_ROWS)
                images = pyarrow.array(list(examples.images[rows]), pyarrow.list_(pyarrow.float32()))
                yield pyarrow.RecordBatch.from_pydict({"image": images, "label": pyarrow.array(examples.labels[rows])})

    def units(self, example: Mapping[str, Any]) -> Iterator[str]:
        """The picture with its label."""
        yield json.dumps({"image": list(example["image"]), "label": example["label"]}, sort_keys=True)

    def _batches(self, dataset: Artifact, split: str, order: Order, folder: Path, options: Any) -> Iterator[Batch]:
        """Epoch after epoch, each in its own order; a batch may reach over the end of one into the next."""
        config = read_config(folder)
        examples = _fitting(dataset, split, config)
        for places in order.batches(len(examples), key=()):
            yield _batch(examples.take(np.array([item for _, item in places])), config)

    # ---- networks ---------------------------------------------------------------------------------------------
    def _build(self, size: int) -> nn.Module:
        return Inception(InceptionConfig(size))

    def _load(self, folder: Path, empty: bool) -> nn.Module:
        return load_inception(folder, empty)

    def _save(self, model: nn.Module, folder: Path) -> None:
        inception = _inception(model)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, **asdict(inception.config)}
        write_atomic(folder / "config.json", json.dumps(config, sort_keys=True, indent=2) + "\n")
        tensors = {name: tensor.detach().contiguous() for name, tensor in inception.state_dict().items()}
        write_file(folder / "model.safetensors", tensors)

    # ---- arithmetic -------------------------------------------------------------------------------------------
    def _loss(self, model: nn.Module, batch: Batch, parent: nn.Module | None) -> Tensor:
        logits = model(batch["image"])
        if parent is None:
            smoothing = self.smoothing(model)
            scores, labels = logits.float(), batch["label"]
            return nn.functional.cross_entropy(scores, labels, reduction="none", label_smoothing=smoothing)
        with torch.no_grad():
            target = parent(batch["image"])
        return divergences(logits, target)

    def _output_loss(self, output: Tensor, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(output.float(), batch["label"], reduction="none")

    def _blocks(self, model: nn.Module, batches: Sequence[Batch]) -> list[Block]:
        return [
            Block(name, (f"{name}.",), packable(model, (f"{name}.",)), _forward(stage, first=index == 0))
            for index, (name, stage) in enumerate(_inception(model).sequence())
        ]

    # ---- judgement --------------------------------------------------------------------------------------------
    def _score(
        self,
        model: nn.Module,
        dataset: Artifact,
        parent: nn.Module | None,
        folder: Path,
        options: Any,
        share: float,
        kept: Path | None,
        advance: Advance,
    ) -> list[Evidence]:
        """`share` of the images is scored; at least two."""
        config = read_config(folder)
        examples = _different(_fitting(dataset, "eval", config))
        examples = examples.take(np.arange(min(len(examples), max(2, round(share * len(examples))))))
        trained = read_split(dataset.path, "train").labels
        majority = int(np.bincount(trained if len(trained) else examples.labels).argmax())
        images, labels = _batch(examples, config).values()
        parts = images.split(SCORE_IMAGES)
        with torch.inference_mode():
            logits = torch.cat([model(part).float() for part in parts])
            theirs = None if parent is None else torch.cat([parent(part).float() for part in parts])
        return evidence(logits, labels, majority, theirs, examples.data_hash)

    def _workloads(self, model: nn.Module, folder: Path) -> dict[str, Callable[[], int]]:
        images = torch.rand(WORKLOAD_IMAGES, *read_config(folder).shape, generator=torch.Generator().manual_seed(0))

        def classify() -> int:
            with torch.inference_mode():
                return len(model(images))

        return {"examples_per_s": classify}


def read_config(folder: Path) -> InceptionConfig:
    """The network's shape from `folder`/config.json. ArtifactError when it is missing or says something else."""
    path = folder / "config.json"
    raw = model_config(folder)
    try:
        with foreign(f"{path} does not describe a vision network"):
            if raw.pop("architectures", None) != [ARCHITECTURE]:
                raise ValueError(f"its architectures are not [{ARCHITECTURE!r}]")
            raw.pop("model_type", None)
            return InceptionConfig(**raw)
    except ConfigError as error:  # a size beyond the network's own limits
        raise ArtifactError(f"{path} does not describe a vision network: {error}") from error


def _inception(model: nn.Module) -> Inception:
    if not isinstance(model, Inception):
        raise ConfigError(f"vision does not know the network {type(model).__name__}; build or load one of this family")
    return model


def _fitting(dataset: Artifact, split: str, config: InceptionConfig) -> Examples:
    """The examples of a split. DataError when there are none, or shape or labels do not fit the network."""
    examples, pixels = read_split(dataset.path, split), int(np.prod(config.shape))
    if not len(examples):
        raise DataError(f"{dataset.path} has no {split} examples")
    if examples.images.shape[1] != pixels:
        told = f"images in {dataset.path} have {examples.images.shape[1]} pixels"
        raise DataError(f"{told}; the network takes {' x '.join(map(str, config.shape))}")
    if examples.labels.max() >= config.classes:
        raise DataError(f"{dataset.path} has label {examples.labels.max()}; the network knows {config.classes} classes")
    return examples


def _different(examples: Examples) -> Examples:
    """Each image once, in order: a repeated one adds no observation. DataError where there are no two."""
    first: dict[bytes, int] = {}
    for place, image in enumerate(examples.images):
        first.setdefault(image.tobytes(), place)
    if len(first) < 2:
        raise DataError(f"the eval split repeats one image {len(examples)} times; at least two are needed")
    return examples.take(np.array(list(first.values())))


def _batch(examples: Examples, config: InceptionConfig) -> Batch:
    image = torch.from_numpy(examples.images).reshape(-1, *config.shape)
    return {"image": image, "label": torch.from_numpy(examples.labels)}


def _forward(stage: nn.Module, first: bool) -> Callable[[Any, int], Tensor]:
    return lambda x, index: stage(x["image"] if first else x)


def load_inception(folder: Path, empty: bool = False) -> Inception:
    """The network of a folder; without weights when `empty`. ArtifactError for a folder that lacks some."""
    config = read_config(folder)
    with empty_parameters(room_of(folder)):
        model = Inception(config)
    if empty:
        return model
    assign(model, read_tensors(folder))
    missing = unfilled(model)
    if missing:
        raise ArtifactError(f"{folder} holds no weights for {missing[0]} ({len(missing)} tensors missing)")
    return model
