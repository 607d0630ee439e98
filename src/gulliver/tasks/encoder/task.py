"""The encoder family: networks that turn a text into one vector, any that transformers can load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import torch
import transformers
from torch import Tensor, nn

from gulliver.core.errors import ConfigError
from gulliver.core.evidence.evidence import Evidence
from gulliver.core.store.artifact import Artifact
from gulliver.runtime.network import load_network
from gulliver.tasks.base import Batch, Block, Coupling, Task
from gulliver.tasks.encoder.options import EncoderOptions
from gulliver.tasks.encoder.pooling import Pooling, encode, read_pooling
from gulliver.tasks.encoder.score import score_encoder
from gulliver.tasks.encoder.text import passage_batches, passages
from gulliver.tasks.encoder.workloads import encoder_workloads
from gulliver.tasks.text.couplings import transformer_couplings
from gulliver.tasks.text.files import paragraphs, text_batches
from gulliver.tasks.text.network import save_network
from gulliver.tasks.text.streaming import stream_blocks
from gulliver.tasks.text.tokenizer import BYTE_VOCABULARY


class EncoderTask(Task):
    """Text in, a vector out. A loaded network bears `pooling`, the rule by which it is measured and served."""

    name: ClassVar[str] = "encoder"

    def _examples(self, source: Path, split: str, options: EncoderOptions) -> Iterator[pyarrow.RecordBatch]:
        return text_batches(source, split, options)

    def units(self, example: Mapping[str, Any]) -> Iterator[str]:
        """Its text's lines and paragraphs of at least 200 characters."""
        return paragraphs(example["text"])

    def _batches(
        self,
        dataset: Artifact,
        split: str,
        batch_size: int,
        seed: int,
        step: int,
        folder: Path,
        options: EncoderOptions,
    ) -> Iterator[Batch]:
        return passage_batches(passages(dataset, split), folder, options.tokens, batch_size, seed, step)

    def _build(self, size: int, seed: int) -> nn.Module:
        """A fresh BERT that reads bytes: `size` layers + 1, width 32 · (size + 1)."""
        width = 32 * (size + 1)
        config = transformers.BertConfig(
            vocab_size=BYTE_VOCABULARY,
            hidden_size=width,
            intermediate_size=width * 3,
            num_hidden_layers=size + 1,
            num_attention_heads=size + 1,
            max_position_embeddings=512,
            architectures=["BertModel"],
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.AutoModel.from_config(config, dtype=torch.float32)
        model.source_folder, model.pooling = "", Pooling("mean", True, 512)
        return model

    def _load(self, folder: Path, empty: bool) -> nn.Module:
        return load_encoder(folder, empty)

    def _save(self, model: nn.Module, folder: Path) -> None:
        save_network(model, folder)

    def _loss(self, model: nn.Module, batch: Batch, parent: nn.Module | None) -> Tensor:
        """One minus the cosine to the parent's vector. ConfigError without a parent: it has no loss of its own."""
        if parent is None:
            raise ConfigError("an encoder has no loss of its own; give a parent to be close to")
        with torch.no_grad():
            target = encode(parent, batch)
        return 1 - torch.nn.functional.cosine_similarity(encode(model, batch), target, dim=-1)

    def _blocks(self, model: nn.Module, batches: Sequence[Batch]) -> list[Block]:
        return stream_blocks(model, batches)

    def _couplings(self, model: nn.Module) -> list[Coupling]:
        return transformer_couplings(model)

    def _score(
        self,
        model: nn.Module,
        dataset: Artifact,
        parent: nn.Module | None,
        folder: Path,
        options: EncoderOptions,
        share: float,
    ) -> list[Evidence]:
        """`share` of the `texts` is scored; at least two."""
        return score_encoder(model, dataset, parent, folder, max(2, round(share * options.texts)))

    def _workloads(self, model: nn.Module, folder: Path) -> dict[str, Callable[[], int]]:
        del folder
        return encoder_workloads(model)


def load_encoder(folder: Path, empty: bool = False) -> nn.Module:
    """The network of a folder with its pooling as `pooling`; without weights when `empty`."""
    model = load_network(folder, empty)
    model.pooling = read_pooling(folder)  # type: ignore[assignment]
    return model
