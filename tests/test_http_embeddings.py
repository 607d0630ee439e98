"""Sentence encoders behind /v1/embeddings."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import transformers
from http_samples import FakeEngine, served, serving
from language_samples import write_encoder

from gulliver.core.errors import ArtifactError
from gulliver.runtime.batching.queue import BatchQueue
from gulliver.serve.errors import ErrorAnswer
from gulliver.serve.openai import response_schemas as answers
from gulliver.serve.state import Settings
from gulliver.tasks.answerer import OpenOptions
from gulliver.tasks.encoder.answerer import EncoderAnswerer
from gulliver.tasks.encoder.pooling import read_pooling

TEXTS = ["a giant", "home", "a giant made at home among small machines"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    models = [served(EncoderAnswerer(folder, "encoder", OpenOptions(queue=4)), "encoder")]
    with serving(FakeEngine(), models=models) as server, server.client() as client:
        yield client


def ask(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": "encoder", "input": TEXTS, **fields})


def vectors(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    body = answers.EmbeddingList.model_validate_json(response.content, strict=True)
    assert [row.index for row in body.data] == list(range(len(body.data)))
    rows = [row.embedding for row in body.data]
    return np.array([np.frombuffer(base64.b64decode(row), "<f4") if isinstance(row, str) else row for row in rows])


def oracle(folder: Path, kind: str = "mean", normalize: bool = True) -> np.ndarray:
    """One text at a time, through transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    found = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vector = {"mean": hidden.mean(0), "first": hidden[0], "maximum": hidden.amax(0)}[kind]
        found.append(torch.nn.functional.normalize(vector, dim=0) if normalize else vector)
    return torch.stack(found).numpy()


def test_vectors_are_the_models(client: httpx.Client, folder: Path) -> None:
    response = ask(client)
    found = vectors(response)
    np.testing.assert_allclose(found, oracle(folder), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert response.json()["usage"]["prompt_tokens"] == response.json()["usage"]["total_tokens"] > 10


def test_every_form_of_input_and_of_output(client: httpx.Client, folder: Path) -> None:
    one = vectors(ask(client, input=TEXTS[0]))
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS[0])["input_ids"]
    np.testing.assert_allclose(vectors(ask(client, input=tokens)), one, atol=1e-6)
    np.testing.assert_allclose(vectors(ask(client, input=[tokens, tokens])), np.repeat(one, 2, axis=0), atol=1e-5)
    np.testing.assert_array_equal(
        vectors(ask(client, encoding_format="base64")).astype("<f4"), vectors(ask(client)).astype("<f4")
    )
    assert vectors(ask(client, dimensions=32)).shape == (3, 32)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"input": []}, "input", "empty list"),
        ({"input": [[]]}, "input", "empty"),
        ({"input": [9999]}, "input", "does not exist"),
        ({"input": "a " * 100}, "input", "reads 64"),
        ({"dimensions": 16}, "dimensions", "32 dimensions"),
        ({"encoding_format": "hex"}, "encoding_format", "base64"),
        ({"model": "fake"}, "model", "/v1/chat/completions"),
        ({"input": None}, "input", "valid string"),
        ({"temperature": 1}, "temperature", "unknown field"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], param: str, says: str, client: httpx.Client) -> None:
    response = ask(client, **fields)
    error = ErrorAnswer.model_validate_json(response.content, strict=True).error
    assert response.status_code == 400 and error.param == param and says in error.message


def test_a_long_text_is_cut_when_asked(client: httpx.Client) -> None:
    response = ask(client, input="a " * 100, truncate=True)
    assert response.status_code == 200 and response.json()["usage"]["prompt_tokens"] == 64


def test_an_encoder_does_not_chat(client: httpx.Client) -> None:
    body = {"model": "encoder", "messages": [{"role": "user", "content": "hi"}]}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400 and "/v1/embeddings" in response.json()["error"]["message"]


@pytest.mark.parametrize("end", ["gone", "timeout", "drain"])
def test_work_that_nobody_waits_for_ends(end: str, folder: Path) -> None:
    encoder = EncoderAnswerer(folder, "encoder", OpenOptions())
    encoder.close()
    passes = 0

    def one_pass(texts: Any) -> np.ndarray:
        nonlocal passes
        passes += 1
        time.sleep(0.02)
        return np.zeros((len(texts), encoder.width), np.float32)

    encoder.engine = BatchQueue("encoder", one_pass, batch=1, cost=len)
    models = [served(encoder, "encoder")]
    body = {"model": "encoder", "input": ["a"] * 500}
    settings = Settings(timeout_seconds=0.2 if end == "timeout" else 60)
    with serving(FakeEngine(), models=models, settings=settings) as server, server.client() as client:
        if end == "gone":
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/embeddings", json=body, timeout=0.2)
        else:
            timer = threading.Timer(0.2, encoder.engine.drain, [0.0])
            if end == "drain":
                timer.start()
            assert client.post("/v1/embeddings", json=body).status_code == (503 if end == "drain" else 504)
        deadline = time.monotonic() + 10
        while server.state.active and time.monotonic() < deadline:
            time.sleep(0.01)
    assert 0 < passes < 250


def test_its_measures(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    assert 'gulliver_request_seconds_count{model="encoder"}' in text
    assert 'gulliver_prompt_tokens_total{model="encoder"}' in text


# ---- what the files say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "first", "maximum"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_folders_pooling_is_done(kind: str, normalize: bool, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path)
    modes = {"mean": "mean_tokens", "first": "cls_token", "maximum": "max_tokens"}
    (folder / "1_Pooling").mkdir()
    config = {f"pooling_mode_{mode}": name == kind for name, mode in modes.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **config}))
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    rows = [{"idx": place, "type": f"sentence_transformers.models.{name}"} for place, name in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    with EncoderAnswerer(folder, "encoder", OpenOptions()) as encoder:
        assert encoder.context == 20
        found = encoder.embed([tuple(encoder.text.encode(text)[:64]) for text in TEXTS]).result(10)
    np.testing.assert_allclose(found, oracle(folder, kind, normalize), atol=1e-5)


def test_pooling_that_is_not_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_weightedmean_tokens": true}')
    with pytest.raises(ArtifactError, match="weightedmean"):
        read_pooling(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        read_pooling(tmp_path)
