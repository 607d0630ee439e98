"""Answers of /v1/chat/completions as bytes: whole, and in chunks. A chunk is glued from parts that are made once."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import orjson

from gulliver.runtime.batching.records import Piece, TokenChoice
from gulliver.serve.openai.generation import Generation, failure_of
from gulliver.serve.openai.tools import Called, ToolReader
from gulliver.serve.state import RequestRecord, ServedModel, count, usage

DONE = b"data: [DONE]\n\n"
LOWEST = -9999.0
"""What a probability of zero is written as: JSON has no infinity."""


class ChatAnswer:
    """What the answers to one request share. `tools` are the names of functions that may be called."""

    def __init__(
        self, model: ServedModel, call: RequestRecord, *, logprobs: bool, tools: Sequence[str], include_usage: bool
    ) -> None:
        self.call = call
        self._text = model.engine.text
        self._logprobs = logprobs
        self._tools = tools
        self._include_usage = include_usage
        self._readers: dict[int, ToolReader] = {}
        self._about = {
            "id": f"chatcmpl-{call.id}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }
        shared = orjson.dumps({"object": "chat.completion.chunk", **self._about})[:-1]
        self._head = b"data: " + shared + b',"choices":[{"index":'
        self._content = b',"delta":{"content":'
        self._end = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self._plain_end = b'},"logprobs":null,"finish_reason":null' + self._end

    def count(self, run: Generation) -> None:
        """Write what the run used into the call."""
        count(self.call, run, [0])

    # ---- in chunks ---------------------------------------------------------------------------------------------------

    def opening(self, choices: int) -> bytes:
        """The first chunk of every choice."""
        return b"".join(self._delta(index, b'"role":"assistant","content":""') for index in range(choices))

    def chunk(self, index: int, piece: Piece) -> bytes:
        """What a piece adds to the stream."""
        if piece.finish is None and not self._tools and not self._logprobs:  # the path of nearly every token
            if not piece.text:
                return b""
            return b"%b%d%b%b%b" % (self._head, index, self._content, orjson.dumps(piece.text), self._plain_end)
        return self._careful(index, piece)

    def _careful(self, index: int, piece: Piece) -> bytes:
        text = self._reader(index).feed(piece.text) if self._tools else piece.text
        calls: list[Called] = []
        if piece.finish is not None and self._tools:
            rest, calls = self._reader(index).finish()
            text += rest
        parts = []
        if text or (self._logprobs and piece.tokens):
            logprobs = self._logprobs_json(piece.tokens)
            parts.append(self._delta(index, b'"content":' + orjson.dumps(text), logprobs))
        if calls:
            parts.append(self._delta(index, b'"tool_calls":' + orjson.dumps(_calls_json(calls, numbered=True))))
        if piece.finish is not None:
            failure = failure_of(piece)
            if failure is not None:
                return b"".join([*parts, b"data: ", failure.body(), b"\n\n"])
            reason = b'"tool_calls"' if calls else orjson.dumps(piece.finish)
            parts.append(self._delta(index, b"", reason=reason))
        return b"".join(parts)

    def closing(self) -> bytes:
        """The last chunks: usage where it was asked for, and the end mark."""
        if not self._include_usage:
            return DONE
        last = {"object": "chat.completion.chunk", **self._about, "choices": [], "usage": usage(self.call)}
        return b"data: " + orjson.dumps(last) + b"\n\n" + DONE

    def _delta(self, index: int, delta: bytes, logprobs: bytes = b"null", reason: bytes = b"null") -> bytes:
        parts = (self._head, b"%d" % index, b',"delta":{', delta, b'},"logprobs":', logprobs)
        return b"".join((*parts, b',"finish_reason":', reason, self._end))

    def _reader(self, index: int) -> ToolReader:
        if index not in self._readers:
            self._readers[index] = ToolReader(self._tools)
        return self._readers[index]

    # ---- whole -------------------------------------------------------------------------------------------------------

    def whole(self, run: Generation, pieces: Sequence[tuple[int, Piece]]) -> bytes:
        """The answer in one. ApiError when a completion failed."""
        texts = [""] * len(run.requests)
        tokens: list[list[TokenChoice]] = [[] for _ in texts]
        for index, piece in pieces:
            if piece.finish is not None and (failure := failure_of(piece)) is not None:
                raise failure
            texts[index] += piece.text
            tokens[index] += piece.tokens
        choices = [self._choice(index, text, tokens[index], run) for index, text in enumerate(texts)]
        body = {"object": "chat.completion", **self._about, "choices": choices, "usage": usage(self.call)}
        return orjson.dumps(body)

    def _choice(self, index: int, text: str, tokens: Sequence[TokenChoice], run: Generation) -> dict[str, Any]:
        calls: list[Called] = []
        if self._tools:
            reader = ToolReader(self._tools)
            content = reader.feed(text)
            rest, calls = reader.finish()
            text = content + rest
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": _calls_json(calls, numbered=False)}
        last = run.last[index]
        assert last is not None, "every completion has ended"
        return {
            "index": index,
            "message": message,
            "logprobs": orjson.Fragment(self._logprobs_json(tokens)),
            "finish_reason": "tool_calls" if calls else last.finish,
        }

    def _logprobs_json(self, tokens: Sequence[TokenChoice]) -> bytes:
        if not self._logprobs:
            return b"null"
        rows = []
        for choice in tokens:
            rivals = [_token_json(self._text.token_bytes(token), logprob) for token, logprob in choice.top]
            rows.append({**_token_json(choice.text, choice.logprob), "top_logprobs": rivals})
        return orjson.dumps({"content": rows})


def _token_json(text: bytes, logprob: float | None) -> dict[str, Any]:
    value = LOWEST if logprob is None else max(float(logprob), LOWEST)
    return {"token": text.decode("utf-8", "replace"), "logprob": value, "bytes": list(text)}


def _calls_json(calls: Sequence[Called], *, numbered: bool) -> list[dict[str, Any]]:
    rows = []
    for number, call in enumerate(calls):
        row = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        function = {"name": call.name, "arguments": call.arguments}
        rows.append({"index": number, **row, "function": function} if numbered else {**row, "function": function})
    return rows
