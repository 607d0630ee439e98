"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive

from gulliver.core.errors import ConfigError, GulliverError
from gulliver.runtime.batching.records import Piece
from gulliver.serve.errors import ApiError, bad_request
from gulliver.serve.json_route import JsonRoute, answers_with
from gulliver.serve.openai import response_schemas
from gulliver.serve.openai.events import CLIENT_CLOSED
from gulliver.serve.openai.generation import failure_of, refused
from gulliver.serve.openai.request_schemas import EmbeddingRequest
from gulliver.serve.state import ServedModel, State, record_of


def router(state: State) -> APIRouter:
    """The route, for one server."""
    routes = APIRouter(route_class=JsonRoute)

    @routes.post(
        "/v1/embeddings",
        operation_id="create_embeddings",
        tags=["language"],
        responses=answers_with(response_schemas.EmbeddingList),
    )
    async def create(body: EmbeddingRequest, request: HttpRequest) -> Response:
        """A vector for every text."""
        model = state.model(body.model, "embeddings")
        call = record_of(request)
        call.model = model.name
        if body.dimensions not in (None, model.answerer.width):
            width = model.answerer.width
            raise bad_request(f"this model's vectors have {width} dimensions, no other number", "dimensions")
        texts = await state.in_thread(_tokens, body, model)
        call.choices = len(texts)
        stop = threading.Event()
        watch = asyncio.ensure_future(_watch(request.receive, stop))
        try:
            async with asyncio.timeout(state.settings.timeout_seconds):
                vectors = await asyncio.wrap_future(model.answerer.embed(texts, stop))
        except GulliverError as error:
            if not stop.is_set():
                raise refused(error) from None
            call.finish = "gone"
            return Response(status_code=CLIENT_CLOSED)
        except TimeoutError:
            problem = failure_of(Piece("", finish="timeout"))
            raise problem or ApiError(504, "") from None
        finally:
            stop.set()
            watch.cancel()
        call.prompt_tokens = sum(map(len, texts))
        call.finish = "stop"
        return Response(_body(vectors, body, model, call.prompt_tokens), media_type="application/json")

    return routes


async def _watch(receive: Receive, stop: threading.Event) -> None:
    """Say when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    stop.set()


def _tokens(body: EmbeddingRequest, model: ServedModel) -> list[tuple[int, ...]]:
    given: Any = body.input
    one = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], int))
    rows: Sequence[Any] = [given] if one else given
    if not rows:
        raise bad_request("input is an empty list; give at least one text", "input")
    try:
        return [model.answerer.tokens(row, truncate=bool(body.truncate)) for row in rows]
    except ConfigError as error:
        raise bad_request(str(error), "input") from None


def _body(vectors: Sequence[NDArray[np.float32]], body: EmbeddingRequest, model: ServedModel, tokens: int) -> bytes:
    def shown(vector: NDArray[np.float32]) -> Any:
        if body.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return vector

    data = [{"object": "embedding", "index": index, "embedding": shown(row)} for index, row in enumerate(vectors)]
    answer = {"object": "list", "data": data, "model": model.name}
    answer["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
