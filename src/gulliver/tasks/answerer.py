"""A model that is open and answers: what `gulliver ask`, `gulliver.ask`, the server and its console call.

A family's answerer says what it can do (`can`), what a request and a response look like (two pydantic models), and
answers. Who routes requests asks `can`, never which family it is. Nothing here or in a family's answerer file imports
torch before a model that needs it is opened, because a packed language model answers without it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from gulliver.core.errors import ConfigError
from gulliver.core.names import named
from gulliver.runtime.batching.records import EngineLost, Request

if TYPE_CHECKING:
    from pydantic import BaseModel

    from gulliver.runtime.batching.engine import Engine
    from gulliver.runtime.batching.queue import BatchQueue
    from gulliver.runtime.sampling import Sampling

TEMPERATURE = 0.7
MAX_TOKENS = 512
"""The defaults of answers that are text."""

ALIVE_SECONDS = 1.0
"""How often those that wait for an answer look whether the model's thread lives."""

Prompt = str | Sequence[Mapping[str, Any]]
"""Text, or messages with a role and content each."""

Can = Literal["generate", "embed", "predict"]
"""What a model can do. "generate": continue text, token by token (an Engine as `engine`, `text` its tokenizer);
"embed": vectors of texts; "predict": everything that is one request and one response. Every answerer can predict."""


@dataclass(frozen=True)
class OpenOptions:
    """How a model is opened, the same for every family; a family refuses what it cannot honour.

    `threads` (None: one per core), `isa` and `backend` ("auto", "native" or "reference") say what runs it;
    `max_ram_bytes` caps the process; `slots` is the most sequences in one step, `cache_tokens` the tokens that a cache
    holds (None: by memory), `queue` the most requests that wait.
    """

    threads: int | None = None
    isa: str = "auto"
    backend: str = "auto"
    max_ram_bytes: int | None = None
    slots: int = 16
    cache_tokens: int | None = None
    queue: int = 256

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is {self.threads}; it must be at least 1")
        if (self.backend, self.isa) != ("auto", "auto"):
            from gulliver.runtime.decode import check_forced  # imports numpy, which not every family needs

            check_forced(self.backend, self.isa)


class Answerer(AbstractContextManager["Answerer"]):
    """One open model. Use it in a `with` block, or close it."""

    can: ClassVar[frozenset[Can]]
    """What it does; "predict" is always among them."""
    request_schema: ClassVar[str]
    response_schema: ClassVar[str]
    """What a request must be and what a response is: pydantic models, "module:class", imported when asked for."""
    engine: Engine | BatchQueue[Any, Any]  # runs its requests; safe to call from any thread
    name: str
    folder: Path
    backend: str  # "native" or "reference"
    why: str  # the reason for that backend
    context: int | None = None  # most tokens of a request; None where there are none

    @property
    def request_model(self) -> type[BaseModel]:
        """What a request must be; the schema of `POST /v1/predict`."""
        return named(self.request_schema)

    @property
    def response_model(self) -> type[BaseModel]:
        """What a response is."""
        return named(self.response_schema)

    @abstractmethod
    def read(self, words: Sequence[str]) -> Any:
        """A request from what a person wrote after `gulliver ask MODEL`: text, numbers, or the paths of files.

        DataError when it cannot be understood, naming what was given and what is taken.
        """

    @abstractmethod
    def submit(self, request: Any, stop: Event | None = None) -> Future[Any]:
        """The future response to a checked request. When `stop` is set the work may end early, by an exception.

        QueueFull when too many wait, EngineClosed at the end, ConfigError or DataError for a request that cannot be
        answered.
        """

    def submit_for(self, owner: str, request: Any, stop: Event | None = None) -> Future[Any]:
        """The same for a server that tells its clients apart: what is kept for one `owner` must serve no other.

        A family that keeps something of its requests fills this in too.
        """
        del owner
        return self.submit(request, stop)

    def answer(self, request: Any) -> Any:
        """The response to a checked request; waits for it."""
        future = self.submit(request)
        while not wait([future], timeout=ALIVE_SECONDS).done:
            if not self.engine.alive and not wait([future], timeout=ALIVE_SECONDS).done:
                raise EngineLost("the model has lost its thread; the answer does not come")
        return future.result()

    @abstractmethod
    def show(self, response: Any) -> list[str]:
        """A response as lines for a person on a terminal."""

    def close(self) -> None:
        """End what runs."""
        self.engine.close()

    def __exit__(self, *error: object) -> None:
        self.close()


class Generating(Answerer):
    """An answerer that continues text token by token: "generate" is among what it can."""

    engine: Engine

    def tokens(self, prompt: Prompt, *, raw: bool = False, system: str | None = None) -> tuple[int, ...]:
        """The tokens of a prompt: through the model's chat template when it has one, as they are when `raw`.

        ConfigError for messages or a system text without a template, and for an empty prompt.
        """
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
        """A request to the engine for an answer of at most `max_tokens`, or what the context leaves when it is less."""
        room = max(1, self.engine.context - len(tokens))
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"max_tokens is {max_tokens}; it must be at least 1")
        wanted = room if max_tokens is None else min(max_tokens, room)
        grammar = None if json_schema is None else self.engine.grammars.json_schema(dict(json_schema))
        return Request(tokens, wanted, sampling, stop=tuple(stop), grammar=grammar)


class Batched(Answerer):
    """An answerer whose model torch holds whole; the `__init__` of a family loads it and sets `engine`."""

    family: ClassVar[str]
    engine: BatchQueue[Any, Any]

    def __init__(self, folder: Path, name: str, options: OpenOptions) -> None:
        """ConfigError for an option that such a model has no use for; ArtifactError when it cannot be read."""
        if options.max_ram_bytes is not None:
            raise ConfigError(f"{self.family} models are held in memory whole; leave out --ram")
        self.why = f"{self.family} models run on the reference backend (torch)"
        if options.backend == "native" or options.isa != "auto":
            raise ConfigError(f"{self.why}; leave out --backend and --isa")
        if options.threads is not None:
            import torch

            torch.set_num_threads(options.threads)
        self.backend, self.folder, self.name = "reference", folder, name


class Embedding(Batched):
    """An answerer that turns texts into vectors: "embed" is among what it can. `width` numbers a vector."""

    width: int

    @abstractmethod
    def tokens(self, row: str | Sequence[int], *, truncate: bool) -> tuple[int, ...]:
        """A text, or tokens, as the model reads it. ConfigError when it is empty, too long, or names no token."""

    def embed(self, rows: Sequence[tuple[int, ...]], stop: Event | None = None) -> Future[list[Any]]:
        """The vectors, float32 [width] each, of tokenized texts. QueueFull when too many wait, EngineClosed at the end.

        When `stop` is set the work ends before the next pass.
        """
        return self.engine.submit_all(rows, stop)


def then(future: Future[Any], change: Callable[[Any], Any]) -> Future[Any]:
    """A future of what `change` makes of another's result; its exceptions are passed on, a cancel is passed back."""
    made: Future[Any] = Future()

    def done(first: Future[Any]) -> None:
        if not made.set_running_or_notify_cancel():
            return
        try:
            made.set_result(change(first.result()))
        except BaseException as error:  # a cancelled future's too: whoever waits must be told
            made.set_exception(error)

    future.add_done_callback(done)
    made.add_done_callback(lambda second: future.cancel() if second.cancelled() else None)
    return made
