"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import orjson
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gulliver.core.errors import ConfigError
from gulliver.serve.errors import bad_request
from gulliver.serve.inference.future import result_of
from gulliver.serve.json_route import JsonRoute
from gulliver.serve.openai import response_schemas
from gulliver.serve.openai.language import rows_of
from gulliver.serve.openai.request_schemas import EmbeddingRequest
from gulliver.serve.state import ServedModel, State, record_of
from gulliver.tasks.answerer import Embedding


def router(state: State) -> APIRouter:
    """The route, for one server."""
    routes = APIRouter(route_class=JsonRoute, tags=["text"])

    @routes.post("/v1/embeddings", operation_id="create_embeddings", response_model=response_schemas.EmbeddingList)
    async def create(body: EmbeddingRequest, request: HttpRequest) -> Response:
        """A vector for every text."""
        model = state.model(body.model, "embed")
        call = record_of(request)
        call.model = model.name
        answerer = cast(Embedding, model.answerer)
        if body.dimensions not in (None, answerer.width):
            width = answerer.width
            raise bad_request(f"this model's vectors have {width} dimensions; leave out dimensions", "dimensions")
        texts = await state.prepared(call, model.threads, _tokens, body, answerer)
        call.choices = len(texts)
        vectors = await result_of(partial(answerer.embed, texts), request, state, model, call)
        call.prompt_tokens = sum(map(len, texts))
        return Response(_body(vectors, body, model, call.prompt_tokens), media_type="application/json")

    return routes


def _tokens(body: EmbeddingRequest, answerer: Embedding) -> list[tuple[int, ...]]:
    try:
        return [answerer.tokens(row, truncate=bool(body.truncate)) for row in rows_of(body.input, "input")]
    except ConfigError as error:
        raise bad_request(str(error), "input") from None


def _body(vectors: Sequence[NDArray[np.float32]], body: EmbeddingRequest, model: ServedModel, tokens: int) -> bytes:
    shown: Sequence[Any] = vectors
    if body.encoding_format == "base64":
        shown = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(shown)]
    answer = {"object": "list", "data": data, "model": model.name}
    answer["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
