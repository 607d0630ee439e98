"""An open encoder: texts -> vectors."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, ClassVar

from gulliver.core.errors import ConfigError
from gulliver.runtime.batching.queue import BatchQueue
from gulliver.runtime.text.tokenizer import SHORT_CHARACTERS, Text
from gulliver.tasks.answerer import Can, Embedding, OpenOptions, then
from gulliver.tasks.encoder.pooling import cut, read_pooling

if TYPE_CHECKING:
    from gulliver.tasks.encoder.requests import TextsRequest

BATCH_TOKENS = 4096
"""Most tokens, padding included, of one pass."""


class EncoderAnswerer(Embedding):
    """Texts that wait together are read together, those of like lengths side by side."""

    can: ClassVar[frozenset[Can]] = frozenset({"embed", "predict"})
    request_schema: ClassVar[str] = "gulliver.tasks.encoder.requests:TextsRequest"
    response_schema: ClassVar[str] = "gulliver.tasks.encoder.requests:VectorsResponse"
    family: ClassVar[str] = "encoder"
    engine: BatchQueue[tuple[int, ...], Any]
    context: int

    def __init__(self, folder: Path, name: str, options: OpenOptions) -> None:
        super().__init__(folder, name, options)
        import torch

        from gulliver.tasks.encoder.pooling import encode
        from gulliver.tasks.encoder.task import load_encoder, padded

        self.text = Text(folder)
        model: Any = load_encoder(folder).eval()
        self.context = read_pooling(folder).longest
        self.vocabulary, self.width = int(model.config.vocab_size), int(model.config.hidden_size)

        def read(rows: list[tuple[int, ...]]) -> Any:
            with torch.inference_mode():
                return encode(model, padded(rows)).numpy()

        self.engine = BatchQueue(name, read, queue=options.queue, batch=BATCH_TOKENS, cost=len, unit="prompt_tokens")

    def read(self, words: Sequence[str]) -> Any:
        """Every word is a text."""
        return self.request_model(texts=list(words))

    def submit(self, request: TextsRequest, stop: Event | None = None) -> Future[Any]:
        rows = [self.tokens(text, truncate=request.truncate) for text in request.texts]
        made, count = self.response_model, sum(map(len, rows))

        def response(vectors: list[Any]) -> Any:
            return made(vectors=[vector.tolist() for vector in vectors], prompt_tokens=count)

        return then(self.embed(rows, stop), response)

    def tokens(self, row: str | Sequence[int], *, truncate: bool) -> tuple[int, ...]:
        tokens = self._encoded(row, truncate) if isinstance(row, str) else list(row)
        if not tokens:
            raise ConfigError("a text is empty; give at least one token")
        if max(tokens) >= self.vocabulary:
            raise ConfigError(f"the token {max(tokens)} does not exist; ids go from 0 to {self.vocabulary - 1}")
        if len(tokens) > self.context:
            if not truncate:
                told = f"a text has {len(tokens)} tokens; this model reads {self.context}"
                raise ConfigError(f"{told}. Cut it, or set truncate to true")
            tokens = cut(tokens, self.context)
        return tuple(tokens)

    def _encoded(self, text: str, truncate: bool) -> list[int]:
        """The tokens of a text. What is cut off later need not be tokenized: a text of megabytes would take seconds."""
        most = max(SHORT_CHARACTERS, 2 * self.text.longest * self.context)
        if len(text) > most and not truncate:
            told = f"a text has {len(text)} characters; this model reads {self.context} tokens"
            raise ConfigError(f"{told}. Cut it, or set truncate to true")
        return self.text.encode(text[:most])

    def show(self, response: Any) -> list[str]:
        """The first numbers of each vector, and how near each text is to the first."""
        import numpy as np

        vectors = np.array(response.vectors, np.float32)
        lengths = np.linalg.norm(vectors, axis=1)
        near = vectors @ vectors[0] / np.maximum(lengths * lengths[0], 1e-12)
        rows = [f"[{', '.join(f'{value:.4f}' for value in vector[:6])}, … {len(vector)} in all]" for vector in vectors]
        if len(rows) == 1:
            return rows
        return [f"{row}  cosine to the first {cosine:.4f}" for row, cosine in zip(rows, near, strict=True)]
