"""What the parts of a server share: settings, models, routes, and the record of each request."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request as HttpRequest

from gulliver.core.errors import GulliverError
from gulliver.serve.errors import ApiError, refused, timed_out
from gulliver.serve.keys import Caller, KeyRing
from gulliver.serve.metrics import Metrics
from gulliver.serve.threads import Threads

if TYPE_CHECKING:
    from fastapi import APIRouter
    from pydantic import BaseModel

    from gulliver.tasks.answerer import Answerer, Can

CALL = "gulliver.call"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """Limits of one server. Sizes in bytes, times in seconds."""

    max_body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0  # to receive a body
    timeout_seconds: float = 600.0  # a request's whole life, waiting included
    grace_seconds: float = 30.0  # for running answers, when the server is asked to stop
    max_head_bytes: int = 32 * 2**10  # the line of the request and its headers
    max_headers: int = 100
    head_seconds: float = 10.0  # to receive a head
    max_half_open: int = 64  # connections of one address whose head is not whole
    max_connections: int = 4096
    write_seconds: float = 60.0  # for a client to read anything of what waits for it
    host: str = "127.0.0.1"  # the address that is listened on, as it was given
    allowed_hosts: tuple[str, ...] = ()  # names that a server without keys answers to, beside its own


@dataclass(frozen=True)
class ServedModel:
    """A model under the name that clients use."""

    name: str
    answerer: Answerer
    artifact_id: str | None
    size_bytes: int
    created: int = field(default_factory=lambda: int(time.time()))
    threads: Threads = field(default_factory=Threads, repr=False, compare=False)  # for reading its requests
    compilers: Threads = field(default_factory=lambda: Threads(1), repr=False, compare=False)  # for their grammars

    @property
    def engine(self) -> Any:
        """What runs its requests: an Engine where the model can generate, else its family's queue."""
        return self.answerer.engine


@dataclass(frozen=True)
class Route:
    """A row of the table of routes (ROUTES in app.py).

    `path`: as FastAPI writes it; "{" begins what clients choose. `router`: makes the routes of the row's file, once for
    all its rows. `can`: what a model must be able to do to be asked here. `body`: what is sent. `costs`: limited by
    rate, refused while the server shuts down, and waited for then. `quiet`: asked every few seconds; logged only when
    it fails.
    """

    path: str
    router: Callable[[State], APIRouter]
    can: Can | None = None
    body: type[BaseModel] | None = None
    costs: bool = False
    quiet: bool = False

    def matches(self, path: str) -> bool:
        """Whether it answers a request's path."""
        start, brace, _ = self.path.partition("{")
        return path.startswith(start) if brace else path == start


@dataclass
class RequestRecord:
    """One HTTP request under way, filled in by its route; logged and charged at the end."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    arrived: float = field(default_factory=time.monotonic)
    caller: Caller | None = None
    model: str = ""
    status: int = 0
    body_bytes: int = 0  # received
    choices: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token: float | None = None
    finish: str = ""

    @property
    def owner(self) -> str:
        """Whose request it is: nothing that one key asks is found by another. "" where there are no keys."""
        return self.caller.key.sha256 if self.caller is not None else ""


@dataclass
class State:
    """One server."""

    models: Mapping[str, ServedModel]
    routes: Sequence[Route]
    settings: Settings
    keys: KeyRing | None
    metrics: Metrics
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "gulliver-prepare"))
    draining: bool = False
    active: int = 0
    connections: int = 0
    crowded: bool = False  # more connections than the most; only health is still told

    def route(self, path: str) -> Route | None:
        """The row of the table for a request's path."""
        return next((route for route in self.routes if route.matches(path)), None)

    def named(self, name: str) -> ServedModel:
        """The model of that name. ApiError 404 for an unknown name."""
        found = self.models.get(name)
        if found is None:
            message = f"model {name[:128]!r} is not served here; choose one of: {', '.join(self.models)}"
            raise ApiError(HTTPStatus.NOT_FOUND, message, param="model", code="model_not_found")
        return found

    def model(self, name: str, can: Can) -> ServedModel:
        """The model of that name. ApiError 404 for an unknown name, 400 when the model cannot do that."""
        found = self.named(name)
        does = found.answerer.can
        if can not in does:
            paths = " or ".join(route.path for route in self.routes if route.can in does)
            message = f"model {name!r} cannot {can}; it can {' and '.join(sorted(does))}: send requests to {paths}"
            raise ApiError(HTTPStatus.BAD_REQUEST, message, param="model", code="wrong_model")
        return found

    async def in_thread(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run slow work in a thread, past the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

    def left(self, call: RequestRecord) -> float:
        """Seconds until a request's time is over."""
        return max(0.0, call.arrived + self.settings.timeout_seconds - time.monotonic())

    async def prepared(
        self, call: RequestRecord, threads: Threads, work: Callable[..., Result], *arguments: Any
    ) -> Result:
        """Run `work`, which reads a request to a model, in threads of that model.

        ApiError 504 at the time limit, 429 when too many wait for a thread.
        """
        try:
            async with asyncio.timeout(self.left(call)):
                return await asyncio.wrap_future(threads.submit(work, *arguments))
        except TimeoutError:
            raise timed_out() from None
        except GulliverError as error:
            raise refused(error) from None


def record_of(request: HttpRequest) -> RequestRecord:
    """The record of an HTTP request, put there by middleware.py."""
    return request.scope[CALL]
