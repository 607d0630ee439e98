"""The task contract: all that a stage may know about a family of models.

Public methods are final and check what the family returns; a family fills in the underscored ones. Nothing outside
`tasks/` asks which family it is. What is known of a family without torch (its options, what its models can do, how one
is opened) is its row of the table in `tasks/__init__.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, final

import pyarrow
import torch
from torch import Tensor, nn

from gulliver.core.errors import ConfigError, DataError
from gulliver.core.evidence.evidence import Evidence
from gulliver.core.names import named
from gulliver.core.records import SPLITS
from gulliver.core.store.artifact import Artifact
from gulliver.tasks.blocks import Block, Coupling, packable
from gulliver.tasks.family import Family
from gulliver.tasks.options import FamilyOptions, checked_options
from gulliver.tasks.order import Order
from gulliver.tasks.regularized import Regularized

Batch = dict[str, Tensor]
"""Named tensors whose first dimension is the example (for language: `tokens` int64 [batch, tokens])."""
Advance = Callable[[float], None]
PARTS = (*SPLITS, "all")


@dataclass(frozen=True)
class Written:
    """An example that a model wrote, as a row, and why nothing should be calibrated on it ("" where it is fit)."""

    row: dict[str, Any]
    fault: str = ""


class Author(Protocol):
    """Writes examples of a model's own."""

    def write(self, numbers: Sequence[int], advance: Advance = lambda share: None) -> list[Written]:
        """Examples number `numbers`, in that order; `advance` gets the share of them that is written."""
        ...


