"""Errors as OpenAI's API writes them: {"error": {"message", "type", "param", "code"}}, with the status that fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gulliver.core.errors import ConfigError, DataError, GulliverError
from gulliver.core.names import nearest
from gulliver.runtime.batching.refusals import EngineClosed, EngineLost, GrammarsFull, QueueFull

CLIENT_CLOSED = 499  # the status that is logged when a client went away before its answer
CLOSING = (  # what is left of the body is not read, or the place is needed
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.SERVICE_UNAVAILABLE,
)
KINDS: Mapping[int, str] = {  # OpenAI's `type` of an error by its status
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.GATEWAY_TIMEOUT: "timeout_error",
}


class Problem(BaseModel):
    """What went wrong; `param` is the invalid field. With status 429, `retry-after` says when to retry."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer that is not a success."""

    error: Problem


RESPONSES: dict[int | str, dict[str, Any]] = {  # of every route, for the OpenAPI document
    status: {"model": ErrorAnswer} for status in (400, 401, 403, 404, 408, 413, 429, 431, 500, 503, 504, "default")
}


class ApiError(HTTPException):
    """An error response: `status` is the HTTP status, `param` the invalid field, `retry_after` in seconds.

    `retry-after` is in whole seconds, at least one; where a key is missing the response has a challenge.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        headers = {}
        if retry_after is not None:
            headers["retry-after"] = str(max(1, round(retry_after + 0.5)))
        if status == HTTPStatus.UNAUTHORIZED:
            headers["www-authenticate"] = "Bearer"
        if status in CLOSING:
            headers["connection"] = "close"
        super().__init__(status, message, headers)
        kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.answer = ErrorAnswer(error=Problem(message=message, type=kind, param=param, code=code))

    def body(self) -> bytes:
        """The JSON document."""
        return self.answer.model_dump_json().encode()

    def response(self, extra: Mapping[str, str] | None = None) -> Response:
        """The whole answer."""
        return Response(self.body(), self.status_code, {**(self.headers or {}), **(extra or {})}, "application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400 about one field."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def _path(location: Sequence[Any]) -> list[str]:
    """The way to a field, without the names that pydantic gives to the forms of a union: "str", "list[…]"."""
    forms = ("str", "body")
    return [str(part) for part in location if part not in forms and not set("-[") & set(str(part))]


def from_validation(problems: Any, fields: Mapping[str, Any] | None = None) -> ApiError:
    """A 400 from the first of pydantic's problems. Values that were sent are not repeated: they may be prompt text."""
    first = problems[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return bad_request(f"the body is not valid JSON ({str(reason).split(':')[0]}, at byte {first['loc'][-1]})")
    same = [problem for problem in problems if problem["loc"][:2] == first["loc"][:2]]  # of a union, the nearest form
    first = max(same, key=lambda problem: len(_path(problem["loc"])))
    where = _path(first["loc"])
    param = ".".join(where) or None
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])[:64]
        near = nearest(name, fields or ())
        hint = f"; did you mean {near!r}?" if near else "; docs/serving.md lists the known fields"
        return bad_request(f"unknown field {name!r}{hint}", (param or name)[:128], "unknown_field")
    if first["type"] == "missing":
        return bad_request(f"missing field {param or 'body'!r}", param, "missing_field")
    return bad_request(f"{param or 'the body'}: {first['msg']}"[:400], param[:128] if param else None, "invalid_value")


def refused(error: GulliverError, param: str | None = None) -> ApiError:
    """The answer for what a model raises when it does not take a request, or cannot answer it."""
    if isinstance(error, QueueFull):
        code = "grammars_full" if isinstance(error, GrammarsFull) else "queue_full"
        wait = error.retry_after_seconds
        return ApiError(HTTPStatus.TOO_MANY_REQUESTS, str(error), code=code, retry_after=wait)
    if isinstance(error, EngineLost):
        return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(error), code="engine_lost", retry_after=5)
    if isinstance(error, EngineClosed):
        return draining()
    if isinstance(error, ConfigError | DataError):
        return bad_request(str(error), param)
    return engine_failed(str(error))


def gone() -> ApiError:
    """The answer to a client that disconnected, for the log."""
    return ApiError(CLIENT_CLOSED, "the client disconnected")


def draining() -> ApiError:
    """The answer while the server shuts down."""
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down", code="shutting_down", retry_after=5)


def crowded() -> ApiError:
    """The answer when there are more connections than the server takes."""
    message = "the server has too many connections; retry later"
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, message, code="too_many_connections", retry_after=1)


def timed_out() -> ApiError:
    """The answer to a request that took longer than the server allows."""
    return ApiError(HTTPStatus.GATEWAY_TIMEOUT, "the request timed out", code="timeout")


def engine_failed(reason: str) -> ApiError:
    """The answer for a request that failed in the engine, through no fault of its body."""
    message = f"the engine failed on this request: {reason[:300]}" if reason else "the engine failed on this request"
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, message, code="engine_failed")
