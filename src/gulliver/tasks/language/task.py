"""The language family: causal language models, any that transformers can load."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from gulliver.core.evidence.evidence import Evidence
from gulliver.core.store.artifact import Artifact
from gulliver.nets.linear_kl import chunk_rows, linear_kl
from gulliver.runtime.network import load_network
from gulliver.runtime.reference_decode import ReferenceDecoder
from gulliver.runtime.workloads import workloads
from gulliver.tasks.base import Advance, Author, Batch, Block
from gulliver.tasks.language import network, text, writing
from gulliver.tasks.language.prompts import prompts
from gulliver.tasks.language.score import score_causal, window_length
from gulliver.tasks.order import Order
from gulliver.tasks.text.network import fresh_network
from gulliver.tasks.text.task import TextTask
from gulliver.tasks.text.tokenizer import BYTE_VOCABULARY


class LanguageTask(TextTask):
    """Text in, a distribution over the next token out."""

    name: ClassVar[str] = "language"
    generates: ClassVar[bool] = True
    streams: ClassVar[bool] = True
    smooths: ClassVar[bool] = True

    def _batches(self, dataset: Artifact, split: str, order: Order, folder: Path, options: Any) -> Iterator[Batch]:
        return text.window_batches(text.token_stream(dataset, split, folder), options.tokens, order)

    def prompts(self, dataset: Artifact, folder: Path, count: int) -> dict[str, dict[str, Any]]:
        """Questions for a model with a chat template, beginnings of held-out passages for others; answered greedily."""
        return prompts(dataset, folder, count)

    def _author(
        self, folder: Path, options: Any, seed: int, work: Path, max_ram_bytes: int | None
    ) -> AbstractContextManager[Author]:
        return writing.Author(folder, options.tokens, seed, work, max_ram_bytes)

    def _build(self, size: int) -> nn.Module:
        """A fresh Llama that reads bytes: `size` layers + 1, width 32 · (size + 1)."""
        config = {"num_key_value_heads": size + 1, "max_position_embeddings": 2048, "tie_word_embeddings": True}
        ends = {"bos_token_id": None, "eos_token_id": BYTE_VOCABULARY - 1}
        return fresh_network(transformers.LlamaForCausalLM, size, **config, **ends)

    def _load(self, folder: Path, empty: bool) -> nn.Module:
        return load_network(folder, empty)

    def _loss(self, model: nn.Module, batch: Batch, parent: nn.Module | None) -> Tensor:
        """Products run in bfloat16 where the caller has autocast on, else in the parameters' dtype."""
        tokens = batch["tokens"]
        if parent is not None:
            return _divergence(model, parent, tokens)
        logits = network.logits_of(model, tokens)[:, :-1]
        return _next_token_losses(logits, tokens[:, 1:], self.smoothing(model)).mean(1)

    def check_data(self, dataset: Artifact, folder: Path) -> None:
        options = self.chosen()
        next(self.batches(dataset, "train", 1, 0, 0, folder=folder, options=options))
        window_length(len(text.token_stream(dataset, "eval", folder)), options.windows, options.context)

    def positions(self, batch: Batch) -> Tensor:
        """The tokens of each text that are predicted, int64 [batch]: all but the first of [batch, tokens]."""
        examples, tokens = batch["tokens"].shape
        return torch.full((examples,), max(1, tokens - 1))

    def expected(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Of logits [..., vocabulary]: those of the next token, float32 [vocabulary] each."""
        likely = output.float().softmax(-1).flatten(0, -2)
        total = likely.sum(0)
        return total, total - likely.square().sum(0)

    def likely_drop(self, increase: float) -> float:
        """The ratio of perplexities, less one."""
        return math.expm1(increase)

    def _backward(self, model: nn.Module, last: Block, x: Tensor, index: int, batch: Batch) -> None:
        """A chunk of positions at a time, so that logits [batch, tokens, vocab] are never whole."""
        targets = batch["tokens"][:, 1:]
        examples, positions = targets.shape
        step = max(1, chunk_rows(network.vocabulary_of(model)) // examples)
        for start in range(0, positions, step):
            stop = min(start + step, positions)
            logits = last.forward(x[:, start:stop], index)
            (_next_token_losses(logits, targets[:, start:stop]).sum() / positions).backward()

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
        """`share` of the windows of `context` tokens is scored, at least two, and of the questions."""
        windows = max(2, round(share * options.windows))
        sizes = {"windows": windows, "context": options.context, "questions": round(share * options.questions)}
        return score_causal(model, dataset, parent, folder, **sizes, kept=kept, advance=advance)

    def _workloads(self, model: nn.Module, folder: Path) -> dict[str, Callable[[], int]]:
        return workloads(ReferenceDecoder(folder, model=model))


def _next_token_losses(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross entropy of logits [batch, positions, vocab] at each of `targets`, float32 [batch, positions]."""
    scores = logits.float().transpose(1, 2)
    return torch.nn.functional.cross_entropy(scores, targets, reduction="none", label_smoothing=smoothing)


def _divergence(model: nn.Module, parent: nn.Module, tokens: Tensor) -> Tensor:
    """KL(parent || model) per example, mean over positions, float32 [batch]."""
    if network.has_plain_head(model) and network.has_plain_head(parent):
        with torch.no_grad():
            target = network.final_hidden(parent, tokens)
        hidden = network.final_hidden(model, tokens)
        precision = torch.bfloat16 if torch.is_autocast_enabled("cpu") else hidden.dtype
        ours = hidden.flatten(0, 1), network.head_weight(model)
        theirs = target.flatten(0, 1), network.head_weight(parent)
        return linear_kl(*ours, *theirs, precision).view(tokens.shape).mean(1)
    with torch.no_grad():
        target = torch.log_softmax(network.logits_of(parent, tokens).float(), -1)
    ours = torch.log_softmax(network.logits_of(model, tokens).float(), -1)
    return (target.exp() * (target - ours)).sum(-1).mean(1)
