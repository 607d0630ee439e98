"""POST /v1/predict: any model, one request and one response, under the same keys, limits and ends as the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_samples import FakeEngine, Running, Total, served, serving

from gulliver.runtime.batching.queue import BatchQueue
from gulliver.serve.errors import ErrorAnswer
from gulliver.serve.keys import KeyRing, add_key
from gulliver.serve.state import Settings


def add(items: list[list[int]]) -> list[Total]:
    """What the fake model computes; 666 is a bug."""
    if any(666 in item for item in items):
        raise RuntimeError("secret words")
    return [Total(total=sum(item), prompt_tokens=len(item)) for item in items]


def ask(client: httpx.Client, numbers: Any, **fields: Any) -> httpx.Response:
    return client.post("/v1/predict", json={"model": "adder", "input": {"numbers": numbers}, **fields})


def error_of(response: httpx.Response) -> Any:
    return ErrorAnswer.model_validate_json(response.content, strict=True).error


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(FakeEngine(), models=[served(BatchQueue("adder", add), "adder", can=("predict",))]) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def test_a_request_is_answered_in_the_form_of_the_models_family(client: httpx.Client) -> None:
    response = ask(client, [1, 2, 3])
    assert response.status_code == 200 and response.json() == {"total": 6.0, "prompt_tokens": 3}
    assert response.headers["content-type"] == "application/json" and response.headers["x-request-id"]
    long = [7] * 100_000
    assert ask(client, long).json()["total"] == sum(long)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"input": {}}, "input.numbers", "missing field 'input.numbers'"),
        ({"input": {"number": [1], "numbers": [1]}}, "input.number", "did you mean 'numbers'?"),
        ({"input": {"numbers": []}}, "input.numbers", "at least 1 item"),
        ({"input": {"numbers": ["x"]}}, "input.numbers.0", "valid integer"),
        ({"input": {"numbers": [13]}}, "input", "13 cannot be added"),
        ({"input": [1]}, "input", "valid dictionary"),
        ({"inputs": {}}, "inputs", "did you mean 'input'?"),
    ],
)
def test_a_request_that_the_model_refuses(client: httpx.Client, fields: Any, param: str, says: str) -> None:
    response = ask(client, [1], **fields)
    error = error_of(response)
    assert response.status_code == 400 and error.param == param and says in error.message


def test_models_are_routed_by_what_they_can(client: httpx.Client) -> None:
    wrong = client.post("/v1/completions", json={"model": "adder", "prompt": "a"})
    error = error_of(wrong)
    assert (wrong.status_code, error.code, error.param) == (400, "wrong_model", "model")
    assert error.message == "model 'adder' cannot generate; it can predict: send requests to /v1/predict"
    error = error_of(client.post("/v1/embeddings", json={"model": "fake", "input": "a"}))
    assert "it can generate and predict: send requests to /v1/chat/completions or /v1/completions" in error.message
    missing = ask(client, [1], model="other")
    assert missing.status_code == 404 and error_of(missing).code == "model_not_found"


def test_a_failing_model_is_a_500_that_tells_nothing(client: httpx.Client) -> None:
    response = ask(client, [666])
    assert response.status_code == 500 and "secret" not in response.text
    assert ask(client, [1]).status_code == 200


def test_it_is_counted_and_documented(client: httpx.Client) -> None:
    ask(client, [1])
    text = client.get("/metrics").text
    assert 'gulliver_http_requests_total{method="POST",model="adder",path="/v1/predict",status="200"}' in text
    assert 'gulliver_requests_admitted_total{model="adder"}' in text
    row = client.get("/openapi.json").json()["paths"]["/v1/predict"]["post"]
    assert {"200", "400", "401", "404", "429", "503", "504"} <= set(row["responses"])


def until(true: Callable[[], bool]) -> None:
    """Wait for something to become true; fail after half a minute."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Slow:
    """A model whose batches last until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Semaphore(0), threading.Event()
        self.seen: list[list[int]] = []

    def __call__(self, items: list[list[int]]) -> list[Total]:
        self.seen += items
        self.begun.release()
        assert self.go.wait(30)
        return add(items)


def test_a_key_is_needed_and_its_tokens_are_charged(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = add_key(path, "ann", tokens_per_minute=10)
    models = [served(BatchQueue("adder", add), "adder", can=("predict",))]
    with serving(FakeEngine(), models=models, keys=KeyRing(path, print)) as server, server.client() as client:
        assert ask(client, [1]).status_code == 401
        client.headers["authorization"] = f"Bearer {key}"
        assert ask(client, [1] * 40).status_code == 200
        refused = ask(client, [1])
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 100
        assert error_of(refused).message.startswith("rate limit reached for this key (tokens per minute); retry in ")


@pytest.mark.parametrize("end", ["full", "gone", "timeout", "drain"])
def test_ends(end: str) -> None:
    slow = Slow()
    queue = BatchQueue("adder", slow, queue=1, batch=1)
    settings = Settings(timeout_seconds=0.3 if end == "timeout" else 60)
    models = [served(queue, "adder", can=("predict",))]
    with serving(FakeEngine(), models=models, settings=settings) as server, server.client() as client:
        busy = threading.Thread(target=ask, args=(client, [1]))
        busy.start()
        assert slow.begun.acquire(timeout=30)
        if end == "gone":
            with pytest.raises(httpx.ReadTimeout), server.client() as other:
                other.post("/v1/predict", json={"model": "adder", "input": {"numbers": [2]}}, timeout=0.3)
            until(lambda: server.state.active == 1)
        elif end == "timeout":
            assert error_of(ask(client, [2])).code == "timeout"
        else:
            waiting: list[httpx.Response] = []
            second = threading.Thread(target=lambda: waiting.append(ask(client, [2])))
            second.start()
            until(lambda: queue.stats()["requests_waiting"] == 1)
            if end == "full":
                refused = ask(client, [3])
                assert (refused.status_code, error_of(refused).code) == (429, "queue_full")
            else:
                queue.drain(0.0)
            slow.go.set()
            second.join(30)
            assert waiting[0].status_code == (200 if end == "full" else 503)
        slow.go.set()
        busy.join(30)
    assert slow.seen == ([[1], [2]] if end == "full" else [[1]])
