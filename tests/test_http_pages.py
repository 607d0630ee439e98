"""What is not OpenAI's: the page, cards, health, measures, the OpenAPI document."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from http_samples import FakeEngine, Running, served, serving
from prometheus_client.parser import text_string_to_metric_families

from gulliver.core.errors import ConfigError
from gulliver.serve.app import make_state
from gulliver.serve.pages import Health, ModelCard, ModelEntry, ModelList, PageFiles

EVIDENCE = [{"metric": "perplexity", "value": 12.5}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "README.md").write_text("# A model\n\nsmall — and good", encoding="utf-8")
    (folder / "evidence.json").write_text(json.dumps({"format": 1, "evidence": [*EVIDENCE, 5]}))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    hostile = tmp_path_factory.mktemp("hostile")
    (hostile / "README.md").symlink_to("/etc/passwd")
    (hostile / "evidence.json").write_bytes(b'{"evidence": [' + b"[" * 100_000)
    models = [served(FakeEngine(), "org/name", folder), served(FakeEngine(), "hostile", hostile)]
    with serving(FakeEngine(), models=models) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def test_models_are_listed(client: httpx.Client) -> None:
    listed = ModelList.model_validate_json(client.get("/v1/models").content, strict=True)
    assert [model.id for model in listed.data] == ["fake", "org/name", "hostile"]
    one = ModelEntry.model_validate_json(client.get("/v1/models/org/name").content, strict=True)
    assert one == listed.data[1]
    assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_a_card_shows_what_lies_beside_the_model(client: httpx.Client) -> None:
    card = ModelCard.model_validate_json(client.get("/api/models/org/name").content, strict=True)
    assert card.card == "# A model\n\nsmall — and good" and card.evidence == EVIDENCE
    assert (card.size_bytes, card.backend, card.why, card.context) == (1234, "fake", "tests need no model", 512)
    assert card.can == ["generate", "predict"] and "numbers" in card.request["properties"]
    assert "total" in card.response["properties"]


def test_a_hostile_folder_shows_nothing(client: httpx.Client) -> None:
    card = client.get("/api/models/hostile").json()
    assert card["card"] is None and card["evidence"] == []
    bare = client.get("/api/models/fake").json()
    assert bare["card"] is None and bare["evidence"] == []


def test_the_page_is_served_with_a_strict_policy(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["referrer-policy"] == "no-referrer"
    again = client.get("/", headers={"if-none-match": page.headers["etag"]})
    assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == page.headers["etag"]
    assert client.head("/").headers["content-length"] == str(len(page.content))
    scripts = re.findall(r'(?:src|href)="/?([\w.]+\.(?:js|css))"', page.text)
    assert scripts
    for name in scripts:
        kind = client.get(f"/{name}").headers["content-type"]
        assert kind.startswith("text/javascript" if name.endswith(".js") else "text/css")


@pytest.mark.parametrize(
    "path",
    [
        *("/no.js", "/..%2fhttp.py", "/%2e%2e/http.py", "/__init__.py", "/console/index.html", "/v1/completions/"),
        *("/%2e", "/%2e%2e", "/..%5chttp.py", "/%2fetc%2fpasswd", "/%00", f"/{'a' * 300}", "/style.css/"),
    ],
)
def test_nothing_else_is_served(path: str, client: httpx.Client) -> None:
    response = client.get(path)
    assert response.status_code == 404 and response.json()["error"]["code"] == "not_found"


def test_a_tag_tells_files_of_equal_length_and_time_apart(tmp_path: Path) -> None:
    async def get(tag: str) -> httpx.Response:
        transport = httpx.ASGITransport(PageFiles(directory=tmp_path))
        async with httpx.AsyncClient(transport=transport, base_url="http://page") as client:
            return await client.get("/a.js", headers={"if-none-match": tag})

    responses = []
    for content in (b"old", b"new", b"new"):
        (tmp_path / "a.js").write_bytes(content)
        os.utime(tmp_path / "a.js", (0, 0))
        responses.append(asyncio.run(get(responses[-1].headers["etag"] if responses else "")))
    assert [(each.status_code, each.content) for each in responses] == [(200, b"old"), (200, b"new"), (304, b"")]
    assert responses[1].headers["content-type"] == "text/javascript; charset=utf-8"
    assert all(each.headers["cache-control"] == "no-cache" for each in responses)


def test_health_and_readiness(client: httpx.Client) -> None:
    for path in ("/healthz", "/readyz"):
        response = client.get(path)
        assert response.status_code == 200
        assert Health.model_validate_json(response.content, strict=True).status == "ok"


def test_measures_are_prometheus(client: httpx.Client) -> None:
    client.post("/v1/completions", json={"model": "fake", "prompt": "ab"})
    client.post("/v1/completions", json={"model": "nobody", "prompt": "ab"})
    client.get("/made/up/by/a/client")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    samples = {
        (row.name, tuple(sorted(row.labels.items()))): row.value
        for family in families.values()
        for row in family.samples
    }
    labels = (("method", "POST"), ("model", "fake"), ("path", "/v1/completions"), ("status", "200"))
    assert samples["gulliver_http_requests_total", labels] == 1
    labels = (("method", "POST"), ("model", ""), ("path", "/v1/completions"), ("status", "404"))
    assert samples["gulliver_http_requests_total", labels] == 1
    assert samples["gulliver_completion_tokens_total", (("model", "fake"),)] == 14
    assert samples["gulliver_completions_total", (("model", "fake"), ("reason", "stop"))] == 1
    assert samples["gulliver_requests_running", (("model", "hostile"),)] == 0
    assert samples["gulliver_cache_blocks", (("model", "fake"),)] == 8
    for name in ("gulliver_time_to_first_token_seconds", "gulliver_inter_token_seconds", "gulliver_rows_per_step"):
        assert families[name].type == "histogram" and families[name].documentation
    assert families["gulliver_queue_seconds"].samples[-1].name == "gulliver_queue_seconds_sum"
    assert "made" not in response.text and families["process_resident_memory_bytes"].samples


def test_every_measure_is_written_down(client: httpx.Client) -> None:
    documented = Path(__file__).parent.parent.joinpath("docs", "serving.md").read_text(encoding="utf-8")
    families = text_string_to_metric_families(client.get("/metrics").text)
    names = [family.name for family in families if family.name.startswith("gulliver_")]
    names = [name for name in names if not name.endswith("_created")]
    assert len(names) > 20 and [name for name in names if name not in documented] == []


def test_the_openapi_document_names_every_path_and_every_option(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    text = Path(__file__).parent.parent.joinpath("docs", "serving.md").read_text(encoding="utf-8")
    assert [path for path in document["paths"] if path.replace("{id}", "NAME") not in text] == []
    fields = {
        name
        for schema in ("ChatRequest", "CompletionRequest", "EmbeddingRequest")
        for name in document["components"]["schemas"][schema]["properties"]
    }
    assert sorted(name for name in fields if f"`{name}`" not in text) == []
    assert "422" not in document["paths"]["/v1/completions"]["post"]["responses"]


def test_names_are_unique_and_there_is_a_model() -> None:
    with pytest.raises(ConfigError, match="no model"):
        make_state([])
    engine = FakeEngine()
    with pytest.raises(ConfigError, match="same name"):
        make_state([served(engine), served(engine)])
    engine.close()
