"""Answers of /v1/completions as bytes: whole, and in chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import orjson

from gulliver.runtime.batching.records import Piece, TokenChoice
from gulliver.serve.openai.chat_json import DONE, LOWEST
from gulliver.serve.openai.generation import Generation, failure_of
from gulliver.serve.state import RequestRecord, ServedModel, count, usage


class CompletionAnswer:
    """What the answers to one request share. `echoes` holds each choice's prompt as text, where it is repeated."""

    def __init__(
        self,
        model: ServedModel,
        call: RequestRecord,
        *,
        logprobs: bool,
        echoes: Sequence[str],
        per_prompt: int,
        include_usage: bool,
        hide_answer: bool,
    ) -> None:
        self.call = call
        self._text = model.engine.text
        self._logprobs = logprobs
        self._echoes = echoes
        self._per_prompt = per_prompt
        self._include_usage = include_usage
        self._hide_answer = hide_answer
        self._offsets: dict[int, int] = {}
        self._about = {
            "id": f"cmpl-{call.id}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }
        self._shared = orjson.dumps({"object": "text_completion", **self._about})[:-1]
        self._head = b"data: " + self._shared + b',"choices":[{"index":'
        self._end = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self._plain_end = b',"logprobs":null,"finish_reason":null' + self._end

    def count(self, run: Generation) -> None:
        """Write what the run used into the call."""
        count(self.call, run, range(0, len(run.requests), self._per_prompt))

    # ---- in chunks ---------------------------------------------------------------------------------------------------

    def opening(self, choices: int) -> bytes:
        """The prompts, where they are repeated and have no logprobs; those come with the first piece."""
        if not self._echoes or self._logprobs:
            return b""
        return b"".join(self._chunk(index, self._echoes[index]) for index in range(choices) if self._echoes[index])

    def chunk(self, index: int, piece: Piece) -> bytes:
        """What a piece adds to the stream."""
        if piece.finish is None and not self._logprobs:  # the path of nearly every token
            if not piece.text:
                return b""
            return b'%b%d,"text":%b%b' % (self._head, index, orjson.dumps(piece.text), self._plain_end)
        text = "" if self._hide_answer else piece.text
        tokens = () if self._hide_answer else piece.tokens
        if piece.prompt and self._echoes and self._logprobs:
            text, tokens = self._echoes[index] + text, (*piece.prompt, *tokens)
        parts = [self._chunk(index, text, tokens)] if text or (self._logprobs and tokens) else []
        if piece.finish is not None:
            failure = failure_of(piece)
            if failure is not None:
                return b"".join([*parts, b"data: ", failure.body(), b"\n\n"])
            parts.append(self._chunk(index, "", reason=piece.finish))
        return b"".join(parts)

    def closing(self) -> bytes:
        """The last chunks: usage where it was asked for, and the end mark."""
        if not self._include_usage:
            return DONE
        last = self._shared + b',"choices":[],"usage":' + orjson.dumps(usage(self.call)) + b"}"
        return b"data: " + last + b"\n\n" + DONE

    def _chunk(self, index: int, text: str, tokens: Sequence[TokenChoice] = (), reason: str | None = None) -> bytes:
        logprobs = orjson.dumps(self._logprobs_json(index, tokens)) if self._logprobs and tokens else b"null"
        parts = (self._head, b"%d" % index, b',"text":', orjson.dumps(text), b',"logprobs":', logprobs)
        return b"".join((*parts, b',"finish_reason":', orjson.dumps(reason), self._end))

    # ---- whole -------------------------------------------------------------------------------------------------------

    def whole(self, run: Generation, pieces: Sequence[tuple[int, Piece]]) -> bytes:
        """The answer in one. ApiError when a completion failed."""
        texts = [""] * len(run.requests)
        tokens: list[list[TokenChoice]] = [[] for _ in texts]
        if self._echoes:
            texts = list(self._echoes)
        for index, piece in pieces:
            if piece.finish is not None and (failure := failure_of(piece)) is not None:
                raise failure
            if self._echoes:
                tokens[index] += piece.prompt
            if not self._hide_answer:
                texts[index] += piece.text
                tokens[index] += piece.tokens
        choices = [
            {
                "index": index,
                "text": text,
                "logprobs": self._logprobs_json(index, tokens[index]) if self._logprobs else None,
                "finish_reason": last.finish if (last := run.last[index]) is not None else None,
            }
            for index, text in enumerate(texts)
        ]
        return orjson.dumps({"object": "text_completion", **self._about, "choices": choices, "usage": usage(self.call)})

    def _logprobs_json(self, index: int, tokens: Sequence[TokenChoice]) -> dict[str, Any]:
        """The older form of logprobs: lists side by side. `text_offset` counts characters of the choice's text."""
        offset = self._offsets.get(index, 0)
        offsets = []
        for choice in tokens:
            offsets.append(offset)
            offset += sum(byte & 0xC0 != 0x80 for byte in choice.text)
        self._offsets[index] = offset
        return {
            "tokens": [_shown(choice.text) for choice in tokens],
            "token_logprobs": [None if choice.logprob is None else _finite(choice.logprob) for choice in tokens],
            "top_logprobs": [self._top(choice) for choice in tokens],
            "text_offset": offsets,
        }

    def _top(self, choice: TokenChoice) -> dict[str, float] | None:
        """The likeliest tokens, and the one that was taken; two that look alike keep the likelier."""
        if choice.logprob is None:
            return None
        rows = {_shown(choice.text): _finite(choice.logprob)}
        for token, logprob in choice.top:
            shown, value = _shown(self._text.token_bytes(token)), _finite(logprob)
            rows[shown] = max(value, rows.get(shown, LOWEST))
        return rows


def _finite(value: float) -> float:
    return max(float(value), LOWEST)


def _shown(text: bytes) -> str:
    """A token as text; one that is a part of a character as OpenAI writes it: bytes:\\xe2\\x82."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)
