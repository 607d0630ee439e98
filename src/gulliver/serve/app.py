"""The application: routes, the gate before them, and errors in one shape."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gulliver.core.errors import ConfigError
from gulliver.serve import pages
from gulliver.serve.errors import ApiError, from_validation
from gulliver.serve.keys import KeyRing
from gulliver.serve.metrics import Metrics
from gulliver.serve.middleware import Middleware
from gulliver.serve.openai import chat, completions, embeddings
from gulliver.serve.openai.request_schemas import ChatRequest, CompletionRequest, EmbeddingRequest
from gulliver.serve.state import ServedModel, Settings, State

BODIES = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
}
MESSAGES = {
    HTTPStatus.NOT_FOUND: "there is nothing at this path; /openapi.json lists what there is",
    HTTPStatus.METHOD_NOT_ALLOWED: "this path does not take this method",
}


def make_state(models: Sequence[ServedModel], settings: Settings | None = None, keys: KeyRing | None = None) -> State:
    """A server of `models`. ConfigError when there is none, or two have the same name."""
    if not models:
        raise ConfigError("there is no model to serve; name at least one")
    named = {model.name: model for model in models}
    if len(named) < len(models):
        raise ConfigError("two models have the same name; give them others: NAME=MODEL")
    return State(named, settings or Settings(), keys, Metrics({name: model.engine for name, model in named.items()}))


def make_app(state: State) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(
        title="Gulliver",
        description="Models of Gulliver behind OpenAI's API",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # the address would be made of the host that the client names
    )
    app.add_middleware(Middleware, state=state)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    for routes in (
        chat.router(state),
        completions.router(state),
        embeddings.router(state),
        pages.router(state),
        pages.page_router(),
    ):
        app.include_router(routes)
    return app


async def _api_error(request: HttpRequest, error: Exception) -> Response:
    del request
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    """What the framework refuses, in OpenAI's shape."""
    del request
    assert isinstance(error, HTTPException)
    message = MESSAGES.get(HTTPStatus(error.status_code), str(error.detail))
    code = HTTPStatus(error.status_code).name.lower()
    return ApiError(error.status_code, message, code=code).response(error.headers)


async def _invalid(request: HttpRequest, error: Exception) -> Response:
    """A body that the schema refuses."""
    assert isinstance(error, RequestValidationError)
    problems: Any = error.errors()
    body = BODIES.get(request.url.path)
    if problems and problems[0]["type"] in ("model_attributes_type", "model_type", "dict_type"):
        kind = request.headers.get("content-type", "")
        if "json" not in kind:
            message = "send a JSON object, with 'content-type: application/json'"
            return ApiError(HTTPStatus.BAD_REQUEST, message, code="invalid_content_type").response()
    return from_validation(problems, body.model_fields if body else None).response()