class DataContract(ABC):
    """The half of the contract that is about data: what a family reads, and what its models write."""

    name: ClassVar[str]
    generates: ClassVar[bool] = False
    """Whether its models write data of their own: text, self-played games."""

    def __init__(self, row: Family) -> None:
        self.row = row

    @final
    def chosen(self, values: Mapping[str, Any] | None = None) -> Any:
        """The family's options from a step's `family` field. ConfigError for an unknown or a wrong one."""
        return checked_options(self.name, named(self.row.options), values or {})

    # ---- data -------------------------------------------------------------------------------------------------
    @final
    def examples(self, source: str | Path, split: str, options: FamilyOptions | None = None) -> Iterator[Any]:
        """Arrow record batches of `split` ("train", "eval"; "all" holds nothing out) from files or a dataset artifact.

        Never a whole split in memory. DataError when it is empty.
        """
        if split not in PARTS:
            raise ConfigError(f"split is {split!r}; it must be 'train', 'eval' or 'all'")
        found = False
        for batch in self._examples(Path(source), split, options or self.chosen()):
            assert isinstance(batch, pyarrow.RecordBatch), f"{self.name}: examples are Arrow record batches"
            found = found or batch.num_rows > 0
            yield batch
        if not found:
            raise DataError(f"no examples in {source} for split {split!r}; check the path and the split")

    @abstractmethod
    def _examples(self, source: Path, split: str, options: Any) -> Iterator[pyarrow.RecordBatch]: ...

    @final
    def rows(self, source: str | Path, split: str, options: FamilyOptions | None = None) -> Iterator[dict[str, Any]]:
        """The same examples one by one, as Python values by column."""
        for batch in self.examples(source, split, options):
            yield from batch.to_pylist()

    @abstractmethod
    def units(self, example: Mapping[str, Any]) -> Iterator[str]:
        """What of an example may not be in two splits: paragraphs, a picture, a user's history."""

    @final
    def units_of(self, source: str | Path, split: str, options: FamilyOptions | None = None) -> Iterator[str]:
        """The units of all examples of a split, in order."""
        for example in self.rows(source, split, options):
            yield from self.units(example)

    def phrases(self, example: Mapping[str, Any]) -> Iterator[str]:
        """What of an example may recur in another split by chance, but may not make up most of it: short lines.

        None where `units` are all that can be compared.
        """
        return iter(())

    @final
    def phrases_of(self, source: str | Path, split: str, options: FamilyOptions | None = None) -> Iterator[str]:
        """The phrases of all examples of a split, in order."""
        for example in self.rows(source, split, options):
            yield from self.phrases(example)

    def reads_alike(self, model: Artifact, parent: Artifact, dataset: Artifact) -> bool:
        """Whether a model turns the eval part of a dataset into what its parent does: the same tokens."""
        return True

    @final
    def batches(
        self,
        dataset: Artifact,
        split: str,
        batch_size: int,
        seed: int,
        step: int,
        *,
        folder: Path,
        options: FamilyOptions | None = None,
        once: bool = False,
    ) -> Iterator[Batch]:
        """Endless batches from `step` on; batch k is a pure function of (dataset, split, batch_size, seed, k).

        With `once` every example comes once, and the last batch may be smaller: what is measured is no repetition.
        A batch is tensors by name, [batch_size, …] each. `folder` is the model's folder (its tokenizer makes tokens).
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        order = Order(batch_size, seed, step, once)
        for batch in self._batches(dataset, split, order, folder, options or self.chosen()):
            sizes = {tensor.shape[0] for tensor in batch.values()}
            assert len(sizes) == 1, f"{self.name}: a batch's tensors disagree on the number of examples: {sizes}"
            yield batch

    @abstractmethod
    def _batches(self, dataset: Artifact, split: str, order: Order, folder: Path, options: Any) -> Iterator[Batch]: ...

    @final
    def author(
        self,
        folder: Path,
        *,
        options: FamilyOptions | None = None,
        seed: int,
        work: Path,
        max_ram_bytes: int | None = None,
    ) -> AbstractContextManager[Author]:
        """What writes examples with the model in `folder`; example k is a pure function of (model, seed, k).

        `work` is scratch. ConfigError for a family whose models write nothing.
        """
        if not self.generates:
            raise ConfigError(f"{self.name} models write no data of their own; calibrate on a dataset")
        return self._author(folder, options or self.chosen(), seed, work, max_ram_bytes)

    def _author(
        self, folder: Path, options: Any, seed: int, work: Path, max_ram_bytes: int | None
    ) -> AbstractContextManager[Author]:
        raise AssertionError(f"{self.name} says that it generates, and has no _author")

    def check_data(self, dataset: Artifact, folder: Path) -> None:
        """DataError when there is too little in a dataset to calibrate the model in `folder` on, or to judge it by."""
        return

    def prompts(self, dataset: Artifact, folder: Path, count: int) -> Mapping[str, Mapping[str, Any]]:
        """At most `count` requests by what a person sees of them, answered alike each time; none where answers are

        no text. `folder` is a model's.
        """
        return {}


class Task(DataContract, Regularized):
    """One family of models: how to read examples, build a network, compute a loss, score, and answer a request."""

    streams: ClassVar[bool] = False
    """Whether `score` takes networks loaded with `empty=True`, whose weights it reads a block at a time."""

    # ---- networks ---------------------------------------------------------------------------------------------
    @final
    def build(self, size: int, seed: int = 0) -> nn.Module:
        """A fresh network from one dial, its weights drawn from `seed`: larger `size` means more parameters."""
        if size < 1:
            raise ConfigError(f"size is {size}; it must be at least 1")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._build(size)

    @abstractmethod
    def _build(self, size: int) -> nn.Module: ...

    @final
    def load(self, folder: Path, *, empty: bool = False) -> nn.Module:
        """A network in eval mode from a Hugging Face layout folder, plain or packed; float32 parameters.

        With `empty=True` parameters are on the meta device and hold no data (calibration fills one block at a time).
        """
        return self._load(folder, empty).eval()

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

    def positions(self, batch: Batch) -> Tensor:
        """How many positions the loss of each example of a batch [examples, …] is the mean over, int64 [examples].

        An example of 0 positions is not trained or counted; its loss is any finite number.
        """
        return torch.ones(next(iter(batch.values())).shape[0], dtype=torch.int64)

    def likely_drop(self, increase: float) -> float | None:
        """The `quality_loss` of a model whose outputs diverge by `increase` nats; None where only measuring tells."""
        return None

    def expected(self, output: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of what leaves the last block [..., outputs], where it tells how likely each output is: the probabilities p,

        and the squared gradients p (1 - p) that the loss is expected to have there, summed over positions: float32
        [outputs] each. None elsewhere.
        """
        return None

    @final
    def backward(self, model: nn.Module, last: Block, x: Tensor, index: int, batch: Batch) -> Tensor:
        """The gradient at `x` [batch, …], what enters the last block, of the sum of the batch's losses (no parent).

        The block's parameters hold data; `index` is the batch's place among those that `blocks` was given.
        """
        leaf = x.detach().requires_grad_(True)
        self._backward(model, last, leaf, index, batch)
        assert leaf.grad is not None, f"{self.name}: the loss does not depend on what enters {last.name}"
        return leaf.grad

    def _backward(self, model: nn.Module, last: Block, x: Tensor, index: int, batch: Batch) -> None:
        self._output_loss(last.forward(x, index), batch).sum().backward()

    def _output_loss(self, output: Tensor, batch: Batch) -> Tensor:
        """One loss per example from what leaves the last block, for families whose models have a loss of their own."""
        raise AssertionError(f"{self.name} has a loss of its own, and no _output_loss")

    @final
    def blocks(self, model: nn.Module, batches: Sequence[Batch], *, whole: bool = False) -> list[Block]:
        """The sequence of sub-modules through which `batches` [batch, …] stream, embedding and head included.

        Works on a model loaded with `empty=True`: nothing is computed before a block's `forward` is called, and
        blocks are called in order. Every parameter belongs to exactly one block's prefixes, except shared ones.
        `whole`: one block that is all of the network, for those whose parts do not form a sequence. ConfigError where
        they do not, and where nothing can be packed.
        """
        blocks = [self._whole(model, batches)] if whole else self._blocks(model, batches)
        seen = [name for block in blocks for name in block.weights]
        assert len(seen) == len(set(seen)), f"{self.name}: a weight is in two blocks"
        if not seen:
            raise ConfigError(f"{self.name}: no weight of this model can be packed; nothing to compress")
        return blocks

    @abstractmethod
    def _blocks(self, model: nn.Module, batches: Sequence[Batch]) -> list[Block]: ...

    def _whole(self, model: nn.Module, batches: Sequence[Batch]) -> Block:
        def forward(x: Any, index: int) -> Tensor:
            return self._loss(model, batches[index], None if self.row.own_loss else model)

        return Block("network", ("",), packable(model), forward)

    @final
    def couplings(self, model: nn.Module) -> list[Coupling]:
        """What can only be removed together, for pruning; empty where nothing can be."""
        couplings = self._couplings(model)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        for coupling in couplings:
            for name, dim, size in coupling.members:
                fits = shapes[name][dim] == coupling.units * size
                assert fits, f"{self.name}: {coupling.name} does not divide {name} {tuple(shapes[name])}"
        return couplings

    def _couplings(self, model: nn.Module) -> list[Coupling]:
        return []

    # ---- judgement --------------------------------------------------------------------------------------------
    @final
    def score(
        self,
        model: nn.Module,
        dataset: Artifact,
        parent: nn.Module | None = None,
        *,
        folder: Path,
        options: FamilyOptions | None = None,
        share: float = 1.0,
        kept: Path | None = None,
        advance: Advance = lambda share: None,
    ) -> list[Evidence]:
        """Metrics with 95 % intervals on `share` of the usual part of the eval split, paired against `parent` when

        given, beside the simplest baseline. `artifact_id`, `parent_id`, `machine` and `command` are filled in by the
        caller. Networks may come without weights where the family `streams`. `kept` is a folder of this parent's, in
        which what it answers may lie for the next score; `advance` is called with the share of the work that is done.
        """
        evidence = self._score(model, dataset, parent, folder, options or self.chosen(), share, kept, advance)
        assert evidence, f"{self.name}: score returned no evidence"
        return evidence

    @abstractmethod
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
    ) -> list[Evidence]: ...

    @final
    def workloads(self, model: nn.Module, folder: Path) -> dict[str, Callable[[], int]]:
        """Metric -> a standard piece of work that returns how many units it did; what the step `speed` times."""
        work = self._workloads(model, folder)
        assert self.row.speed_metric in work, f"{self.name}: no workload measures its {self.row.speed_metric}"
        return work

    @abstractmethod
    def _workloads(self, model: nn.Module, folder: Path) -> dict[str, Callable[[], int]]: ...
