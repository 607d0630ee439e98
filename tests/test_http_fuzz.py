"""Nothing that can be sent makes the server fail: generated requests from its own document, and hostile bodies."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from http_samples import FakeEngine, Running, served, serving
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error

from gulliver.serve.app import make_app, make_state
from gulliver.serve.errors import ErrorAnswer

STATE = make_state([served(FakeEngine(answer=lambda request: "ok"))])
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", make_app(STATE))


@SCHEMA.parametrize()
@hypothesis.settings(max_examples=20, suppress_health_check=list(hypothesis.HealthCheck), deadline=None)
def test_requests_from_the_document(case: schemathesis.Case) -> None:
    if isinstance(case.body, dict) and "model" in case.body and len(str(case.body)) % 3:
        case.body["model"] = "fake"  # else nearly all would end at the name
    response = case.call()
    case.validate_response(response, checks=[not_a_server_error])
    if response.status_code >= 400:
        ErrorAnswer.model_validate_json(response.content, strict=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(FakeEngine(answer=lambda request: "ok")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


DEEP = 20_000
CHAT = b'{"model":"fake","messages":[{"role":"user","content":"hi"}],'
BODIES = [
    b"",
    b"null",
    b"[]",
    b"0",
    b'"text"',
    b"{",
    b"\xff\xfe",
    b"\x00",
    b"[" * DEEP,
    b'{"a":' * DEEP,
    CHAT + b'"temperature":NaN}',
    CHAT + b'"temperature":Infinity}',
    CHAT + b'"temperature":1e999}',
    CHAT + b'"temperature":-0.0}',
    CHAT + b'"seed":' + b"9" * 5000 + b"}",
    CHAT + b'"seed":-9223372036854775808}',
    CHAT + b'"max_tokens":18446744073709551616}',
    CHAT + b'"n":true}',
    CHAT + b'"stop":[' + b'"a",' * 5000 + b'"b"]}',
    CHAT + b'"logit_bias":{"\\u0661":1}}',
    CHAT + b'"logit_bias":{"1e2":1}}',
    CHAT + b'"model":"x","model":"fake"}',
    CHAT + b'"metadata":' + b"[" * 900 + b"]" * 900 + b"}",
    CHAT
    + b'"tools":[{"type":"function","function":{"name":"f","parameters":'
    + b'{"a":' * 900
    + b"1"
    + b"}" * 900
    + b"}}]}",
    CHAT
    + b'"response_format":{"type":"json_schema","json_schema":{"name":"n","schema":'
    + b'{"not":' * 900
    + b"{}"
    + b"}" * 900
    + b"}}}",
    b'{"model":"fake","messages":[{"role":"user","content":"\\ud800"}]}',
    b'{"model":"fake","messages":[{"role":"user","content":"\\u0000"}]}',
    b'{"model":"fake","messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
    b'{"model":"fake","messages":[{"role":"tool","content":"x","tool_calls":[]}]}',
    b'{"model":"\\u0000","prompt":"a"}',
    b'{"model":"' + b"m" * 100_000 + b'","prompt":"a"}',
    b'{"model":"fake","prompt":[' + b"1," * 400_000 + b"1]}",
    b'{"model":"fake","prompt":[[1],"a"]}',
    b'{"model":"fake","prompt":[1,"a"]}',
    b'{"model":"fake","prompt":[-1]}',
    b'{"model":"fake","prompt":[1.0]}',
    b'{"model":"fake","prompt":null}',
    b'{"model":"fake","prompt":"a","' + b"f" * 1000 + b'":1}',
    b'{"model":"fake","prompt":"a","x-y[z]":1}',
]


@pytest.mark.parametrize("place", range(len(BODIES)))
def test_hostile_bodies(place: int, server: Running) -> None:
    with server.client(headers={"content-type": "application/json"}) as client:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
            response = client.post(path, content=BODIES[place])
            assert response.status_code in (200, 400, 404), response.text[:300]
            assert len(response.content) < 2000
            if response.status_code != 200:
                ErrorAnswer.model_validate_json(response.content, strict=True)


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "application/json", "content-length": "-1"},
        {"content-type": "application/json", "content-length": "9" * 4000},
        {"content-type": "application/json", "authorization": "Bearer \xff"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "\xff"},
        {"content-type": "application/json", "expect": "100-continue"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_hostile_headers(headers: dict[str, str], server: Running) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=5)
    connection.putrequest("POST", "/v1/completions")
    body = b'{"model":"fake","prompt":"a"}'
    for name, value in ({"content-length": str(len(body))} | headers).items():
        connection.putheader(name, value.encode("latin-1"))
    connection.endheaders(body)
    with connection.getresponse() as response:
        assert response.status in (200, 400, 413)
    connection.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = sorted(SCHEMA.raw_schema["components"]["schemas"]["ChatRequest"]["properties"])


@hypothesis.given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
@hypothesis.settings(max_examples=100, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_value_in_any_field(client: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], **fields}
    try:
        content = json.dumps(body).encode()
    except UnicodeEncodeError:
        return
    response = client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text[:300]
