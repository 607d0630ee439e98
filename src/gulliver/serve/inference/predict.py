"""POST /v1/predict: one request and one response of any model, in the form that its family states."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from threading import Event
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field, ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gulliver.serve.errors import from_validation
from gulliver.serve.inference.future import result_of
from gulliver.serve.json_route import JsonRoute
from gulliver.serve.openai.request_schemas import Body, ModelName, first_unknown
from gulliver.serve.state import RequestRecord, State, record_of
from gulliver.tasks.answerer import Answerer


class PredictRequest(Body):
    """The body of POST /v1/predict."""

    model: ModelName
    input: dict[str, Any] = Field(description="what the model takes: `request` of /api/models/{id} is its JSON schema")


def router(state: State) -> APIRouter:
    """The route, for one server."""
    routes = APIRouter(route_class=JsonRoute, tags=["models"])
    about = "What the model answers: `response` of /api/models/{id} is its JSON schema"

    @routes.post("/v1/predict", operation_id="predict", response_model=dict[str, Any], response_description=about)
    async def predict(body: PredictRequest, request: HttpRequest) -> Response:
        """Ask any model: a picture gives classes with probabilities, texts give vectors, a prompt gives text."""
        model = state.model(body.model, "predict")
        call = record_of(request)
        call.model, call.choices = model.name, 1
        submit = partial(_submitted, model.answerer, body.input, call.owner)
        response = await result_of(submit, request, state, model, call)
        return Response(await state.in_thread(_written, response, call), media_type="application/json")

    return routes


def _submitted(answerer: Answerer, given: dict[str, Any], owner: str, stop: Event) -> Future[Any]:
    """Check a request and hand it over. In a thread: a picture is decoded here, a long text tokenized."""
    try:
        wanted = answerer.request_model
        asked = wanted.model_validate(first_unknown(given, wanted.model_fields))
    except ValidationError as error:
        problems: list[Any] = error.errors(include_url=False, include_input=False)
        problems = [{**problem, "loc": ("input", *problem["loc"])} for problem in problems]
        raise from_validation(problems, answerer.request_model.model_fields) from None
    return answerer.submit_for(owner, asked, stop)


def _written(response: BaseModel, call: RequestRecord) -> bytes:
    """The response as JSON. Tokens that it counts are charged to the caller and logged."""
    counted = {name: value for name, value in response if name in ("prompt_tokens", "completion_tokens")}
    call.prompt_tokens = counted.get("prompt_tokens", 0)
    call.completion_tokens = counted.get("completion_tokens", 0)
    return response.model_dump_json().encode()
