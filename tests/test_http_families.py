"""A model of each family behind one server: /v1/predict answers as `gulliver ask` does."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from engine_samples import FakeDecoder, read_text
from http_samples import served, serving
from language_samples import write_causal, write_encoder
from PIL import Image

from gulliver.runtime.batching.engine import Engine
from gulliver.runtime.batching.records import EngineClosed
from gulliver.serve.errors import ErrorAnswer
from gulliver.tasks import TASKS, get_task, open_model
from gulliver.tasks.answerer import Answerer, OpenOptions
from gulliver.tasks.language.answerer import LanguageAnswerer


@pytest.fixture(scope="module")
def answerers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answerer]:
    home = tmp_path_factory.mktemp("families")
    vision = get_task("vision")
    vision.save(vision.build(1, seed=3).eval(), home / "vision")
    write_causal(home / "language")
    write_encoder(home / "encoder")
    return {name: open_model(home / name, name, name, OpenOptions(threads=1)) for name in TASKS}


@pytest.fixture(scope="module")
def client(answerers: dict[str, Answerer]) -> Iterator[httpx.Client]:
    models = [served(answerer, name) for name, answerer in answerers.items()]
    with serving(models=models) as server, server.client() as client:
        yield client


def picture() -> str:
    """A random photograph as base64."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "png")
    return base64.b64encode(stream.getvalue()).decode()


REQUESTS: dict[str, dict[str, Any]] = {
    "language": {"prompt": "the giant", "max_tokens": 5, "temperature": 0},
    "encoder": {"texts": ["a giant", "home", "a small machine"]},
    "vision": {"image": picture()},
}


@pytest.mark.parametrize("name", TASKS)
def test_any_family_answers_as_it_does_without_a_server(
    name: str, client: httpx.Client, answerers: dict[str, Answerer]
) -> None:
    answerer = answerers[name]
    response = client.post("/v1/predict", json={"model": name, "input": REQUESTS[name]})
    assert response.status_code == 200, response.text
    found = answerer.response_model.model_validate_json(response.content)
    expected = answerer.answer(answerer.request_model.model_validate(REQUESTS[name]))
    if name == "language":
        assert found == expected
    else:
        field = "vectors" if name == "encoder" else "probabilities"
        np.testing.assert_allclose(getattr(found, field), getattr(expected, field), atol=1e-6)


@pytest.mark.parametrize("name", TASKS)
def test_a_request_of_another_form_is_refused_by_field(name: str, client: httpx.Client) -> None:
    body = {"model": name, "input": {**REQUESTS[name], "colour": 1}}
    response = client.post("/v1/predict", json=body)
    error = ErrorAnswer.model_validate_json(response.content, strict=True).error
    assert response.status_code == 400 and error.param == "input.colour"


def test_what_only_the_family_can_see_is_refused_as_well(client: httpx.Client) -> None:
    for name, wrong, says in (
        ("vision", {"image": base64.b64encode(b"no picture").decode()}, "picture"),
        ("vision", {"image": "%%%"}, "base64"),
        ("vision", {"image": "é"}, "base64"),
        ("encoder", {"texts": ["a " * 500]}, "truncate"),
        ("language", {"prompt": "a " * 5000}, "tokens"),
        ("language", {}, "prompt"),
    ):
        response = client.post("/v1/predict", json={"model": name, "input": wrong})
        assert response.status_code == 400 and says in response.json()["error"]["message"], response.text


def test_the_card_says_what_each_can_and_takes(client: httpx.Client) -> None:
    for name, row in TASKS.items():
        card = client.get(f"/api/models/{name}").json()
        assert tuple(card["can"]) == row.can
        assert set(REQUESTS[name]) <= set(card["request"]["properties"]), json.dumps(card["request"])


@pytest.mark.parametrize("end", ["cancel", "stop", "drain"])
def test_a_text_that_is_no_longer_wanted_ends_early(end: str, tmp_path: Path) -> None:
    decoder = FakeDecoder(positions=100_000, blocks=10_000)
    decoder.delay_seconds = 0.001
    text = read_text(tmp_path)
    with LanguageAnswerer(Engine(decoder, text, slots=1), tmp_path) as answerer:
        asked = answerer.request_model(prompt="a", raw=True, max_tokens=50_000)
        stop = threading.Event()
        running, waiting = answerer.submit(asked, stop), answerer.submit(asked)
        assert waiting.cancel()
        if end == "cancel":
            assert running.cancel()
        elif end == "stop":
            stop.set()
        else:
            answerer.engine.drain(0.0)
        if end != "cancel":
            with pytest.raises(EngineClosed, match="was stopped"):
                running.result(30)
        assert answerer.engine.drain(30)
        numbers = answerer.engine.stats()
        assert numbers["finished_cancelled"] == 2 and numbers["completion_tokens"] < 50_000
