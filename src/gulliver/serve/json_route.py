"""Bodies are read by orjson, which is strict: no lone surrogates, no NaN, no bottomless nesting."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from gulliver.serve.errors import ErrorAnswer

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "Invalid request; `param` names the field"},
    401: {"model": ErrorAnswer, "description": "The key is missing or wrong"},
    404: {"model": ErrorAnswer, "description": "Model not found"},
    408: {"model": ErrorAnswer, "description": "The body did not arrive in time"},
    413: {"model": ErrorAnswer, "description": "The body is too long"},
    429: {"model": ErrorAnswer, "description": "Rate limit or queue length reached; `retry-after` says when to retry"},
    500: {"model": ErrorAnswer, "description": "The server failed"},
    503: {"model": ErrorAnswer, "description": "The server is shutting down"},
    504: {"model": ErrorAnswer, "description": "The request timed out"},
    "default": {"model": ErrorAnswer, "description": "Any other error"},
}


class JsonRequest(Request):
    """A request whose JSON is read by orjson."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = orjson.loads(await self.body())
        return self._json


class JsonRoute(APIRoute):
    """A route with such requests."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return read


def answers_with(model: type[BaseModel], *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route, for the OpenAPI document."""
    good: dict[str, Any] = {"model": model, "description": "The answer"}
    if streams:
        good["description"] = "The answer; server-sent events when `stream` is true, ended by `data: [DONE]`"
        good["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    return {200: good, **ERRORS}
