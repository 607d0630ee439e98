"""The digits family: sequences of digits, of which the next one is told, judged by a metric of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pyarrow.parquet
import torch
from gulliver.tasks.digits_toy.config import CONTEXT
from gulliver.tasks.digits_toy.network import DigitsNetwork, load, save
from gulliver.tasks.digits_toy.options import DigitsOptions
from torch import Tensor, nn

from gulliver.core.errors import DataError
from gulliver.core.evidence.evidence import Evidence, measured, paired_interval
from gulliver.core.records import EXAMPLES
from gulliver.core.store.artifact import MANIFEST, Artifact, open_artifact
from gulliver.tasks.base import Advance, Batch, Block, Coupling, Task
from gulliver.tasks.order import Order


class DigitsTask(Task):
    """An example is a sequence; a batch holds `digits` int64 [batch, CONTEXT] and `next` int64 [batch]."""

    name: ClassVar[str] = "digits_toy"

    def _examples(self, source: Path, split: str, options: DigitsOptions) -> Iterator[pyarrow.RecordBatch]:
        yield pyarrow.RecordBatch.from_pydict({"digits": sequences(source, split, options.held_out)})

    def units(self, example: Mapping[str, Any]) -> Iterator[str]:
        """The sequence."""
        yield example["digits"]

    def _batches(self, dataset: Artifact, split: str, order: Order, folder: Path, options: Any) -> Iterator[Batch]:
        del folder
        whole = windows(sequences(dataset.path, split, options.held_out))
        for places in order.batches(len(whole["next"])):
            chosen = torch.tensor([item for _, item in places])
            yield {name: tensor[chosen] for name, tensor in whole.items()}

    def _build(self, size: int) -> nn.Module:
        return DigitsNetwork(size)

    def _load(self, folder: Path, empty: bool) -> nn.Module:
        return load(folder, empty)

    def _save(self, model: nn.Module, folder: Path) -> None:
        save(model, folder)

    def _loss(self, model: nn.Module, batch: Batch, parent: nn.Module | None) -> Tensor:
        logits = model(batch["digits"]).float()
        if parent is None:
            return self._output_loss(logits, batch)
        with torch.no_grad():
            target = parent(batch["digits"]).float().log_softmax(-1)
        return (target.exp() * (target - logits.log_softmax(-1))).sum(-1)

    def _output_loss(self, output: Tensor, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(output.float(), batch["next"], reduction="none")

    def _blocks(self, model: nn.Module, batches: Sequence[Batch]) -> list[Block]:
        del batches
        assert isinstance(model, DigitsNetwork)
        return [
            Block(
                "table",
                ("table.",),
                ("table.weight",),
                lambda x, index: model.looked_up(x["digits"]),
            ),
            Block("hidden", ("hidden.",), ("hidden.weight",), lambda x, index: model.hidden(x).relu()),
            Block("head", ("head.",), ("head.weight",), lambda x, index: model.head(x)),
        ]

    def _couplings(self, model: nn.Module) -> list[Coupling]:
        assert isinstance(model, DigitsNetwork)
        members = (("hidden.weight", 0, 1), ("hidden.bias", 0, 1), ("head.weight", 1, 1))
        return [Coupling("hidden units", 64 * model.size, members)]

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
        """One observation is a sequence: the fraction of its digits that were told right."""
        del folder
        held_out = sequences(dataset.path, "eval", options.held_out)
        held_out = held_out[: max(2, round(share * len(held_out)))]
        counts = windows(sequences(dataset.path, "train", options.held_out))["next"].bincount(minlength=10)
        ours = _right(held_out, lambda batch: model(batch["digits"]).argmax(-1))
        base = _right(held_out, lambda batch: counts.argmax().expand(len(batch["next"])))
        data_hash = dataset.files[EXAMPLES].sha256

        def row(name: str, values: Sequence[float]) -> Evidence:
            return measured(name, *paired_interval(values), n=len(values), data_hash=data_hash)

        rows = [
            row("next_digit_accuracy", ours),
            row("baseline_next_digit_accuracy", base),
            row("next_digit_accuracy_vs_baseline", [one - other for one, other in zip(ours, base, strict=True)]),
        ]
        if parent is not None:
            theirs = _right(held_out, lambda batch: parent(batch["digits"]).argmax(-1))
            rows.append(row("quality_loss", [other - one for one, other in zip(ours, theirs, strict=True)]))
        return rows

    def _workloads(self, model: nn.Module, folder: Path) -> dict[str, Callable[[], int]]:
        del folder
        digits = torch.arange(256 * CONTEXT).reshape(256, CONTEXT) % 10

        def tell() -> int:
            with torch.inference_mode():
                return len(model(digits))

        return {"examples_per_s": tell}


def sequences(source: Path, split: str, held_out: float) -> list[str]:
    """The sequences of a split, from a dataset artifact or a .jsonl file with the column `digits`."""
    if (source / MANIFEST).is_file():
        table = pyarrow.parquet.read_table(open_artifact(source).file(EXAMPLES)).to_pylist()
        return [row["digits"] for row in table if split in (row["split"], "all")]
    try:
        found = [json.loads(line)["digits"] for line in source.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{source} holds no sequences of digits: {error}; give a .jsonl file") from error
    found = list(dict.fromkeys(found))
    late = [int(hashlib.sha256(one.encode()).hexdigest()[:8], 16) / 2**32 < held_out for one in found]
    return [one for one, last in zip(found, late, strict=True) if split == "all" or last == (split == "eval")]


def windows(found: Sequence[str]) -> Batch:
    """Every place of every sequence that has CONTEXT digits before it."""
    places = [(one[start : start + CONTEXT], one[start + CONTEXT]) for one in found for start in _starts(one)]
    return {
        "digits": torch.tensor([[int(digit) for digit in before] for before, _ in places]),
        "next": torch.tensor([int(after) for _, after in places]),
    }


def _starts(sequence: str) -> range:
    return range(len(sequence) - CONTEXT)


def _right(found: Sequence[str], tell: Callable[[Batch], Tensor]) -> list[float]:
    """The fraction told right of each sequence."""
    whole = windows(found)
    with torch.inference_mode():
        right = (tell(whole) == whole["next"]).float()
    return [float(part.mean()) for part in right.split([len(_starts(one)) for one in found])]
