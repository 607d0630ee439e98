"""The official `openai` package, unmodified, against a real server with a real (tiny, random) model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
from http_samples import Running, served, serving
from language_samples import write_causal, write_encoder

from gulliver.tasks import open_model
from gulliver.tasks.answerer import OpenOptions

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
HELLO: Any = [{"role": "user", "content": "hi"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Delft", "Bergen"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}}},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = write_causal(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tiny = open_model(folder, "language", "tiny", OpenOptions(threads=1, cache_tokens=8192))
    encoder_folder = write_encoder(tmp_path_factory.mktemp("encoder"))
    encoder = open_model(encoder_folder, "encoder", "encoder", OpenOptions())
    models = [served(tiny, "tiny"), served(encoder, "encoder")]
    with serving(models=models) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "encoder"]
    assert client.models.retrieve("tiny").owned_by == "gulliver"


def test_a_chat_whole_and_streamed_is_the_same(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**fields)
    text = whole.choices[0].message.content
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text and streamed == text
    assert whole.usage and chunks[-1].usage and whole.usage.total_tokens == chunks[-1].usage.total_tokens
    assert whole.choices[0].finish_reason == chunks[-2].choices[0].finish_reason == "length"


def test_a_seed_repeats_and_n_differ(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "n": 3, "seed": 5}
    first = [choice.message.content for choice in client.chat.completions.create(**fields).choices]
    again = [choice.message.content for choice in client.chat.completions.create(**fields).choices]
    assert first == again and len(set(first)) == 3


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 8
    for row in logprobs.content:
        assert len(row.top_logprobs) == 3 and row.bytes is not None
        assert row.logprob == pytest.approx(row.top_logprobs[0].logprob) and row.logprob <= 0


def test_completions_echo_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny",
        prompt=["the giant", "home"],
        max_tokens=2,
        echo=True,
        logprobs=2,
        extra_body={"ignore_eos": True},  # what is drawn by chance may be the end
    )
    for prompt, choice in zip(["the giant", "home"], answer.choices, strict=True):
        logprobs = choice.logprobs
        assert choice.text.startswith(prompt) and logprobs is not None and logprobs.tokens is not None
        assert logprobs.token_logprobs is not None and logprobs.token_logprobs[0] is None
        assert all(value <= 0 for value in logprobs.token_logprobs[1:])
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(prompt) + 2
        assert "".join(logprobs.tokens[: len(prompt)]) == prompt
    parts = client.completions.create(model="tiny", prompt="home", max_tokens=5, stream=True, temperature=0)
    whole = client.completions.create(model="tiny", prompt="home", max_tokens=5, temperature=0)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text


def test_a_schema_is_kept(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, response_format=form, seed=seed, max_tokens=400, temperature=0.5
        )
        assert answer.choices[0].finish_reason == "stop"
        found = json.loads(answer.choices[0].message.content or "")
        assert found["city"] in ("Delft", "Bergen") and 0 <= found["days"] <= 9
    with pytest.raises(openai.BadRequestError, match="not supported"):
        wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
        client.chat.completions.create(model="tiny", messages=HELLO, response_format=wrong)


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"not": {"not": {"not": {}}}}, {"type": "string", "pattern": "("}])
def test_a_schema_that_leads_nowhere_is_the_requests_fault(schema: Any, client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=HELLO, response_format=form, max_tokens=20)


def test_a_pydantic_model_is_parsed(client: openai.OpenAI) -> None:
    class City(pydantic.BaseModel):
        city: Literal["Delft", "Bergen"]

    answer = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=City, max_tokens=300)
    assert answer.choices[0].message.parsed is not None


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_tool_call(choice: Any, client: openai.OpenAI) -> None:
    fields: Any = {
        "model": "tiny",
        "messages": HELLO,
        "tools": TOOLS,
        "tool_choice": choice,
        "max_tokens": 400,
        "seed": 3,
    }
    answer = client.chat.completions.create(**fields)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name in ("weather", "stop")
    assert isinstance(json.loads(call.function.arguments), dict)
    with client.chat.completions.stream(**fields) as stream:
        for _ in stream:
            pass
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert (streamed.function.name, json.loads(streamed.function.arguments)) == (
        call.function.name,
        json.loads(call.function.arguments),
    )


def test_tools_that_need_not_be_called(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS, max_tokens=8, temperature=0)
    assert answer.choices[0].finish_reason == "length" and answer.usage and answer.usage.prompt_tokens > 200


def test_embeddings(client: openai.OpenAI) -> None:
    found = client.embeddings.create(model="encoder", input=["a giant", "home"])  # asks for base64 by itself
    assert len(found.data) == 2 and sum(value * value for value in found.data[0].embedding) == pytest.approx(
        1, abs=1e-4
    )


def test_its_errors_are_the_clients_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=HELLO)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="x" * 5000)
    assert long.value.code == "context_length_exceeded"


def test_the_async_client(server: Running) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60) as client:

            async def one() -> str:
                stream = await client.chat.completions.create(
                    model="tiny", messages=HELLO, stream=True, temperature=0, max_tokens=10
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one() for _ in range(8)))

    found = asyncio.run(ask())
    assert found[0] and len(set(found)) == 1
