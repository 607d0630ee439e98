"""Answers to OpenAI's requests as bytes: what those of chats and of completions share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

import orjson

from gulliver.runtime.batching.records import Piece, TokenChoice
from gulliver.serve.openai.generation import Generation, failure_of
from gulliver.serve.openai.request_schemas import GenerationFields
from gulliver.serve.state import RequestRecord, ServedModel

DONE = b"data: [DONE]\n\n"
LOWEST = -9999.0
"""How a probability of zero is written: JSON cannot hold infinity."""


class AnswerWriter:
    """Writes the answer to one request, whole or as server-sent events. `count` comes before `closing` and `whole`."""

    prefix: ClassVar[str]
    """Of the answer's id."""
    kinds: ClassVar[tuple[str, str]]
    """`object` of a whole answer, and of an event."""

    def __init__(self, model: ServedModel, call: RequestRecord, body: GenerationFields) -> None:
        self.text = model.engine.text
        self._call = call
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._per_prompt = body.n or 1
        self._about = {
            "id": f"{self.prefix}-{call.id}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }

    def opening(self, choices: int) -> bytes:
        """The events before the first piece."""
        raise NotImplementedError

    def added(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """The choices that a piece adds to the stream, each an event."""
        raise NotImplementedError

    def part(self, piece: Piece) -> tuple[str, Sequence[TokenChoice]]:
        """(text, tokens) of a piece that are shown."""
        return piece.text, piece.tokens

    def choice(self, index: int, text: str, tokens: Sequence[TokenChoice], finish: str) -> dict[str, Any]:
        """A choice of a whole answer."""
        raise NotImplementedError

    def count(self, run: Generation) -> None:
        """Write what the run used into the record of its request."""
        call, pieces = self._call, [piece for piece in run.last if piece is not None]
        firsts = [piece for piece in run.last[:: self._per_prompt] if piece is not None]  # each prompt counts once
        call.choices = len(run.requests)
        call.prompt_tokens = sum(piece.prompt_tokens for piece in firsts)
        call.cached_tokens = sum(piece.cached_tokens for piece in firsts)
        call.completion_tokens = sum(piece.completion_tokens for piece in pieces)
        call.first_token = run.first_token
        reasons = {(piece.finish or "").split(":")[0] for piece in pieces}
        call.finish = "gone" if run.gone else ",".join(sorted(reasons))

    def event(self, *choices: dict[str, Any], usage: dict[str, Any] | None = None) -> bytes:
        """One event of the stream."""
        event = {"object": self.kinds[1], **self._about, "choices": choices}
        if self._include_usage:
            event["usage"] = usage
        return b"data: " + orjson.dumps(event) + b"\n\n"

    def chunk(self, index: int, piece: Piece) -> bytes:
        """What a piece adds to the stream; an error in the place of the last event when the piece ends by one."""
        choices, failure = self.added(index, piece), failure_of(piece)
        if failure is None:
            return b"".join(map(self.event, choices))
        return b"".join([*map(self.event, choices[:-1]), b"data: ", failure.body(), b"\n\n"])

    def closing(self) -> bytes:
        """The last events: usage where it was asked for, and the end mark."""
        return self.event(usage=self._usage()) + DONE if self._include_usage else DONE

    def whole(self, pieces: Sequence[tuple[int, Piece]], choices: int) -> bytes:
        """The answer in one. ApiError when a completion failed."""
        texts, finishes = [""] * choices, [""] * choices
        tokens: list[list[TokenChoice]] = [[] for _ in texts]
        for index, piece in pieces:
            if (failure := failure_of(piece)) is not None:
                raise failure
            text, shown = self.part(piece)
            texts[index] += text
            tokens[index] += shown
            finishes[index] = piece.finish or ""
        rows = [self.choice(index, *row) for index, row in enumerate(zip(texts, tokens, finishes, strict=True))]
        return orjson.dumps({"object": self.kinds[0], **self._about, "choices": rows, "usage": self._usage()})

    def _usage(self) -> dict[str, Any]:
        call = self._call
        return {
            "prompt_tokens": call.prompt_tokens,
            "completion_tokens": call.completion_tokens,
            "total_tokens": call.prompt_tokens + call.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": call.cached_tokens},
        }


def finite(logprob: float | None) -> float:
    """A logprob as JSON can hold it."""
    return LOWEST if logprob is None else max(float(logprob), LOWEST)
