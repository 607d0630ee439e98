"""An open language model: a prompt -> text, through the batching engine. Imports neither torch nor pydantic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, ClassVar

from gulliver.core.errors import ConfigError, GulliverError
from gulliver.runtime.batching.engine import Engine, load_engine
from gulliver.runtime.batching.records import EngineClosed, Piece, Request, check_finish
from gulliver.runtime.sampling import Sampling
from gulliver.tasks.answerer import MAX_TOKENS, Can, Generating, OpenOptions, Prompt

if TYPE_CHECKING:
    from gulliver.tasks.language.requests import TextRequest

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


class LanguageAnswerer(Generating):
    """`engine` streams too: `gulliver generate`, `gulliver chat` and OpenAI's routes talk to it."""

    can: ClassVar[frozenset[Can]] = frozenset({"generate", "predict"})
    engine: Engine

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder, self.name = engine, folder, engine.name
        self.backend, self.why, self.context = engine.decoder.backend, engine.decoder.why, engine.context

    @property
    def request_model(self) -> type[Any]:
        from gulliver.tasks.language.requests import TextRequest

        return TextRequest

    @property
    def response_model(self) -> type[Any]:
        from gulliver.tasks.language.requests import TextResponse

        return TextResponse

    def read(self, words: Sequence[str]) -> TextRequest:
        """All words together are the prompt."""
        return self.request_model(prompt=" ".join(words))

    def submit(self, request: TextRequest, stop: Event | None = None) -> Future[Any]:
        prompt: Prompt = request.prompt if request.prompt is not None else request.messages or ""
        sampling = Sampling(**{name: getattr(request, name) for name in SAMPLING})
        asked = self.request(
            self.tokens(prompt, raw=request.raw, system=request.system),
            sampling=sampling,
            max_tokens=request.max_tokens,
            stop=request.stop,
        )
        return _collected(self.engine, asked, self.response_model, stop)

    def show(self, response: Any) -> list[str]:
        """The text."""
        return [response.text]

    # ---- requests to the engine ---------------------------------------------------------------------------------
    def tokens(self, prompt: Prompt, *, raw: bool = False, system: str | None = None) -> tuple[int, ...]:
        text = self.engine.text
        if isinstance(prompt, str) and (raw or not text.has_chat_template):
            if system is not None:
                why = "the prompt is to be taken raw" if raw else f"{self.folder} has no chat template"
                raise ConfigError(f"a system text needs a chat template, and {why}; put it into the prompt")
            found = text.encode(prompt)
        else:
            if raw:
                raise ConfigError("messages are written by the chat template, so they cannot be taken raw; give text")
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            if system is not None:
                messages = [{"role": "system", "content": system}, *messages]
            found = text.encode_chat(messages)
        if not found:
            raise ConfigError("the prompt is empty; give at least one word")
        return tuple(found)

    def request(
        self,
        tokens: tuple[int, ...],
        *,
        sampling: Sampling,
        max_tokens: int | None = MAX_TOKENS,
        stop: Sequence[str] = (),
        json_schema: Mapping[str, Any] | None = None,
    ) -> Request:
        room = max(1, self.engine.context - len(tokens))
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"max_tokens is {max_tokens}; it must be at least 1")
        wanted = room if max_tokens is None else min(max_tokens, room)
        grammar = None if json_schema is None else self.engine.grammars.json_schema(dict(json_schema))
        return Request(tokens, wanted, sampling, stop=tuple(stop), grammar=grammar)


def _collected(engine: Engine, request: Request, response: type[Any], stop: Event | None) -> Future[Any]:
    """The whole answer to one request. A cancel of the future ends it; once `stop` is set, the next piece does."""
    pieces: list[Piece] = []
    future: Future[Any] = Future()
    ticket: list[Any] = []

    def deliver(piece: Piece) -> None:
        pieces.append(piece)
        if piece.finish is None:
            if stop is not None and stop.is_set() and ticket:
                ticket[0].cancel()
            return
        if not future.set_running_or_notify_cancel():
            return
        try:
            check_finish(piece.finish)
            if piece.finish == "cancelled":
                raise EngineClosed(f"the request to {engine.name} was stopped")
            future.set_result(
                response(
                    text="".join(part.text for part in pieces),
                    finish_reason=piece.finish,
                    prompt_tokens=piece.prompt_tokens,
                    completion_tokens=piece.completion_tokens,
                )
            )
        except GulliverError as error:
            future.set_exception(error)

    ticket.append(engine.submit(request, deliver))
    future.add_done_callback(lambda done: ticket[0].cancel() if done.cancelled() else None)
    return future


def open_answerer(folder: Path, name: str, options: OpenOptions) -> LanguageAnswerer:
    """The language model in `folder`, on the fastest backend that runs it."""
    engine = load_engine(
        folder,
        name=name,
        threads=options.threads,
        cache_tokens=options.cache_tokens,
        slots=options.slots,
        queue=options.queue,
        backend=options.backend,
        isa=options.isa,
        max_ram_bytes=options.max_ram_bytes,
    )
    return LanguageAnswerer(engine, folder)
