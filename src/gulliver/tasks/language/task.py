"""The language family: causal language models and sentence encoders, anything that transformers can load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gulliver.core.errors import ConfigError, DataError
from gulliver.core.evidence.evidence import Evidence
from gulliver.core.store.artifact import Artifact
from gulliver.nets.linear_kl import linear_kl
from gulliver.tasks.base import Batch, Block, Task
from gulliver.tasks.language import network, text
from gulliver.tasks.language.score import score_causal, score_encoder
from gulliver.tasks.language.streaming import stream_blocks
from gulliver.tasks.language.workloads import causal_workloads, encoder_workloads
from gulliver.tasks.language.writing import write_texts


@dataclass(frozen=True)
class LanguageTask(Task):
    """Text in, tokens or vectors out. `holdout` (a fraction) and `text_column` say how raw files are read."""

    name: ClassVar[str] = "language"
    holdout: float = 0.1
    text_column: str = "text"

    def _read(self, source: str | Path, split: str) -> list[dict[str, Any]]:
        return text.read_examples(source, split, self.holdout, self.text_column)

    def _batches(
        self, dataset: Artifact, split: str, batch_size: int, seed: int, step: int, folder: Path, *, tokens: int = 512
    ) -> Iterator[Batch]:
        if network.is_encoder(folder, network.read_config(folder)):
            return text.passage_batches(text.passages(dataset, split), folder, tokens, batch_size, seed, step)
        return text.window_batches(text.token_stream(dataset, split, folder), tokens, batch_size, seed, step)

    def _build(self, size: int, seed: int) -> nn.Module:
        return network.build_network(size, seed)

    def _load(self, folder: Path, empty: bool) -> nn.Module:
        return network.load_network(folder, empty)

    def _save(self, model: nn.Module, folder: Path) -> None:
        network.save_network(model, folder)

    def _loss(self, model: nn.Module, batch: Batch, parent: nn.Module | None) -> Tensor:
        """Products run in bfloat16 where the caller has autocast on, else in the parameters' dtype."""
        if getattr(model, "is_sentence_encoder", False):
            if parent is None:
                raise ConfigError("a sentence encoder has no loss of its own; give a parent to be close to")
            with torch.no_grad():
                target = network.encode(parent, batch)
            return 1 - (network.encode(model, batch) * target).sum(-1)
        tokens = batch["tokens"]
        if parent is None:
            logits = network.logits_of(model, tokens)[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
            return losses.mean(1)
        return _divergence(model, parent, tokens)

    def _blocks(self, model: nn.Module, batches: Sequence[Batch]) -> list[Block]:
        return stream_blocks(model, batches)

    def _score(
        self,
        model: nn.Module,
        dataset: Artifact,
        parent: nn.Module | None,
        folder: Path,
        *,
        windows: int = 24,
        context: int = 1024,
        texts: int = 256,
        share: float = 1.0,
    ) -> list[Evidence]:
        """`share` of the `texts`, or of the `windows` of `context` tokens, is scored; at least two."""
        if getattr(model, "is_sentence_encoder", False):
            return score_encoder(model, dataset, parent, folder, max(2, round(share * texts)))
        return score_causal(model, dataset, parent, folder, max(2, round(share * windows)), context)

    def workloads(self, model: nn.Module, folder: Path) -> dict[str, Callable[[], int]]:
        """Metric -> a function that does a standard piece of work and returns how many units it was."""
        del folder
        encoder = getattr(model, "is_sentence_encoder", False)
        return encoder_workloads(model) if encoder else causal_workloads(model)

    def writes(self, folder: Path) -> bool:
        """Whether the model in `folder` can write text: causal models do, sentence encoders do not."""
        return not network.is_encoder(folder, network.read_config(folder))

    def write(
        self,
        model: nn.Module,
        folder: Path,
        count: int,
        tokens: int,
        generator: torch.Generator,
        advance: Callable[[], None] | None = None,
    ) -> list[str]:
        """`count` texts of the model's own, of about `tokens` tokens; leaves its parameters in bfloat16."""
        return write_texts(model, folder, count, tokens, generator, advance)

    def answer(self, model: nn.Module, request: dict[str, Any], *, folder: Path) -> dict[str, Any]:
        """{"prompt" or "messages", "max_new_tokens" = 64} -> {"text", "tokens"}; {"texts"} -> {"embeddings"}."""
        if getattr(model, "is_sentence_encoder", False):
            texts = request.get("texts")
            if not isinstance(texts, list) or not texts or not all(isinstance(item, str) for item in texts):
                raise DataError("a request to a sentence encoder needs 'texts', a list of text")
            with torch.no_grad():
                return {"embeddings": network.encode(model, text.encode_texts(texts, folder, 512)).tolist()}
        tokenizer = text.load_tokenizer(folder)
        prompt = request.get("prompt")
        if isinstance(request.get("messages"), list):
            prompt = tokenizer.apply_chat_template(request["messages"], tokenize=False, add_generation_prompt=True)
        if not isinstance(prompt, str) or not prompt:
            raise DataError("a request needs 'prompt' (text) or 'messages' (a list of role and content)")
        tokens = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"]
        new = network.greedy(model, tokens, int(request.get("max_new_tokens", 64)))
        return {"text": tokenizer.decode(new, skip_special_tokens=True), "tokens": new}


def _divergence(model: nn.Module, parent: nn.Module, tokens: Tensor) -> Tensor:
    """KL(parent || model) per example, mean over positions, float32 [batch]."""
    if network.has_plain_head(model) and network.has_plain_head(parent):
        with torch.no_grad():
            target = network.final_hidden(parent, tokens)
        hidden = network.final_hidden(model, tokens)
        precision = torch.bfloat16 if torch.is_autocast_enabled("cpu") else hidden.dtype
        rows = linear_kl(
            hidden.flatten(0, 1),
            network.head_weight(model),
            target.flatten(0, 1),
            network.head_weight(parent),
            precision,
        )
        return rows.view(tokens.shape).mean(1)
    with torch.no_grad():
        target = torch.log_softmax(network.logits_of(parent, tokens).float(), -1)
    ours = torch.log_softmax(network.logits_of(model, tokens).float(), -1)
    return (target.exp() * (target - ours)).sum(-1).mean(1)
