"""What families that read text have in common: examples, blocks of a transformer, and how a network is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from torch import nn

from gulliver.tasks.base import Batch, Block, Coupling, Task
from gulliver.tasks.options import TextOptions
from gulliver.tasks.text.couplings import transformer_couplings
from gulliver.tasks.text.files import paragraphs, phrases, text_batches
from gulliver.tasks.text.network import save_network
from gulliver.tasks.text.streaming import Stream


class TextTask(Task):
    """A family of transformers that read text."""

    def _examples(self, source: Path, split: str, options: TextOptions) -> Iterator[pyarrow.RecordBatch]:
        return text_batches(source, split, options)

    def units(self, example: Mapping[str, Any]) -> Iterator[str]:
        """Its text's lines and paragraphs of at least 200 characters."""
        return paragraphs(example["text"])

    def phrases(self, example: Mapping[str, Any]) -> Iterator[str]:
        """Its text's lines, cut into sentences."""
        return phrases(example["text"])

    def _save(self, model: nn.Module, folder: Path) -> None:
        save_network(model, folder)

    def _blocks(self, model: nn.Module, batches: Sequence[Batch]) -> list[Block]:
        return Stream(model, batches).blocks()

    def _couplings(self, model: nn.Module) -> list[Coupling]:
        return transformer_couplings(model)
