"""Answers to OpenAI's requests as bytes: what those of chats and of completions share."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

import orjson

from gulliver.runtime.batching.records import Piece
from gulliver.serve.openai.generation import Generation, failure_of
from gulliver.serve.state import RequestRecord, ServedModel

DONE = b"data: [DONE]\n\n"
LOWEST = -9999.0
"""How a probability of zero is written: JSON cannot hold infinity."""


class AnswerWriter:
    """Writes the answer to one request, whole or as server-sent events.

    `per_prompt`: choices of each prompt, which counts once; None: all are of one.
    """

    prefix: ClassVar[str]
    """Of the answer's id."""
    kinds: ClassVar[tuple[str, str]]
    """`object` of a whole answer, and of an event."""

    def __init__(
        self,
        model: ServedModel,
        call: RequestRecord,
        *,
        logprobs: bool,
        include_usage: bool,
        per_prompt: int | None = None,
    ) -> None:
        self.text = model.engine.text
        self.logprobs = logprobs
        self._call = call
        self._include_usage = include_usage
        self._per_prompt = per_prompt
        self._about = {
            "id": f"{self.prefix}-{call.id}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }

    def count(self, run: Generation) -> None:
        """Write what the run used into the record of its request."""
        call, pieces = self._call, [piece for piece in run.last if piece is not None]
        firsts = [piece for piece in run.last[:: self._per_prompt or len(run.last)] if piece is not None]
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

    def events(self, choices: Sequence[dict[str, Any]], piece: Piece) -> bytes:
        """An event for each of a piece's choices; an error in the place of the last when the piece ends by one."""
        failure = failure_of(piece) if piece.finish is not None else None
        if failure is None:
            return b"".join(map(self.event, choices))
        return b"".join([*map(self.event, choices[:-1]), b"data: ", failure.body(), b"\n\n"])

    def closing(self) -> bytes:
        """The last events: usage where it was asked for, and the end mark."""
        return self.event(usage=self._usage()) + DONE if self._include_usage else DONE

    def document(self, choices: Sequence[dict[str, Any]]) -> bytes:
        """A whole answer."""
        return orjson.dumps({"object": self.kinds[0], **self._about, "choices": choices, "usage": self._usage()})

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
