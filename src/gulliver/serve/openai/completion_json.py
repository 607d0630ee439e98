"""Answers of /v1/completions as bytes: whole, and in events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gulliver.runtime.batching.records import Piece, TokenChoice
from gulliver.serve.openai.generation import Generation, failure_of
from gulliver.serve.openai.writer import LOWEST, AnswerWriter, finite
from gulliver.serve.state import RequestRecord, ServedModel


class CompletionAnswer(AnswerWriter):
    """`echoes` holds each choice's prompt as text, where it is repeated; `hide_answer`: nothing but the prompt is."""

    prefix = "cmpl"
    kinds = ("text_completion", "text_completion")

    def __init__(
        self,
        model: ServedModel,
        call: RequestRecord,
        *,
        logprobs: bool,
        include_usage: bool,
        per_prompt: int,
        echoes: Sequence[str],
        hide_answer: bool,
    ) -> None:
        super().__init__(model, call, logprobs=logprobs, include_usage=include_usage, per_prompt=per_prompt)
        self._echoes = echoes
        self._hide_answer = hide_answer
        self._offsets: dict[int, int] = {}

    def opening(self, choices: int) -> bytes:
        """The prompts, where they are repeated and have no logprobs; those come with the first piece."""
        if not self._echoes or self.logprobs:
            return b""
        echoes = [(index, self._echoes[index]) for index in range(choices)]
        return b"".join(self.event(self._choice(index, text, None)) for index, text in echoes if text)

    def chunk(self, index: int, piece: Piece) -> bytes:
        """What a piece adds to the stream."""
        text = "" if self._hide_answer else piece.text
        tokens = () if self._hide_answer else piece.tokens
        if piece.prompt and self._echoes and self.logprobs:
            text, tokens = self._echoes[index] + text, (*piece.prompt, *tokens)
        found = [self._choice(index, text, None, tokens)] if text or (self.logprobs and tokens) else []
        if piece.finish is not None:
            found.append(self._choice(index, "", piece.finish))
        return self.events(found, piece) if found else b""

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
        return self.document(
            [
                self._choice(index, text, last.finish if last is not None else None, tokens[index], whole=True)
                for index, (text, last) in enumerate(zip(texts, run.last, strict=True))
            ]
        )

    def _choice(
        self, index: int, text: str, reason: str | None, tokens: Sequence[TokenChoice] = (), *, whole: bool = False
    ) -> dict[str, Any]:
        logprobs = self._logprobs_json(index, tokens) if self.logprobs and (tokens or whole) else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

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
