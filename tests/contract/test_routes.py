"""A route is a row and its file: a throw-away one in a copy of the package has all that the others have."""

from __future__ import annotations

from pathlib import Path

from package_copy import copy_package, python

from gulliver.serve.app import ROUTES

FILE = '''
"""POST /v1/count: how many tokens a text has."""

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request

from gulliver.serve.json_route import JsonRoute
from gulliver.serve.state import State, record_of


class CountRequest(BaseModel):
    model: str
    text: str


def router(state: State) -> APIRouter:
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/v1/count")
    async def create(body: CountRequest, request: Request) -> dict[str, int]:
        model = state.model(body.model, "generate")
        call = record_of(request)
        call.model, call.prompt_tokens = model.name, len(model.engine.text.encode(body.text))
        return {"tokens": call.prompt_tokens}

    return routes
'''
IMPORT = "from gulliver.serve.inference import count\n"
ROW = '    Route("/v1/count", count.router, can="generate", body=count.CountRequest, costs=True),\n'
CHECK = """
import sys
from pathlib import Path
from gulliver.runtime.batching.queue import BatchQueue
from gulliver.serve.keys import KeyRing, add_key
from http_samples import FakeEngine, served, serving

path = Path("keys.json")
key = add_key(path, "ann", requests_per_minute=5)
adder = served(BatchQueue("adder", lambda items: items), "adder", can=("predict",))
with serving(FakeEngine(), models=[adder], keys=KeyRing(path, print)) as server, server.client() as client:
    def post(**body):
        return client.post("/v1/count", json=body)

    assert post(model="fake", text="abc").status_code == 401
    client.headers["authorization"] = f"Bearer {key}"
    assert post(model="fake", text="abc").json() == {"tokens": 3}
    missing = post(model="fake")
    assert missing.status_code == 400 and missing.json()["error"]["param"] == "text", missing.text
    wrong = post(model="adder", text="abc")
    assert wrong.json()["error"]["code"] == "wrong_model", wrong.text
    other = client.post("/v1/predict", json={"model": "fake", "input": {}})
    assert other.status_code == 400
    chat = client.post("/v1/chat/completions", json={"model": "adder", "messages": [{"role": "user", "content": "a"}]})
    assert "/v1/predict" in chat.json()["error"]["message"], chat.text
    limited = post(model="fake", text="abc")
    assert limited.status_code == 429 and limited.headers["retry-after"], limited.text
    assert 'path="/v1/count",status="200"' in client.get("/metrics").text
    assert "/v1/count" in client.get("/openapi.json").json()["paths"]
    server.state.draining = True
    assert post(model="fake", text="abc").status_code == 503
print("counted")
"""


def test_a_route_is_a_row_and_its_file(tmp_path: Path) -> None:
    copy = copy_package(tmp_path)
    (copy / "serve" / "inference" / "count.py").write_text(FILE, encoding="utf-8")
    table = copy / "serve" / "app.py"
    lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    lines.insert(lines.index("ROUTES = (\n") + 1, ROW)
    lines.insert(next(place for place, line in enumerate(lines) if line.startswith("from gulliver.serve")), IMPORT)
    table.write_text("".join(lines), encoding="utf-8")
    assert python(tmp_path, "-c", CHECK, cwd=tmp_path) == "counted\n"


def test_what_the_table_says_is_true() -> None:
    paths = [route.path for route in ROUTES]
    assert len(set(paths)) == len(paths)
    for route in ROUTES:
        assert route.costs == (route.body is not None) and not (route.costs and route.quiet)
        assert route.can is None or route.body is not None
