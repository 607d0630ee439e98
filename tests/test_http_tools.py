"""Tool calls: told to the model, read out of its answer, forced by a grammar; and answers that keep to a form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from http_samples import ByteText, FakeEngine, Running, serving
from hypothesis import given
from hypothesis import strategies as st

from gulliver.core.errors import ConfigError
from gulliver.serve.openai import response_schemas as answers
from gulliver.serve.openai.request_schemas import Called, ChatRequest, Tool
from gulliver.serve.openai.tools import ToolReader, call_schema, read_calls

NAMES = ("weather", "add")
CALL = '{"name": "weather", "arguments": {"city": "Delft"}}'
DELFT = Called(name="weather", arguments='{"city":"Delft"}')

READINGS = [
    ("plain text", "plain text", []),
    (f"<tool_call>\n{CALL}\n</tool_call>", "", [DELFT]),
    (f"Let me look.\n<tool_call>{CALL}</tool_call>", "Let me look.", [DELFT]),
    (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "", [DELFT, DELFT]),
    (f"<tool_call>{CALL}", "", [DELFT]),
    (f"[TOOL_CALLS][{CALL}, {CALL}]", "", [DELFT, DELFT]),
    (f"<|python_tag|>{CALL}", "", [DELFT]),
    ('{"name": "weather", "parameters": {"city": "Delft"}}', "", [DELFT]),
    ('  {"type": "function", "function": {"name": "add"}}', "", [Called(name="add", arguments="{}")]),
    ('{"name": "add", "arguments": "{\\"a\\": 1}"}', "", [Called(name="add", arguments='{"a": 1}')]),
    ('{"name": "nobody", "arguments": {}}', '{"name": "nobody", "arguments": {}}', []),
    ('<tool_call>{"name": "add", "argu', '<tool_call>{"name": "add", "argu', []),
    ('{"answer": 42}', '{"answer": 42}', []),
    ("[1, 2] are numbers", "[1, 2] are numbers", []),
    ('{"name": "add", "arguments": {"a": NaN}}', '{"name": "add", "arguments": {"a": NaN}}', []),  # no JSON
    ('{"name": "add", "arguments": {"a": "\\ud800"}}', '{"name": "add", "arguments": {"a": "\\ud800"}}', []),
    ("a < b and <tool", "a < b and <tool", []),
    ("[" * 50_000, "[" * 50_000, []),
    ("", "", []),
]


@pytest.mark.parametrize(("text", "left", "calls"), READINGS)
def test_calls_are_read_from_every_form(text: str, left: str, calls: list[Called]) -> None:
    for size in (1, 3, 1000) if len(text) < 1000 else (1000,):
        reader = ToolReader(NAMES)
        shown = [reader.feed(text[start : start + size]) for start in range(0, len(text), size)]
        rest, found = reader.finish()
        content = "".join(shown) + rest
        assert (content.strip() if calls else content, found) == (left, calls)


@given(st.text(alphabet='ab {}[]"<>tool_cal/:,\n', max_size=60), st.integers(1, 7))
def test_no_text_is_lost_or_changed(text: str, size: int) -> None:
    reader = ToolReader(NAMES)
    shown = "".join(reader.feed(text[start : start + size]) for start in range(0, len(text), size))
    rest, calls = reader.finish()
    assert calls == [] and shown + rest == text


def test_text_is_streamed_up_to_what_may_be_a_mark() -> None:
    reader = ToolReader(NAMES)
    assert reader.feed("I think <") == "I think "
    assert reader.feed("b> is") == "<b> is"
    assert reader.feed(" so <tool_c") == " so "
    assert reader.feed("all>" + CALL) == ""
    assert reader.finish() == ("", [DELFT])


def test_calls_of_unknown_functions_stay_text() -> None:
    assert read_calls(CALL, ["other"]) == (CALL, [])


# ---- schemas ---------------------------------------------------------------------------------------------------------


def tool(name: str, parameters: dict[str, Any] | None = None) -> Tool:
    return Tool.model_validate({"type": "function", "function": {"name": name, "parameters": parameters}})


def test_the_schema_of_a_forced_call() -> None:
    point = {"$defs": {"P": {"type": "number"}}, "type": "object", "properties": {"x": {"$ref": "#/$defs/P"}}}
    one = call_schema([tool("go", point)])
    assert one["properties"]["name"] == {"const": "go"} and one["$defs"] == {"P": {"type": "number"}}
    assert "$defs" not in one["properties"]["arguments"] and "$defs" in point
    both = call_schema([tool("go", point), tool("stop")])
    assert [row["properties"]["name"]["const"] for row in both["anyOf"]] == ["go", "stop"]
    with pytest.raises(ConfigError, match="differently"):
        call_schema([tool("go", point), tool("run", {**point, "$defs": {"P": {"type": "string"}}})])


# ---- through HTTP ----------------------------------------------------------------------------------------------------

TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "add"}},
]
ASKED: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[Running]:
    with serving(engine, FakeEngine(text=ByteText(shows_tools=False), context=4096)) as running:
        yield running


@pytest.fixture
def client(server: Running, engine: FakeEngine) -> Iterator[httpx.Client]:
    engine.answer = lambda request: f"Let me look.\n<tool_call>\n{CALL}\n</tool_call>"
    engine.grammars.schemas.clear()
    with server.client() as client:
        yield client


def test_a_call_is_answered_as_a_call(client: httpx.Client, engine: FakeEngine) -> None:
    response = client.post("/v1/chat/completions", json=ASKED)
    choice = answers.ChatCompletion.model_validate_json(response.content, strict=True).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].function == DELFT
    assert choice.message.content == "Let me look.\n"
    _, tools = engine.text.seen[-1]
    assert [row["function"]["name"] for row in tools] == ["weather", "add"]


def test_a_call_is_streamed_as_a_call(client: httpx.Client) -> None:
    text = client.post("/v1/chat/completions", json={**ASKED, "stream": True}).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me look.\n"
    (calls,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["index"] == 0 and calls[0]["function"]["name"] == "weather" and calls[0]["id"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_without_tools_a_call_is_text(client: httpx.Client) -> None:
    for body in ({**ASKED, "tool_choice": "none"}, {**ASKED, "tools": []}):
        choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
        assert "<tool_call>" in choice["message"]["content"] and choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", ["weather", "add"]), ({"type": "function", "function": {"name": "add"}}, ["add"])],
)
def test_a_forced_call_has_a_grammar(choice: Any, names: list[str], client: httpx.Client, engine: FakeEngine) -> None:
    engine.answer = lambda request: json.dumps({"name": names[-1], "arguments": {"a": 1}})
    body = client.post("/v1/chat/completions", json={**ASKED, "tool_choice": choice}).json()
    assert body["choices"][0]["message"]["tool_calls"][0]["function"] == {"name": names[-1], "arguments": '{"a":1}'}
    assert body["choices"][0]["message"]["content"] is None
    (schema,) = engine.grammars.schemas
    rows = schema.get("anyOf", [schema])
    assert [row["properties"]["name"]["const"] for row in rows] == names
    assert engine.requests[-1].grammar.schema == schema


def test_a_template_that_knows_no_tools_is_told_in_words(client: httpx.Client, server: Running) -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    body = {**ASKED, "model": "fake-1", "messages": messages}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    seen, tools = server.state.models["fake-1"].engine.text.seen[-1]
    assert tools is None
    assert seen[0]["content"].startswith("Be kind.") and '"name":"weather"' in seen[0]["content"]
    assert seen[2] == {"role": "assistant", "content": '<tool_call>\n{"name":"add","arguments":{"a":1}}\n</tool_call>'}
    assert seen[3] == {"role": "user", "content": "<tool_response>\n3\n</tool_response>"}


def test_earlier_calls_reach_the_template_as_objects(client: httpx.Client, engine: FakeEngine) -> None:
    calls = [
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": text}} for text in ('{"a":1}', "x")
    ]
    messages = [*ASKED["messages"], {"role": "assistant", "tool_calls": calls}]
    client.post("/v1/chat/completions", json={**ASKED, "messages": messages})
    seen, _ = engine.text.seen[-1]
    assert [call["function"]["arguments"] for call in seen[-1]["tool_calls"]] == [{"a": 1}, "x"]


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}, {"type": "array"}),
    ],
)
def test_an_answer_keeps_to_its_form(form: Any, schema: Any, client: httpx.Client, engine: FakeEngine) -> None:
    body = {"model": "fake", "messages": ASKED["messages"], "response_format": form}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert engine.grammars.schemas == ([schema] if schema else [])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [], "response_format": {"type": "xml"}}, "response_format"),
        (
            {
                "tools": [],
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "nonsense"}},
                },
            },
            "response_format",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], param: str, client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json={**ASKED, **fields})
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_a_choice_without_tools_in_the_model_is_plain() -> None:
    body = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}]})
    assert body.tools is None and body.tool_choice is None
