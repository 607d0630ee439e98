"""Answers of /v1/completions as bytes: whole, and in events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gulliver.runtime.batching.records import Piece, TokenChoice
from gulliver.serve.openai.request_schemas import CompletionRequest
from gulliver.serve.openai.writer import LOWEST, AnswerWriter, finite
from gulliver.serve.state import RequestRecord, ServedModel


class CompletionAnswer(AnswerWriter):
    """`echoes` holds each choice's prompt as text; it is shown where the request asks for it."""

    prefix = "cmpl"
    kinds = ("text_completion", "text_completion")

    def __init__(self, model: ServedModel, call: RequestRecord, body: CompletionRequest, echoes: Sequence[str]) -> None:
        super().__init__(model, call, body)
        self._logprobs = body.logprobs is not None
        self._echoes = echoes if body.echo else [""] * len(echoes)
        self._only_prompt = body.max_tokens == 0
        self._offsets = [0] * len(echoes)

    def opening(self, choices: int) -> bytes:
        """The prompts, where they are repeated and have no logprobs; those come with the first piece."""
        echoes = enumerate(self._echoes if not self._logprobs else ())
        return b"".join(self.event(self._row(index, text)) for index, text in echoes if text)

    def part(self, piece: Piece) -> tuple[str, Sequence[TokenChoice]]:
        """(text, tokens) of a piece that are shown; the tokens of a repeated prompt are among them."""
        return ("", piece.prompt) if self._only_prompt else (piece.text, piece.prompt + piece.tokens)

    def added(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """The text of a piece, and its end."""
        text, tokens = self.part(piece)
        if piece.prompt and self._logprobs:
            text = self._echoes[index] + text
        logprobs = self._logprobs_json(index, tokens) if tokens and self._logprobs else None
        found = [self._row(index, text, logprobs)] if text or logprobs else []
        return found if piece.finish is None else [*found, self._row(index, "", finish=piece.finish)]

    def choice(self, index: int, text: str, tokens: Sequence[TokenChoice], finish: str) -> dict[str, Any]:
        """A choice of a whole answer, after its prompt where that is repeated."""
        logprobs = self._logprobs_json(index, tokens) if self._logprobs else None
        return self._row(index, self._echoes[index] + text, logprobs, finish)

    def _row(self, index: int, text: str, logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs_json(self, index: int, tokens: Sequence[TokenChoice]) -> dict[str, Any]:
        """The older form of logprobs: lists side by side. `text_offset` counts characters of the choice's text."""
        offsets = []
        for choice in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += sum(byte & 0xC0 != 0x80 for byte in choice.text)
        return {
            "tokens": [_shown(choice.text) for choice in tokens],
            "token_logprobs": [None if choice.logprob is None else finite(choice.logprob) for choice in tokens],
            "top_logprobs": [self._top(choice) for choice in tokens],
            "text_offset": offsets,
        }

    def _top(self, choice: TokenChoice) -> dict[str, float] | None:
        """The likeliest tokens, and the one that was taken; two that look alike keep the likelier."""
        if choice.logprob is None:
            return None
        rows = {_shown(choice.text): finite(choice.logprob)}
        for token, logprob in choice.top:
            shown, value = _shown(self.text.token_bytes(token)), finite(logprob)
            rows[shown] = max(value, rows.get(shown, LOWEST))
        return rows


def _shown(text: bytes) -> str:
    """A token as text; one that is a part of a character as OpenAI writes it: bytes:\\xe2\\x82."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)
