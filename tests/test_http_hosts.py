"""A server without keys answers its own names only, and no page of another origin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from http_samples import FakeEngine, Running, serving

from gulliver.core.errors import ConfigError
from gulliver.serve.errors import ApiError
from gulliver.serve.hosts import OwnNames, checked_names, is_loopback, name_of
from gulliver.serve.keys import KeyRing, add_key
from gulliver.serve.state import Settings

BODY = {"model": "fake", "prompt": "a"}
PATHS = ("/", "/app.js", "/v1/models", "/api/models/fake", "/metrics", "/healthz", "/openapi.json", "/nothing")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(FakeEngine(), settings=Settings(allowed_hosts=("models.example",))) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil-localhost",
        "127.0.0.1@evil.example",
        "localhost:8000@evil.example",
        "10.0.0.1",
        "[::2]",
        "[::1",
        "::1",
        "localhost:port",
        "localhost:8000:1",
        "localhost evil",
        "models.example.evil",
        "x.models.example",
        "a" * 5000,
        "",
    ],
)
def test_a_foreign_name_is_refused_on_every_path(client: httpx.Client, host: str) -> None:
    for path in PATHS:
        refused = client.get(path, headers={"host": host})
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "host_not_allowed", path
    assert client.post("/v1/completions", json=BODY, headers={"host": host}).status_code == 403


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:8000",
        "localhost.",
        "chat.localhost:1",
        "127.0.0.1",
        "127.9.9.9:65535",
        "[::1]:80",
        "[::ffff:127.0.0.1]",
        "models.example",
        "MODELS.example.:443",
    ],
)
def test_own_names_are_answered(client: httpx.Client, host: str) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "", "http://localhost:1", "https://evil", "file://"])
@pytest.mark.parametrize("kind", ["application/json", "text/plain", None])
def test_a_page_of_another_origin_is_refused(server: Running, origin: str, kind: str | None) -> None:
    headers = {"origin": origin} | ({"content-type": kind} if kind else {})
    with server.client() as client:
        asked = client.post("/v1/completions", content=b'{"model":"fake","prompt":"a"}', headers=headers)
        assert asked.status_code == 403 and asked.json()["error"]["code"] == "host_not_allowed"
    assert not server.state.models["fake"].engine.requests


def test_a_page_without_an_origin_is_known_by_its_site(client: httpx.Client) -> None:
    site = {"sec-fetch-site": "cross-site"}
    assert client.get("/v1/models", headers={**site, "sec-fetch-mode": "no-cors"}).status_code == 403
    assert client.get("/", headers={**site, "sec-fetch-mode": "navigate"}).status_code == 200  # a link


def test_the_own_page_and_allowed_ones_are_served(server: Running, client: httpx.Client) -> None:
    own = {"origin": server.url, "sec-fetch-site": "same-origin"}
    assert client.post("/v1/completions", json=BODY, headers=own).status_code == 200
    for origin in ("https://models.example", "http://models.example:3000"):  # a proxy may name the server otherwise
        assert client.post("/v1/completions", json=BODY, headers={"origin": origin}).status_code == 200
    server.state.models["fake"].engine.requests.clear()


def test_a_form_is_not_executed(client: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        asked = client.post("/v1/completions", content=b'{"model":"fake","prompt":"a"}', headers={"content-type": kind})
        assert asked.status_code == 400 and asked.json()["error"]["code"] == "invalid_content_type"
    assert client.post("/v1/completions", content=b'{"model":"fake","prompt":"a"}').status_code == 400


def test_a_server_with_keys_is_reached_under_any_name(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.json", "ann")
    headers = {"host": "models.example", "origin": "https://models.example", "authorization": f"Bearer {key}"}
    with serving(FakeEngine(), keys=KeyRing(tmp_path / "keys.json", print)) as server, server.client() as client:
        assert client.post("/v1/completions", json=BODY, headers=headers).status_code == 200


def asked(names: OwnNames, host: str, reached: str) -> bool:
    try:
        names.check([(b"host", host.encode())], reached)
    except ApiError:
        return False
    return True


def test_the_address_that_was_reached_is_an_own_name() -> None:
    everywhere, one = OwnNames("0.0.0.0", ()), OwnNames("my-machine", ())
    assert asked(everywhere, "192.168.1.5:8000", "192.168.1.5") and asked(everywhere, "0.0.0.0:8000", "127.0.0.1")
    assert asked(everywhere, "192.168.1.5", "::ffff:192.168.1.5") and asked(everywhere, "[fe80::1]", "fe80::1")
    assert not asked(everywhere, "192.168.1.6", "192.168.1.5")
    assert asked(one, "my-machine:80", "192.168.1.5") and not asked(one, "your-machine", "192.168.1.5")
    assert asked(OwnNames("fe80::2", ()), "[FE80::2]:80", "::1")
    with pytest.raises(ApiError, match="two headers host"):
        one.check([(b"host", b"localhost"), (b"host", b"localhost")], "")


def test_names_that_are_allowed_are_checked() -> None:
    assert checked_names(["Models.Example", "[::1]", "10.0.0.1"]) == {"models.example", "::1", "10.0.0.1"}
    for wrong in ("http://models.example", "models.example:80", "*", "", "a b", "x/y"):
        with pytest.raises(ConfigError, match="--allowed-host is"):
            checked_names([wrong])


def test_loopback() -> None:
    assert all(map(is_loopback, ("localhost", "a.localhost", "127.0.0.2", "::1", "::ffff:127.0.0.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.x", "", "128.0.0.1", "1")))
    assert name_of("[FE80::1]:80") == "fe80::1" and name_of("a:b") is None
