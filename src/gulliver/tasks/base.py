"""The task contract: all that a stage may know about a family of models.

Public methods are final and check what the family returns; a family fills in the underscored ones. Nothing outside
`tasks/` asks which family it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from gulliver.core.errors import ConfigError, DataError
from gulliver.core.evidence.evidence import Evidence
from gulliver.core.store.artifact import Artifact

Batch = dict[str, Tensor]
"""Named tensors whose first dimension is the example (for language: `tokens` int64 [batch, tokens])."""


@dataclass(frozen=True)
class Weight:
    """One weight that may be packed: rows are outputs, columns are inputs.

    `name` is the parameter's dotted name in the model ("model.layers.0.mlp.up_proj.weight"); `kind` says how its input
    is seen as rows of X with `columns` features: "linear" (last dimension), "conv" (unfolded patches) or "embedding"
    (looked up by row, and, when tied, also the output head whose inputs are final hidden states).
    """

    name: str
    kind: str


@dataclass(frozen=True)
class Block:
    """One stage of the sequence through which calibration streams.

    `forward(x, index)` maps the activations of calibration batch `index` before the block to those after it; for the
    first block `x` is the batch itself. Only parameters under `prefixes` must hold data while it runs.
    """

    name: str
    prefixes: tuple[str, ...]
    weights: tuple[Weight, ...]
    forward: Callable[[Any, int], Tensor]


class Task(ABC):
    """One family of models: how to read examples, build a network, compute a loss, score, and answer a request."""

    name: str

    # ---- data -------------------------------------------------------------------------------------------------
    @final
    def read(self, source: str | Path, split: str) -> list[dict[str, Any]]:
        """Examples of `split` ("train" or "eval") from files, the catalog or a dataset artifact. DataError if empty."""
        examples = self._read(source, split)
        if not examples:
            raise DataError(f"no examples in {source} for split {split!r}; check the path and the split")
        return examples

    @abstractmethod
    def _read(self, source: str | Path, split: str) -> list[dict[str, Any]]: ...

    @final
    def batches(
        self, dataset: Artifact, split: str, batch_size: int, seed: int, step: int, *, folder: Path, **dials: Any
    ) -> Iterator[Batch]:
        """Endless batches from `step` on; batch k is a pure function of (dataset, split, batch_size, seed, k).

        `folder` is the model's folder (its tokenizer turns text into tokens). Language takes `tokens=` (window
        length, default 512).
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        for batch in self._batches(dataset, split, batch_size, seed, step, folder, **dials):
            sizes = {tensor.shape[0] for tensor in batch.values()}
            assert len(sizes) == 1, f"{self.name}: a batch's tensors disagree on the number of examples: {sizes}"
            yield batch

    @abstractmethod
    def _batches(
        self, dataset: Artifact, split: str, batch_size: int, seed: int, step: int, folder: Path, **dials: Any
    ) -> Iterator[Batch]: ...

    # ---- networks ---------------------------------------------------------------------------------------------
    @final
    def build(self, size: int, seed: int = 0) -> nn.Module:
        """A fresh network from one dial: larger `size` means more parameters."""
        if size < 1:
            raise ConfigError(f"size is {size}; it must be at least 1")
        return self._build(size, seed)

    @abstractmethod
    def _build(self, size: int, seed: int) -> nn.Module: ...

    @final
    def load(self, folder: Path, *, empty: bool = False) -> nn.Module:
        """A network in eval mode from a Hugging Face layout folder, plain or packed; float32 parameters.

        With `empty=True` parameters are on the meta device and hold no data (calibration fills one block at a time).
        """
        model = self._load(folder, empty)
        return model.eval()

    @abstractmethod
    def _load(self, folder: Path, empty: bool) -> nn.Module: ...

    @final
    def save(self, model: nn.Module, folder: Path) -> None:
        """Write config, weights (safetensors, in the parameters' dtype) and what `batches` needs into `folder`."""
        self._save(model, folder)
        if not list(folder.glob("*.safetensors")):
            raise AssertionError(f"{self.name} saved no safetensors in {folder}")

    @abstractmethod
    def _save(self, model: nn.Module, folder: Path) -> None: ...

    # ---- arithmetic -------------------------------------------------------------------------------------------
    @final
    def loss(self, model: nn.Module, batch: Batch, parent: nn.Module | None = None) -> Tensor:
        """One loss per example, float32 [batch]. With `parent`: divergence from the parent's outputs instead

        (KL(parent || model) for logits, mean over positions; 1 - cosine for embeddings). Differentiable in `model`.
        """
        losses = self._loss(model, batch, parent)
        examples = next(iter(batch.values())).shape[0]
        assert losses.shape == (examples,), f"{self.name}: loss has shape {tuple(losses.shape)}, expected ({examples},)"
        return losses

    @abstractmethod
    def _loss(self, model: nn.Module, batch: Batch, parent: nn.Module | None) -> Tensor: ...

    @final
    def blocks(self, model: nn.Module, batches: Sequence[Batch]) -> list[Block]:
        """The sequence of sub-modules through which calibration `batches` stream, embedding and head included.

        Works on a model loaded with `empty=True`: nothing is computed before a block's `forward` is called, and
        blocks are called in order. Every parameter belongs to exactly one block's prefixes, except tied ones.
        """
        blocks = self._blocks(model, batches)
        seen = [weight.name for block in blocks for weight in block.weights]
        assert len(seen) == len(set(seen)), f"{self.name}: a weight stands in two blocks"
        if not seen:
            raise ConfigError(f"{self.name}: no weight of this model can be packed; nothing to compress")
        return blocks

    @abstractmethod
    def _blocks(self, model: nn.Module, batches: Sequence[Batch]) -> list[Block]: ...

    # ---- judgement --------------------------------------------------------------------------------------------
    @final
    def score(
        self, model: nn.Module, dataset: Artifact, parent: nn.Module | None = None, *, folder: Path, **dials: Any
    ) -> list[Evidence]:
        """Metrics with 95 % intervals on the dataset's eval split, paired against `parent` when given, beside the

        simplest baseline. `artifact_id`, `parent_id`, `machine` and `command` are filled in by the caller.
        """
        evidence = self._score(model, dataset, parent, folder, **dials)
        assert evidence, f"{self.name}: score returned no evidence"
        return evidence

    @abstractmethod
    def _score(
        self, model: nn.Module, dataset: Artifact, parent: nn.Module | None, folder: Path, **dials: Any
    ) -> list[Evidence]: ...

    @abstractmethod
    def answer(self, model: nn.Module, request: dict[str, Any], *, folder: Path) -> dict[str, Any]:
        """What the server returns for one request."""
