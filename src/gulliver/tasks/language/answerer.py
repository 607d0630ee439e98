"""An open language model: a prompt -> text, through the batching engine. Imports neither torch nor pydantic."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, ClassVar

from gulliver.core.errors import GulliverError
from gulliver.runtime.batching.engine import Engine, load_engine
from gulliver.runtime.batching.records import EngineClosed, Piece, Request, check_finish
from gulliver.runtime.sampling import Sampling
from gulliver.tasks.answerer import Can, Generating, OpenOptions, Prompt

if TYPE_CHECKING:
    from gulliver.tasks.language.requests import TextRequest

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


class LanguageAnswerer(Generating):
    """`engine` streams too: `gulliver generate`, `gulliver chat` and OpenAI's routes talk to it."""

    can: ClassVar[frozenset[Can]] = frozenset({"generate", "predict"})
    request_schema: ClassVar[str] = "gulliver.tasks.language.requests:TextRequest"
    response_schema: ClassVar[str] = "gulliver.tasks.language.requests:TextResponse"

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder, self.name = engine, folder, engine.name
        self.backend, self.why, self.context = engine.decoder.backend, engine.decoder.why, engine.context

    def read(self, words: Sequence[str]) -> Any:
        """All words together are the prompt."""
        return self.request_model(prompt=" ".join(words))

    def submit(self, request: TextRequest, stop: Event | None = None) -> Future[Any]:
        return self.submit_for("", request, stop)

    def submit_for(self, owner: str, request: TextRequest, stop: Event | None = None) -> Future[Any]:
        prompt: Prompt = request.prompt if request.prompt is not None else request.messages or ""
        sampling = Sampling(**{name: getattr(request, name) for name in SAMPLING})
        asked = self.request(
            self.tokens(prompt, raw=request.raw, system=request.system),
            sampling=sampling,
            max_tokens=request.max_tokens,
            stop=request.stop,
        )
        return _collected(self.engine, replace(asked, owner=owner), self.response_model, stop)

    def show(self, response: Any) -> list[str]:
        """The text."""
        return [response.text]


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
            text = "".join(part.text for part in pieces)
            counts = {"prompt_tokens": piece.prompt_tokens, "completion_tokens": piece.completion_tokens}
            future.set_result(response(text=text, finish_reason=piece.finish, **counts))
        except GulliverError as error:
            future.set_exception(error)

    ticket.append(engine.submit(request, deliver))
    future.add_done_callback(lambda done: ticket[0].cancel() if done.cancelled() else None)
    return future


def open_answerer(folder: Path, name: str, options: OpenOptions) -> LanguageAnswerer:
    """The language model in `folder`, on the fastest backend that runs it."""
    return LanguageAnswerer(load_engine(folder, name=name, **vars(options)), folder)
