"""Sentence encoders: texts to vectors of length one, in one thread, by torch.

What sentence-transformers' files say is done: modules.json (does a Normalize follow?), 1_Pooling/config.json (mean,
first token or maximum; Sentence-BERT, 2019, arXiv 1908.10084), sentence_bert_config.json (the longest text). torch and
transformers are imported when an encoder is loaded, not before.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.runtime.batching.counters import Histogram
from gulliver.runtime.batching.records import EngineClosed, QueueFull
from gulliver.runtime.text.tokenizer import Text

BATCH_TOKENS = 4096
"""Most tokens, padding included, of one pass."""
POOLINGS = {"pooling_mode_cls_token": "first", "pooling_mode_max_tokens": "maximum", "pooling_mode_mean_tokens": "mean"}
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one: "mean", "first" or "maximum"; `longest` in tokens."""

    kind: str
    normalize: bool
    longest: int


class Encoder:
    """A sentence encoder that answers one request after the other. `queue` is the most that may wait."""

    def __init__(self, folder: Path, name: str, *, queue: int = 64, threads: int | None = None) -> None:
        from gulliver.runtime.network import load_network

        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self.name = name
        self.text = Text(folder)
        self._model: Any = load_network(folder, empty=False)
        self.pooling = read_pooling(folder, int(getattr(self._model.config, "max_position_embeddings", 512)))
        self.context = self.pooling.longest
        self.vocabulary = int(self._model.config.vocab_size)
        self.width = int(self._model.config.hidden_size)
        self._queue = queue
        self._waiting = 0
        self._closed = False
        self._stopping = False
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, f"gulliver-{name}")
        self._counts = {"requests": 0.0, "rejected": 0.0, "prompt_tokens": 0.0}
        self._seconds = Histogram(SECONDS)

    def submit(
        self, texts: Sequence[Sequence[int]], stop: threading.Event | None = None
    ) -> Future[NDArray[np.float32]]:
        """Vectors [texts, width] of tokenized texts. QueueFull when too many requests wait, EngineClosed at the end.

        When `stop` is set, the work ends before the next pass, by EngineClosed as the future's exception.
        """
        with self._lock:
            if self._closed:
                raise EngineClosed(f"the model {self.name} takes no new requests")
            if self._waiting >= self._queue:
                self._counts["rejected"] += 1
                raise QueueFull(self._waiting, 1.0 + self._waiting * self._mean_seconds())
            self._waiting += 1
        future = self._thread.submit(self._encode, texts, stop, time.monotonic())
        future.add_done_callback(self._done)
        return future

    def stats(self) -> dict[str, float]:
        """Numbers for metrics.py."""
        return {"requests_waiting": float(self._waiting), **self._counts}

    def histograms(self) -> dict[str, Histogram]:
        """Times for metrics.py."""
        return {"request_seconds": self._seconds}

    def drain(self, seconds: float) -> bool:
        """Take nothing new and wait for what is under way; what takes longer than `seconds` is ended: then False."""
        self._closed = True
        end = time.monotonic() + seconds
        while self._waiting and time.monotonic() < end:
            time.sleep(0.02)
        self._stopping = True
        return not self._waiting

    def close(self) -> None:
        """End the thread; what waits is dropped, and what runs ends before its next pass."""
        self._closed = self._stopping = True
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _done(self, future: Future[Any]) -> None:
        del future
        with self._lock:
            self._waiting -= 1

    def _mean_seconds(self) -> float:
        return self._seconds.total / max(1, sum(self._seconds.counts))

    def _encode(
        self, texts: Sequence[Sequence[int]], stop: threading.Event | None, arrived: float
    ) -> NDArray[np.float32]:
        vectors = np.zeros((len(texts), self.width), np.float32)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        start = 0
        while start < len(order):
            if self._stopping or (stop is not None and stop.is_set()):
                raise EngineClosed(f"the model {self.name} was asked to stop")
            end = start + 1
            while end < len(order) and (end + 1 - start) * len(texts[order[end]]) <= BATCH_TOKENS:
                end += 1
            rows = order[start:end]
            vectors[rows] = self._pass([texts[row] for row in rows])
            start = end
        self._counts["requests"] += 1
        self._counts["prompt_tokens"] += sum(map(len, texts))
        self._seconds.add(time.monotonic() - arrived)
        return vectors

    def _pass(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        import torch

        longest = max(map(len, texts))
        tokens = torch.zeros(len(texts), longest, dtype=torch.long)
        mask = torch.zeros(len(texts), longest, dtype=torch.long)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        with torch.inference_mode():
            hidden = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
            real = mask.unsqueeze(-1).to(hidden.dtype)
            if self.pooling.kind == "first":
                pooled = hidden[:, 0]
            elif self.pooling.kind == "maximum":
                pooled = hidden.masked_fill(real == 0, -torch.inf).amax(1)
            else:
                pooled = (hidden * real).sum(1) / real.sum(1).clamp(min=1)
            if self.pooling.normalize:
                pooled = torch.nn.functional.normalize(pooled, dim=-1)
            return pooled.numpy()


def is_encoder(folder: Path) -> bool:
    """Whether the folder holds a sentence encoder, by its files alone."""
    if (folder / "modules.json").is_file():
        return True
    names = _read(folder / "config.json").get("architectures") or []
    return bool(names) and not any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def read_pooling(folder: Path, positions: int) -> Pooling:
    """What the folder's files say; mean and normalized where they say nothing. ArtifactError for what is not known."""
    modules = _read(folder / "modules.json")
    normalize = not modules or any(str(row.get("type", "")).endswith("Normalize") for row in modules)
    settings = _read(folder / "1_Pooling" / "config.json")
    modes = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on is True]
    unknown = [name for name in modes if name not in POOLINGS]
    if unknown or len(modes) > 1:
        known = ", ".join(POOLINGS)
        raise ArtifactError(f"{folder / '1_Pooling'} asks for {', '.join(modes)}; one at a time is known of: {known}")
    longest = _read(folder / "sentence_bert_config.json").get("max_seq_length")
    longest = longest if type(longest) is int and 0 < longest <= positions else positions
    return Pooling(POOLINGS[modes[0]] if modes else "mean", normalize, longest)


def _read(path: Path) -> Any:
    """A JSON file; an empty object when there is none."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not JSON: {error}; it is damaged") from error


def tokens_of(encoder: Encoder, row: str | Sequence[int], *, truncate: bool) -> tuple[int, ...]:
    """A text, or tokens, as the encoder reads it. ConfigError when it is empty, too long, or names no token."""
    tokens = encoder.text.encode(row) if isinstance(row, str) else list(row)
    if not tokens:
        raise ConfigError("a text is empty; give at least one token")
    if max(tokens) >= encoder.vocabulary:
        raise ConfigError(f"the token {max(tokens)} does not exist; ids go from 0 to {encoder.vocabulary - 1}")
    if len(tokens) > encoder.context:
        if not truncate:
            raise ConfigError(
                f"a text has {len(tokens)} tokens; this model reads {encoder.context}. Cut it, or set truncate to true"
            )
        tokens = [*tokens[: encoder.context - 1], tokens[-1]]  # the last is the mark that ends every text
    return tuple(tokens)
