"""Answers of /v1/chat/completions as bytes: whole, and in events."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from gulliver.runtime.batching.records import Piece, TokenChoice
from gulliver.serve.openai.generation import Generation, failure_of
from gulliver.serve.openai.tools import Called, ToolReader
from gulliver.serve.openai.writer import AnswerWriter, finite
from gulliver.serve.state import RequestRecord, ServedModel


class ChatAnswer(AnswerWriter):
    """`tools` are the names of functions that may be called."""

    prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")

    def __init__(
        self, model: ServedModel, call: RequestRecord, *, logprobs: bool, include_usage: bool, tools: Sequence[str]
    ) -> None:
        super().__init__(model, call, logprobs=logprobs, include_usage=include_usage)
        self._tools = tools
        self._readers: dict[int, ToolReader] = {}

    def opening(self, choices: int) -> bytes:
        """The first event of every choice."""
        begun = {"role": "assistant", "content": ""}
        return b"".join(self.event(self._delta(index, begun)) for index in range(choices))

    def chunk(self, index: int, piece: Piece) -> bytes:
        """What a piece adds to the stream."""
        text, calls = self._read(index, piece.text, last=piece.finish is not None)
        found = []
        if text or (self.logprobs and piece.tokens):
            found.append(self._delta(index, {"content": text}, self._logprobs_json(piece.tokens)))
        if calls:
            found.append(self._delta(index, {"tool_calls": _calls_json(calls, numbered=True)}))
        if piece.finish is not None:
            found.append(self._delta(index, {}, reason="tool_calls" if calls else piece.finish))
        return self.events(found, piece) if found else b""

    def whole(self, run: Generation, pieces: Sequence[tuple[int, Piece]]) -> bytes:
        """The answer in one. ApiError when a completion failed."""
        texts = [""] * len(run.requests)
        tokens: list[list[TokenChoice]] = [[] for _ in texts]
        for index, piece in pieces:
            if piece.finish is not None and (failure := failure_of(piece)) is not None:
                raise failure
            texts[index] += piece.text
            tokens[index] += piece.tokens
        return self.document([self._choice(index, text, tokens[index], run) for index, text in enumerate(texts)])

    def _read(self, index: int, text: str, *, last: bool) -> tuple[str, list[Called]]:
        """(text that is certain to be no call, at the end the calls)."""
        if not self._tools:
            return text, []
        reader = self._readers.setdefault(index, ToolReader(self._tools))
        text = reader.feed(text)
        rest, calls = reader.finish() if last else ("", [])
        return text + rest, calls

    def _delta(self, index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> Any:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _choice(self, index: int, text: str, tokens: Sequence[TokenChoice], run: Generation) -> dict[str, Any]:
        text, calls = self._read(index, text, last=True)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": _calls_json(calls, numbered=False)}
        last = run.last[index]
        assert last is not None, "every completion has ended"
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs_json(tokens),
            "finish_reason": "tool_calls" if calls else last.finish,
        }

    def _logprobs_json(self, tokens: Sequence[TokenChoice]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        rows = []
        for choice in tokens:
            rivals = [_token_json(self.text.token_bytes(token), logprob) for token, logprob in choice.top]
            rows.append({**_token_json(choice.text, choice.logprob), "top_logprobs": rivals})
        return {"content": rows}


def _token_json(text: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": text.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(text)}


def _calls_json(calls: Sequence[Called], *, numbered: bool) -> list[dict[str, Any]]:
    rows = []
    for number, call in enumerate(calls):
        row = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        function = {"name": call.name, "arguments": call.arguments}
        rows.append({"index": number, **row, "function": function} if numbered else {**row, "function": function})
    return rows
