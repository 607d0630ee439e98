"""What one server holds: its models, limits, keys and measures, and the record of each HTTP request."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from gulliver.serve.errors import ApiError
from gulliver.serve.keys import Caller, KeyRing
from gulliver.serve.metrics import Metrics
from gulliver.serve.openai.generation import Generation, Mailbox

CALL = "gulliver.call"
INLINE_CHARACTERS = 4096
"""Prompts longer than this are read in a thread, so that others' answers go on meanwhile."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """Limits of one server. Sizes in bytes, times in seconds."""

    max_body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0  # to receive a body
    timeout_seconds: float = 600.0  # a request's whole life, waiting included
    grace_seconds: float = 30.0  # for running answers, when the server is asked to stop


@dataclass(frozen=True)
class ServedModel:
    """A model under the name that clients use. `answerer` is open and answers."""

    name: str
    kind: str  # "chat" or "embeddings"
    answerer: Any
    folder: Path
    artifact_id: str | None
    size_bytes: int
    backend: str  # what runs it
    why: str
    context: int  # tokens
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def engine(self) -> Any:
        """What runs its requests: an Engine or a BatchQueue."""
        return self.answerer.engine

    @property
    def fingerprint(self) -> str:
        """What `system_fingerprint` says: equal for equal weights on an equal backend."""
        return f"{(self.artifact_id or 'unnamed')[:12]}-{self.backend}"


@dataclass
class RequestRecord:
    """One HTTP request under way, filled in by whoever answers it; what is logged and charged at the end."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    arrived: float = field(default_factory=time.monotonic)
    caller: Caller | None = None
    model: str = ""
    status: int = 0
    choices: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token: float | None = None
    finish: str = ""


@dataclass
class State:
    """One server. `mailbox` and `loop` are there while it runs."""

    models: Mapping[str, ServedModel]
    settings: Settings
    keys: KeyRing | None
    metrics: Metrics
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "gulliver-prepare"))
    draining: bool = False
    active: int = 0
    _mailbox: Mailbox | None = None
    _loop: asyncio.AbstractEventLoop | None = None

    def mailbox(self) -> Mailbox:
        """The mailbox of the running event loop."""
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._loop is not loop:
            self._mailbox, self._loop = Mailbox(loop), loop
        return self._mailbox

    def model(self, name: str, kind: str) -> ServedModel:
        """The model of that name. ApiError 404 when there is none, 400 when it does something else."""
        found = self.models.get(name)
        if found is None:
            known = ", ".join(self.models)
            message = f"there is no model {name[:128]!r} here; there are: {known}"
            raise ApiError(HTTPStatus.NOT_FOUND, message, param="model", code="model_not_found")
        if found.kind != kind:
            use = {"chat": "/v1/chat/completions or /v1/completions", "embeddings": "/v1/embeddings"}[found.kind]
            message = f"the model {name!r} does not do this; ask it at {use}"
            raise ApiError(HTTPStatus.BAD_REQUEST, message, param="model", code="wrong_model")
        return found

    async def in_thread(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run slow work beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

    async def prepared(self, size: int, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run `work`: here when `size`, in characters, is small, else in a thread."""
        return work(*arguments) if size <= INLINE_CHARACTERS else await self.in_thread(work, *arguments)


def record_of(request: HttpRequest) -> RequestRecord:
    """The record of an HTTP request, put there by the gate (gate.py)."""
    return request.scope[CALL]


def count(call: RequestRecord, run: Generation, prompts: Sequence[int]) -> None:
    """Write what a run used into its call. `prompts` holds the first choice of each prompt: a prompt counts once."""
    pieces = [piece for piece in run.last if piece is not None]
    firsts = [piece for index in prompts if (piece := run.last[index]) is not None]
    call.choices = len(run.requests)
    call.prompt_tokens = sum(piece.prompt_tokens for piece in firsts)
    call.cached_tokens = sum(piece.cached_tokens for piece in firsts)
    call.completion_tokens = sum(piece.completion_tokens for piece in pieces)
    call.first_token = run.first_token
    reasons = {(piece.finish or "").split(":")[0] for piece in pieces}
    call.finish = "gone" if run.gone else ",".join(sorted(reasons))


def usage(call: RequestRecord) -> dict[str, Any]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": call.prompt_tokens,
        "completion_tokens": call.completion_tokens,
        "total_tokens": call.prompt_tokens + call.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": call.cached_tokens},
    }
