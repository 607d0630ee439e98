"""Answers of /v1/chat/completions as bytes: whole, and in events."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from gulliver.runtime.batching.records import Piece, TokenChoice
from gulliver.serve.openai.request_schemas import ChatRequest
from gulliver.serve.openai.tools import Called, ToolReader, usable
from gulliver.serve.openai.writer import AnswerWriter, finite
from gulliver.serve.state import RequestRecord, ServedModel


class ChatAnswer(AnswerWriter):
    """What a model says, and the functions that it calls."""

    prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")

    def __init__(self, model: ServedModel, call: RequestRecord, body: ChatRequest) -> None:
        super().__init__(model, call, body)
        self._logprobs = bool(body.logprobs)
        self._tools = [tool.function.name for tool in usable(body)]
        self._readers: dict[int, ToolReader] = {}

    def opening(self, choices: int) -> bytes:
        """The first event of every choice."""
        begun = {"role": "assistant", "content": ""}
        return b"".join(self.event(self._delta(index, begun)) for index in range(choices))

    def added(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """The text of a piece, at the end the calls and the end."""
        text, calls = self._read(index, piece.text, last=piece.finish is not None)
        found = []
        if text or (self._logprobs and piece.tokens):
            found.append(self._delta(index, {"content": text}, self._logprobs_json(piece.tokens)))
        if calls:
            rows = [{"index": number, **_call_json(call)} for number, call in enumerate(calls)]
            found.append(self._delta(index, {"tool_calls": rows}))
        if piece.finish is not None:
            found.append(self._delta(index, {}, finish="tool_calls" if calls else piece.finish))
        return found

    def choice(self, index: int, text: str, tokens: Sequence[TokenChoice], finish: str) -> dict[str, Any]:
        """A choice of a whole answer."""
        text, calls = self._read(index, text, last=True)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": list(map(_call_json, calls))}
        row = {"index": index, "message": message, "logprobs": self._logprobs_json(tokens)}
        return {**row, "finish_reason": "tool_calls" if calls else finish}

    def _read(self, index: int, text: str, *, last: bool) -> tuple[str, list[Called]]:
        """(text that is certain to be no call, at the end the calls)."""
        if not self._tools:
            return text, []
        reader = self._readers.setdefault(index, ToolReader(self._tools))
        text = reader.feed(text)
        rest, calls = reader.finish() if last else ("", [])
        return text + rest, calls

    def _delta(self, index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> Any:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs_json(self, tokens: Sequence[TokenChoice]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        rows = []
        for choice in tokens:
            rivals = [_token_json(self.text.token_bytes(token), logprob) for token, logprob in choice.top]
            rows.append({**_token_json(choice.text, choice.logprob), "top_logprobs": rivals})
        return {"content": rows}


def _token_json(text: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": text.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(text)}


def _call_json(call: Called) -> dict[str, Any]:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": call}
