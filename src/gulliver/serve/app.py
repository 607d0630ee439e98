"""The application: the table of routes, the middleware before them, and errors in one shape."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gulliver.core.errors import ConfigError
from gulliver.serve import pages
from gulliver.serve.errors import RESPONSES, ApiError, bad_request, from_validation
from gulliver.serve.inference import predict
from gulliver.serve.keys import KeyRing
from gulliver.serve.metrics import Metrics
from gulliver.serve.middleware import Middleware
from gulliver.serve.openai import embeddings, language
from gulliver.serve.openai.request_schemas import ChatRequest, CompletionRequest, EmbeddingRequest
from gulliver.serve.state import Route, ServedModel, Settings, State

ROUTES = (
    Route("/v1/chat/completions", language.router, can="generate", body=ChatRequest, costs=True),
    Route("/v1/completions", language.router, can="generate", body=CompletionRequest, costs=True),
    Route("/v1/embeddings", embeddings.router, can="embed", body=EmbeddingRequest, costs=True),
    Route("/v1/predict", predict.router, can="predict", body=predict.PredictRequest, costs=True),
    Route("/v1/models", pages.router),
    Route("/v1/models/{id:path}", pages.router),
    Route("/api/models/{id:path}", pages.router),
    Route("/healthz", pages.router, quiet=True),
    Route("/readyz", pages.router, quiet=True),
    Route("/metrics", pages.router, quiet=True),
    Route("/openapi.json", pages.router),
    Route("/", pages.router),
)
"""Everything there is. A new route is a row and its file."""
MESSAGES = {
    HTTPStatus.NOT_FOUND: "unknown path; /openapi.json lists all paths",
    HTTPStatus.METHOD_NOT_ALLOWED: "this path does not support this method",
}


def make_state(models: Sequence[ServedModel], settings: Settings | None = None, keys: KeyRing | None = None) -> State:
    """A server of `models`. ConfigError when there is none, or two have the same name."""
    if not models:
        raise ConfigError("no model to serve; name at least one")
    named = {model.name: model for model in models}
    if len(named) < len(models):
        raise ConfigError("two models have the same name; rename one: NAME=MODEL")
    metrics = Metrics({name: model.answerer.engine for name, model in named.items()})
    return State(named, ROUTES, settings or Settings(), keys, metrics)


def make_app(state: State) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(
        title="Gulliver",
        description="Models of Gulliver behind OpenAI's API and /v1/predict",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # the address would be made of the host that the client names
    )
    app.add_middleware(Middleware, state=state)
    app.add_exception_handler(HTTPException, _http_error)
    for router in dict.fromkeys(route.router for route in state.routes):
        app.include_router(router(state), responses=RESPONSES)
    app.add_exception_handler(RequestValidationError, partial(_invalid, state))
    return app


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    """Errors of the API, and what the framework refuses in the same shape."""
    del request
    if isinstance(error, ApiError):
        return error.response()
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    message = MESSAGES.get(status, str(error.detail))
    return ApiError(status, message, code=status.name.lower()).response(error.headers)


async def _invalid(state: State, request: HttpRequest, error: Exception) -> Response:
    """A body that the schema refuses."""
    assert isinstance(error, RequestValidationError)
    problems: Any = error.errors()
    route = state.route(request.url.path)
    fields = route.body.model_fields if route is not None and route.body is not None else None
    untyped = problems[0]["type"] in ("model_attributes_type", "model_type", "dict_type")
    if untyped and "json" not in request.headers.get("content-type", ""):
        message = "send a JSON object, with 'content-type: application/json'"
        return bad_request(message, code="invalid_content_type").response()
    return from_validation(problems, fields).response()
