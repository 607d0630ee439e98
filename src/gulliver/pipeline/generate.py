"""A model that writes text, token by token: what `gulliver.generate`, `gulliver generate` and `gulliver chat` share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from gulliver.core.errors import ConfigError
from gulliver.core.progress import Progress
from gulliver.pipeline.ask import open_answerer, open_store, shown_name
from gulliver.pipeline.spec import Spec
from gulliver.runtime.batching.records import Piece, Request, check_finish
from gulliver.runtime.sampling import Sampling
from gulliver.tasks.answerer import MAX_TOKENS, TEMPERATURE, Generating, OpenOptions, Prompt

SLOTS = 16
"""Most prompts that are answered at once."""


@dataclass(frozen=True)
class Answer:
    """One answer; `prompt_seconds` run until its first token was there, `decode_seconds` from then to the last.

    They are None where several answers were computed together.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prompt_seconds: float | None = None
    decode_seconds: float | None = None

    def timings(self) -> dict[str, float | None]:
        """Tokens per second of the prompt and of the answer; None where there is nothing to divide."""
        computed, later = self.prompt_tokens - self.cached_tokens, self.completion_tokens - 1
        return {
            "first_token_seconds": self.prompt_seconds,
            "prompt_tokens_per_s": _rate(computed, self.prompt_seconds),
            "decode_tokens_per_s": _rate(later, self.decode_seconds),
        }


class OpenModel:
    """A model that answers, until it is closed; use it in a `with` block."""

    def __init__(self, answerer: Generating, load_seconds: float) -> None:
        self.engine, self.folder, self.load_seconds = answerer.engine, answerer.folder, load_seconds
        self.tokens, self.request, self.name = answerer.tokens, answerer.request, shown_name(answerer)

    def __enter__(self) -> OpenModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.close()

    @property
    def has_chat_template(self) -> bool:
        return self.engine.text.has_chat_template

    def answer(self, request: Request, write: Callable[[str], object]) -> Answer:
        """The answer to one request, its text written as it comes. GulliverError when it ends by an error."""
        before = self._seconds()
        pieces: list[Piece] = []
        for piece in self.engine.stream(request):
            pieces.append(piece)
            if piece.text:
                write(piece.text)
        after = self._seconds()
        return _answer(pieces, after[0] - before[0], after[1] - before[1])

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers to several requests, computed together. GulliverError when one ends by an error."""
        return [_answer(pieces) for pieces in self.engine.complete(requests)]

    def told(self, answer: Answer | None = None) -> str:
        """One line: the tokens and rates of an answer, and what runs the model."""
        decoder = self.engine.decoder
        backend = f"{self.name} by {decoder.backend}: {decoder.why}"
        if answer is None:
            return backend
        told = [f"{answer.prompt_tokens} + {answer.completion_tokens} tokens ({answer.finish_reason})"]
        timings = answer.timings()
        for key, what in (("prompt_tokens_per_s", "prompt"), ("decode_tokens_per_s", "answer")):
            if timings[key] is not None:
                told.append(f"{timings[key]:.0f} {what} tokens/s")
        return f"{', '.join(told)}; {backend}"

    def _seconds(self) -> tuple[float, float]:
        """What the engine has spent so far on reaching first tokens and on later ones."""
        found = self.engine.histograms()
        return found["first_token_seconds"].total, found["between_tokens_seconds"].total


def open_model(
    spec: Spec,
    options: OpenOptions | None = None,
    *,
    store: Callable[[], Any],
    progress: Progress | None = None,
) -> OpenModel:
    """The model that `spec` names, ready to answer, by default one request at a time; see `ask.open_answerer`.

    ConfigError when it is not a language model, BudgetError when the memory limit is too little.
    """
    began = time.perf_counter()
    answerer = open_answerer(spec, options or OpenOptions(slots=1), store=store, can="generate", progress=progress)
    assert isinstance(answerer, Generating)
    return OpenModel(answerer, time.perf_counter() - began)


def generate(
    model: Spec | OpenModel,
    prompt: Prompt,
    *,
    stream: bool = False,
    max_tokens: int | None = MAX_TOKENS,
    stop: Sequence[str] = (),
    json_schema: Mapping[str, Any] | None = None,
    system: str | None = None,
    raw: bool = False,
    opening: OpenOptions | None = None,
    home: Path | str | None = None,
    **sampling: Any,
) -> str | Iterator[str]:
    """The model's answer to `prompt` (text, or messages) as text; an iterator over its pieces when `stream`.

    `sampling` are the fields of `runtime.sampling.Sampling` (`temperature` = 0.7, `top_p`, `seed`, …). The model's chat
    template is used when there is one, unless `raw`. ConfigError for a wrong option.
    """
    known = [field.name for field in fields(Sampling)]
    for name in sampling:
        if name not in known:
            raise ConfigError(f"generate does not take {name!r}; how tokens are chosen: {', '.join(known)}")
    chosen = Sampling(**{"temperature": TEMPERATURE, **sampling})
    single = None if opening is None else replace(opening, slots=1)

    def pieces() -> Iterator[str]:
        with ExitStack() as stack:
            opened = model
            if not isinstance(opened, OpenModel):
                opened = stack.enter_context(open_model(opened, single, store=lambda: open_store(home)))
            tokens = opened.tokens(prompt, raw=raw, system=system)
            request = opened.request(tokens, sampling=chosen, max_tokens=max_tokens, stop=stop, json_schema=json_schema)
            for piece in opened.engine.stream(request):
                check_finish(piece.finish)
                if piece.text:
                    yield piece.text

    return pieces() if stream else "".join(pieces())


def _answer(
    pieces: Sequence[Piece], prompt_seconds: float | None = None, decode_seconds: float | None = None
) -> Answer:
    last = pieces[-1]
    check_finish(last.finish)
    assert last.finish is not None
    return Answer(
        text="".join(piece.text for piece in pieces),
        tokens=tuple(choice.id for piece in pieces for choice in piece.tokens),
        finish_reason=last.finish,
        prompt_tokens=last.prompt_tokens,
        cached_tokens=last.cached_tokens,
        completion_tokens=last.completion_tokens,
        prompt_seconds=prompt_seconds,
        decode_seconds=decode_seconds,
    )


def _rate(count: int, seconds: float | None) -> float | None:
    return round(count / seconds, 2) if seconds and count > 0 else None


def seconds_since_start() -> float | None:
    """Seconds since this process was started, to a hundredth; None where the system does not tell."""
    try:
        words = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return round(time.clock_gettime(time.CLOCK_BOOTTIME) - int(words[19]) / os.sysconf("SC_CLK_TCK"), 3)
    except (OSError, AttributeError):
        return None
