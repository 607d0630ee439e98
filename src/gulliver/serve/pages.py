"""Outside the inference API: the chat page, models and their cards, health and metrics."""

from __future__ import annotations

import hashlib
from http import HTTPStatus
from os import PathLike, stat_result
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter
from prometheus_client import generate_latest
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from gulliver.core.errors import ArtifactError
from gulliver.core.store.manifest import EVIDENCE, read_json
from gulliver.serve import metrics
from gulliver.serve.state import ServedModel, State

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "font-src 'self'; connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",  # kept, but asked for again by its tag: a new server never meets an old page
}
MAX_ANNOTATION_BYTES = 4 * 2**20


class ModelEntry(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "gulliver"


class ModelList(BaseModel):
    """The answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class ModelCard(BaseModel):
    """The answer of /api/models/{id}: what a model is, runs on, and can; JSON schemas of its /v1/predict."""

    id: str
    artifact_id: str | None
    can: list[str]
    size_bytes: int
    backend: str
    why: str
    context: int | None
    card: str | None
    evidence: list[dict[str, Any]]
    request: dict[str, Any]
    response: dict[str, Any]


class Health(BaseModel):
    """The answer of /healthz and /readyz."""

    status: Literal["ok", "draining", "failed"]


class PageFiles(StaticFiles):
    """The files of the chat page, a folder of the package.

    A file's tag comes from its content: what unpacks a package or an image may give all files one time, and then two
    versions of equal length would share starlette's own tag, which is time and length.
    """

    def file_response(
        self, full_path: str | PathLike[str], stat_result: stat_result, scope: Scope, status_code: int = HTTPStatus.OK
    ) -> Response:
        path = Path(full_path)
        headers = {**PAGE_HEADERS, "etag": f'"{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}"'}
        response = FileResponse(path, status_code, headers, TYPES.get(path.suffix), stat_result=stat_result)
        if self.is_not_modified(response.headers, Headers(scope=scope)):
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        return response


def router(state: State) -> APIRouter:
    """Models, cards, health and metrics; the page and the files beside it."""
    routes = APIRouter()

    @routes.get("/v1/models", operation_id="list_models", tags=["models"])
    async def list_models() -> ModelList:
        """Every model that is served."""
        return ModelList(data=[_entry(model) for model in state.models.values()])

    @routes.get("/v1/models/{id:path}", operation_id="get_model", tags=["models"])
    async def get_model(id: str) -> ModelEntry:
        """One model."""
        return _entry(state.named(id))

    @routes.get("/api/models/{id:path}", operation_id="get_card", tags=["models"])
    async def get_card(id: str) -> ModelCard:
        """A model's size, what runs it and why, its card and its evidence."""
        return await state.in_thread(_card, state.named(id))

    @routes.get("/healthz", operation_id="health", tags=["server"])
    async def health() -> Health:
        """The process is alive."""
        return Health(status="ok")

    @routes.get("/readyz", operation_id="ready", tags=["server"], responses={503: {"model": Health}})
    async def ready(response: Response) -> Health:
        """The server takes requests; 503 from the moment it is asked to stop, or when a model's thread has died."""
        alive = all(model.engine.alive for model in state.models.values())
        if state.draining or not alive:
            response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
        return Health(status="draining" if state.draining else "ok" if alive else "failed")

    @routes.get("/metrics", operation_id="metrics", tags=["server"], responses={200: {"content": {"text/plain": {}}}})
    async def measures() -> Response:
        """Metrics for Prometheus."""
        state.metrics.active.set(state.active)
        return Response(generate_latest(state.metrics.registry), headers={"content-type": metrics.CONTENT_TYPE})

    files = PageFiles(directory=Path(__file__).parent / "console")

    async def page(request: HttpRequest) -> Response:
        return await files.get_response(request.path_params.get("name", "index.html"), request.scope)

    for path in ("/", "/{name}"):
        routes.add_api_route(path, page, methods=["GET", "HEAD"], include_in_schema=False)
    return routes


def _entry(model: ServedModel) -> ModelEntry:
    return ModelEntry(id=model.name, created=model.created)


def _card(model: ServedModel) -> ModelCard:
    answerer = model.answerer
    return ModelCard(
        id=model.name,
        artifact_id=model.artifact_id,
        can=sorted(answerer.can),
        size_bytes=model.size_bytes,
        backend=answerer.backend,
        why=answerer.why,
        context=answerer.context,
        card=_annotation(answerer.folder / "README.md"),
        evidence=_evidence(answerer.folder / EVIDENCE),
        request=answerer.request_model.model_json_schema(),
        response=answerer.response_model.model_json_schema(),
    )


def _annotation(path: Path) -> str | None:
    """A text beside the model; None when there is none. What is not UTF-8 is shown as such."""
    if path.is_symlink() or not path.is_file():
        return None
    with open(path, "rb") as stream:
        return stream.read(MAX_ANNOTATION_BYTES).decode("utf-8", "replace")


def _evidence(path: Path) -> list[dict[str, Any]]:
    """The rows of evidence.json; none when it is missing or damaged (`gulliver verify` says what is wrong)."""
    try:
        body = read_json((_annotation(path) or "{}").encode(), path.name)
    except ArtifactError:
        return []
    rows = body.get("evidence") if isinstance(body, dict) else None
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
