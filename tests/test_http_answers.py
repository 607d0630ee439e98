"""What the server answers: chat and completions, whole and streamed, in OpenAI's shapes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from http_samples import FakeEngine, Running, serving

from gulliver.runtime.batching.records import Request
from gulliver.serve.errors import ErrorAnswer
from gulliver.serve.openai import answers as stream
from gulliver.serve.openai import response_schemas as answers
from gulliver.serve.openai.answers import CompletionAnswer

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[Running]:
    with serving(engine) as running:
        yield running


@pytest.fixture
def client(server: Running, engine: FakeEngine) -> Iterator[httpx.Client]:
    engine.answer = lambda request: "Hello, wörld!"
    engine.fail_after = None
    engine.requests.clear()
    with server.client() as client:
        yield client


def chat(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"model": "fake", "messages": HELLO, **fields})


def complete(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"model": "fake", "prompt": "ab", "max_tokens": 100, **fields})


def events(client: httpx.Client, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any]]:
    """The JSON of every event of a stream, which must end with [DONE]."""
    about = {"messages": HELLO} if "chat" in path else {"prompt": "ab", "max_tokens": 100}
    found = []
    with client.stream("POST", path, json={"model": "fake", "stream": True, **about, **fields}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line:
                assert line.startswith("data: ")
                found.append(line.removeprefix("data: "))
    assert found.pop() == "[DONE]"
    return [json.loads(line) for line in found]


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    rows = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(row["text"] if "text" in row else row["delta"].get("content") or "" for row in rows)


# ---- chat ------------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_whole(client: httpx.Client) -> None:
    response = chat(client)
    body = answers.ChatCompletion.model_validate_json(response.content, strict=True)
    assert body.choices[0].message.content == "Hello, wörld!"
    assert body.choices[0].finish_reason == "stop" and body.choices[0].logprobs is None
    assert body.usage.model_dump() == {
        "prompt_tokens": 9,
        "completion_tokens": 14,
        "total_tokens": 23,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert response.headers["x-request-id"] in body.id


def test_a_chat_is_streamed_piece_by_piece(client: httpx.Client) -> None:
    chunks = events(client)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(chunks) == "Hello, wörld!"
    assert len(chunks) == 15  # the role, 13 characters, the end
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert len({chunk["id"] for chunk in chunks}) == 1 and all("usage" not in chunk for chunk in chunks)


def test_usage_comes_at_the_end_of_a_stream_when_asked(client: httpx.Client) -> None:
    chunks = events(client, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] == 23
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_have_streams_of_their_own(stream: bool, client: httpx.Client, engine: FakeEngine) -> None:
    engine.answer = lambda request: f"seed {request.sampling.seed}"
    if stream:
        chunks = events(client, n=3, seed=7)
        texts = [text_of(chunks, index) for index in range(3)]
    else:
        body = chat(client, n=3, seed=7).json()
        texts = [choice["message"]["content"] for choice in body["choices"]]
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        assert body["usage"]["prompt_tokens"] == 9 and body["usage"]["completion_tokens"] == 18
    assert texts == ["seed 7", "seed 8", "seed 9"]


def test_more_answers_than_are_in_flight_at_once(client: httpx.Client) -> None:
    body = chat(client, n=100).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["Hello, wörld!"] * 100


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_stand_beside_the_tokens(stream: bool, client: httpx.Client) -> None:
    fields = {"logprobs": True, "top_logprobs": 2}
    if stream:
        choices = [choice for chunk in events(client, **fields) for choice in chunk["choices"] if choice["logprobs"]]
        rows = [row for choice in choices for row in choice["logprobs"]["content"]]
    else:
        rows = chat(client, **fields).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for row in rows for byte in row["bytes"]).decode() == "Hello, wörld!"
    assert rows[0]["token"] == "H" and rows[0]["logprob"] == -0.5
    assert [top["token"] for top in rows[0]["top_logprobs"]] == ["H", "I"]


def test_the_options_reach_the_engine(client: httpx.Client, engine: FakeEngine) -> None:
    options = {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "top_k": 40, "seed": -1}
    penalties = {"presence_penalty": 0.25, "frequency_penalty": -0.5}
    ends = {"stop": ["x", "y"], "stop_token_ids": [5], "ignore_eos": True, "max_completion_tokens": 3}
    assert chat(client, **options, **penalties, **ends, logit_bias={"7": -100}).status_code == 200
    asked = engine.requests[-1]
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == (0.5, 0.9, 0.1)
    assert (sampling.repetition_penalty, sampling.top_k, sampling.seed) == (1.2, 40, 2**63 - 1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.25, -0.5)
    assert sampling.logit_bias == ((7, -100.0),)
    assert asked.stop == ("x", "y") and asked.stop_tokens == (5,) and asked.ignore_end and asked.max_tokens == 3
    assert asked.timeout_seconds == pytest.approx(600, abs=5)


def test_the_defaults_are_openais(client: httpx.Client, engine: FakeEngine) -> None:
    chat(client, top_p=0, top_k=-1, user="me", store=True, metadata={"a": "b"}, service_tier="auto")
    asked = engine.requests[-1]
    assert asked.sampling.temperature == 1 and asked.sampling.top_k == 0 and 0 < asked.sampling.top_p < 1e-6
    assert asked.max_tokens is None and asked.sampling.seed is None and asked.top_logprobs is None
    client.post("/v1/completions", json={"model": "fake", "prompt": "a"})
    assert engine.requests[-1].max_tokens == 16


def test_length_and_stop_end_an_answer(client: httpx.Client) -> None:
    choice = chat(client, max_tokens=5).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello", "length")
    choice = chat(client, stop=",").json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello", "stop")
    assert chat(client, max_tokens=10**6).json()["usage"]["completion_tokens"] == 14  # cut to what fits


def test_parts_and_roles_reach_the_template(client: httpx.Client, engine: FakeEngine) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts, "name": "Ann"}]
    assert chat(client, messages=asked).status_code == 200
    messages, _ = engine.text.seen[-1]
    assert messages[0] == {"role": "system", "content": "be kind"}
    assert messages[1] == {"role": "user", "content": "ab", "name": "Ann"}


# ---- completions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("ab", ["ab"]), (["ab", "cd"], ["ab", "cd"]), ([97, 98], ["ab"]), ([[97], [98, 99]], ["a", "bc"]), (["ä"], ["ä"])],
)
def test_every_form_of_prompt(prompt: Any, texts: list[str], client: httpx.Client, engine: FakeEngine) -> None:
    engine.answer = lambda request: f"<{len(request.prompt)}>"
    body = complete(client, prompt=prompt, echo=True, n=2).json()
    answers.Completion.model_validate(body, strict=True)
    wanted = [f"{text}<{len(text.encode())}>" for text in texts for _ in range(2)]
    assert [choice["text"] for choice in body["choices"]] == wanted
    assert [choice["index"] for choice in body["choices"]] == list(range(len(wanted)))
    assert body["usage"]["prompt_tokens"] == sum(len(text.encode()) for text in texts)


def test_completion_logprobs_with_echo(client: httpx.Client) -> None:
    choice = complete(client, prompt="aé", echo=True, logprobs=1, max_tokens=1).json()["choices"][0]
    assert choice["text"] == "aéH"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "H"]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["text_offset"] == [0, 1, 2, 2] and choice["text"][2] == "H"
    assert logprobs["top_logprobs"][3] == {"H": -0.5}


def test_only_a_prompts_logprobs(client: httpx.Client, engine: FakeEngine) -> None:
    choice = complete(client, echo=True, logprobs=0, max_tokens=0).json()["choices"][0]
    assert choice["text"] == "ab" and choice["logprobs"]["tokens"] == ["a", "b"]
    choice = complete(client, echo=True, max_tokens=0).json()["choices"][0]
    assert choice["text"] == "ab" and choice["logprobs"] is None
    assert engine.requests[-1].echo_logprobs and engine.requests[-1].max_tokens == 0


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_completion_is_streamed(logprobs: int | None, client: httpx.Client) -> None:
    fields: dict[str, Any] = {"echo": True, "logprobs": logprobs, "stream_options": {"include_usage": True}}
    chunks = events(client, "/v1/completions", **fields)
    assert text_of(chunks) == "abHello, wörld!"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop" and chunks[-1]["usage"]["completion_tokens"] == 14
    tokens = [
        token for chunk in chunks[:-1] for row in [chunk["choices"][0]["logprobs"]] if row for token in row["tokens"]
    ]
    assert len(tokens) == (16 if logprobs else 0)
    offsets = [
        at for chunk in chunks[:-1] for row in [chunk["choices"][0]["logprobs"]] if row for at in row["text_offset"]
    ]
    assert offsets == sorted(offsets)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_engine_that_fails_is_a_500_or_an_event(path: str, client: httpx.Client, engine: FakeEngine) -> None:
    engine.fail_after = 2
    response = chat(client) if "chat" in path else complete(client)
    assert response.status_code == 500 and response.json()["error"]["code"] == "engine_failed"
    assert "numbers are wrong" in response.json()["error"]["message"]
    assert events(client, path)[-1]["error"]["code"] == "engine_failed"


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"model": "other"}, 404, "model", "choose one of: fake"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "needs content"),
        ({"messages": [{"role": "user", "content": "refuse me"}]}, 400, "messages", "template refuses"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role", "Input should be"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages", "context of 512"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, "messages.0.content"),
        ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, 400, "temperature", "valid number"),
        ({"temprature": 1}, 400, "temprature", "did you mean 'temperature'?"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"n": 129}, 400, "n", "less than or equal to 128"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1e30}, 400, "max_tokens", "integer"),
        ({"logit_bias": {"257": 1}}, 400, "logit_bias", "0 to 256"),
        ({"logit_bias": {"-1": 1}}, 400, "logit_bias", "0 to 256"),
        ({"stop": [""]}, 400, None, "at least 1 character"),
        ({"stream_options": {}}, 400, "stream_options", "needs stream"),
        ({"tool_choice": "required"}, 400, "tool_choice", "needs tools"),
        ({"functions": []}, 400, "functions", "unknown field"),
        ({"modalities": ["audio"]}, 400, "modalities.0", "text"),
    ],
)
def test_what_a_chat_refuses(
    fields: dict[str, Any], status: int, param: str | None, says: str, client: httpx.Client
) -> None:
    response = chat(client, **fields)
    error = ErrorAnswer.model_validate_json(response.content, strict=True).error
    assert (response.status_code, error.type) == (status, "invalid_request_error")
    assert says in error.message
    assert param is None or error.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [[1], [257]]}, "prompt"),
        ({"prompt": "x" * 513}, "prompt"),
        ({"prompt": "x" * 600, "max_tokens": 0, "echo": True}, "prompt"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "."}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": ["a"] * 100, "n": 100}, "n"),
    ],
)
def test_what_completions_refuse(fields: dict[str, Any], param: str, client: httpx.Client) -> None:
    response = complete(client, **fields)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_errors_of_the_framework_have_the_same_shape(client: httpx.Client) -> None:
    for method, path, status in (
        ("GET", "/no/such", 404),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/completions", 405),
    ):
        response = client.request(method, path)
        assert response.status_code == status
        ErrorAnswer.model_validate_json(response.content, strict=True)
    assert client.post("/v1/completions", content=b"x=1").json()["error"]["code"] == "invalid_content_type"
    broken = client.post("/v1/completions", content=b'{"a', headers={"content-type": "application/json"})
    assert broken.status_code == 400 and "not valid JSON" in broken.json()["error"]["message"]


@pytest.mark.parametrize("kind", [ZeroDivisionError, BaseException])
def test_a_bug_is_a_500_in_the_same_shape(kind: type[BaseException], client: httpx.Client, engine: FakeEngine) -> None:
    def bug(request: Request) -> str:
        raise kind("secret")

    engine.answer = bug
    response = chat(client)
    assert response.status_code == 500 and "secret" not in response.text
    ErrorAnswer.model_validate_json(response.content, strict=True)


def test_a_long_answer_is_written_beside_the_loop(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    writers: list[str] = []

    def whole(self: CompletionAnswer, *arguments: Any) -> bytes:
        writers.append(threading.current_thread().name)
        return written(self, *arguments)

    written = CompletionAnswer.whole
    monkeypatch.setattr(CompletionAnswer, "whole", whole)
    monkeypatch.setattr(stream, "INLINE_TOKENS", 10)
    for prompt in ("a", "a" * 20):
        body = {"model": "fake", "prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 2}
        assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == prompt
    assert len(writers) == 2 and writers[0] != writers[1]
