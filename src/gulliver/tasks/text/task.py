"""What families that read text have in common: examples, blocks of a transformer, and how a network is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import torch
from torch import nn

from gulliver.core.store.artifact import Artifact
from gulliver.core.store.manifest import FileEntry
from gulliver.tasks.base import Batch, Block, Coupling, Task
from gulliver.tasks.options import TextOptions
from gulliver.tasks.text.couplings import transformer_couplings
from gulliver.tasks.text.files import dataset_texts, paragraphs, phrases, text_batches
from gulliver.tasks.text.network import save_network
from gulliver.tasks.text.streaming import Stream, largest_list
from gulliver.tasks.text.tokenizer import load_tokenizer, tokens_of


def reader_files(model: Artifact) -> dict[str, FileEntry]:
    """The files that turn text into tokens, with their hashes."""
    kinds = ("token", "vocab", "merges", ".model")
    return {name: entry for name, entry in model.files.items() if any(kind in name for kind in kinds)}


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

    def reads_alike(self, model: Artifact, parent: Artifact, dataset: Artifact) -> bool:
        """Equal tokenizer files, or equal ids of the eval part's texts and of every token that both have."""
        if (files := reader_files(model)) and files == reader_files(parent):
            return True
        ours, theirs = load_tokenizer(model.path), load_tokenizer(parent.path)
        known = theirs.get_vocab()
        if any(known.get(token, number) != number for token, number in ours.get_vocab().items()):
            return False
        return all(
            torch.equal(tokens_of(ours, text), tokens_of(theirs, text)) for text in dataset_texts(dataset, "eval")
        )

    def _save(self, model: nn.Module, folder: Path) -> None:
        save_network(model, folder)

    def _blocks(self, model: nn.Module, batches: Sequence[Batch]) -> list[Block]:
        return Stream(model, batches).blocks()

    def _residual_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        return largest_list(model)[1]  # type: ignore[return-value]

    def _couplings(self, model: nn.Module) -> list[Coupling]:
        return transformer_couplings(model)
