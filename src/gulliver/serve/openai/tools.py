"""Tool calls: how tools are described to a model, and how its calls are parsed.

Models write calls in a few ways: <tool_call>{…}</tool_call> (Hermes, Qwen, SmolLM), [TOOL_CALLS][{…}] (Mistral), or an
answer that is nothing but {"name": …, "parameters": {…}} (Llama). All are read here. A call that must be made
(`tool_choice`) is forced by a grammar, and is then bare JSON of the third kind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import orjson

from gulliver.core.errors import ConfigError
from gulliver.serve.openai.request_schemas import Called, ChatRequest, Message, Tool

MARKS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
BEGINNINGS = [mark[:size] for mark in MARKS for size in range(1, len(mark))]
CLOSE = "</tool_call>"
_OPEN = re.compile(r"[{\[]")


class ToolReader:
    """Parts the stream of one answer into text and calls.

    From the first mark on, or from the first character when that begins JSON, everything is held until the end; a tail
    that may be the beginning of a mark is held until it is clear.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._held = ""
        self._begun = False
        self._holds = False

    def feed(self, text: str) -> str:
        """Take more of the answer; returns the text that is certain to be no call."""
        self._held += text
        if not self._begun:
            stripped = self._held.lstrip()
            self._begun = bool(stripped)
            self._holds = stripped.startswith(("{", "["))
        if not self._begun or self._holds:
            return ""
        marks = [place for mark in MARKS if (place := self._held.find(mark)) >= 0]
        self._holds = bool(marks)
        certain = min(marks) if marks else len(self._held) - _open_tail(self._held)
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def finish(self) -> tuple[str, list[Called]]:
        """At the end: the rest of the text, and the calls. Calls of unknown functions are text."""
        rest, self._held = self._held, ""
        return read_calls(rest, self._names) if self._holds else (rest, [])


def _open_tail(text: str) -> int:
    """Characters at the end that could be the beginning of a mark."""
    return max((len(beginning) for beginning in BEGINNINGS if text.endswith(beginning)), default=0)


def read_calls(text: str, names: Collection[str]) -> tuple[str, list[Called]]:
    """(text outside calls, calls). JSON that is not a call of one of `names` stays in the text."""
    decoder = json.JSONDecoder()
    calls: list[Called] = []
    kept: list[str] = []
    position = 0
    while position < len(text):
        opened = _OPEN.search(text, position)
        start = opened.start() if opened else len(text)
        mark = next((mark for mark in MARKS if text.startswith(mark, start)), None)
        if mark is not None:
            kept.append(text[position:start])
            position = start + len(mark)
            continue
        try:
            value, end = decoder.raw_decode(text, start)
            found = _calls(value, names)
        except (ValueError, RecursionError):
            kept.append(text[position:])
            break
        kept.append(text[position : start if found else end])
        calls += found
        position = end
    left = "".join(kept)
    if not calls:
        return text, []
    for mark in (*MARKS, CLOSE):
        left = left.replace(mark, "")
    return left.strip(), calls


def _calls(value: Any, names: Collection[str]) -> list[Called]:
    """The calls that a JSON value is; [] when any part of it is not a call. ValueError when not JSON, nor Unicode."""
    rows = value if isinstance(value, list) else [value]
    found = []
    for row in rows:
        if isinstance(row, dict) and isinstance(row.get("function"), dict):
            row = row["function"]
        name = row.get("name") if isinstance(row, dict) else None
        if not isinstance(name, str) or name not in names:
            return []
        arguments = row.get("arguments", row.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else _json(arguments)
        text.encode()  # ValueError: half a character (a lone surrogate) cannot be sent
        found.append(Called(name=name, arguments=text))
    return found


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def usable(body: ChatRequest) -> list[Tool]:
    """The tools that the model may call; none when tool_choice is "none"."""
    return list(body.tools or []) if body.tool_choice != "none" else []


def forced(body: ChatRequest) -> list[Tool]:
    """The tools of which one must be called; none when nothing is forced."""
    tools, choice = body.tools or [], body.tool_choice
    if isinstance(choice, Tool):
        return [tool for tool in tools if tool.function.name == choice.function.name]
    return list(tools) if choice == "required" else []


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """The JSON schema of one call of one of `tools`. ConfigError when definitions in their parameters collide."""
    fixed = {"type": "object", "required": ["name", "arguments"], "additionalProperties": False}
    calls: list[dict[str, Any]] = [
        {**fixed, "properties": {"name": {"const": tool.function.name}, "arguments": _parameters(tool)}}
        for tool in tools
    ]
    definitions: dict[str, dict[str, Any]] = {"$defs": {}, "definitions": {}}
    for call in calls:
        parameters = call["properties"]["arguments"]
        for place, known in definitions.items():
            rows = parameters.pop(place, None)
            for name, row in rows.items() if isinstance(rows, dict) else ():
                if known.setdefault(name, row) != row:
                    raise ConfigError(f"two tools define {place}/{name} differently; give them different names")
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return schema | {place: rows for place, rows in definitions.items() if rows}


def template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: plain text, "system" for "developer", arguments as objects."""
    row = message.model_dump(exclude={"content", "tool_calls"}, exclude_none=True) | {"content": message.text}
    if message.role == "developer":
        row["role"] = "system"
    if message.tool_calls:
        row["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": _object(call)}}
            for call in message.tool_calls
        ]
    return row


def _object(call: Any) -> Any:
    """The arguments as an object, where the text is one; the text itself where not."""
    try:
        value = orjson.loads(call.function.arguments)
    except orjson.JSONDecodeError:
        return call.function.arguments
    return value if isinstance(value, dict) else call.function.arguments


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as chat templates expect them."""
    rows = []
    for tool in tools:
        about = tool.function.model_dump(include={"name", "description"}, exclude_none=True)
        rows.append({"type": "function", "function": {**about, "parameters": _parameters(tool)}})
    return rows


def _parameters(tool: Tool) -> dict[str, Any]:
    return dict(tool.function.parameters or {"type": "object", "properties": {}})


def told_of_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The messages for a template that knows no tools: they are described in the system message instead."""
    rows = "\n".join(_json(row) for row in template_tools(tools))
    told = (
        "You may call functions. They are given as JSON schemas inside <tools></tools>:\n"
        f"<tools>\n{rows}\n</tools>\n"
        "To call one, answer with its name and arguments as JSON inside <tool_call></tool_call>:\n"
        '<tool_call>\n{"name": "NAME", "arguments": {}}\n</tool_call>'
    )
    plain = [_without_calls(message) for message in messages]
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{told}"}, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def _without_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its calls, or its answer to one, written into its text, for a template that would drop them."""
    row = {key: value for key, value in message.items() if key in ("role", "content", "name")}
    calls = message.get("tool_calls")
    if calls:
        written = [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in calls]
        marked = "\n".join(f"<tool_call>\n{_json(call)}\n</tool_call>" for call in written)
        row["content"] = f"{row['content']}\n{marked}".strip()
    if row["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{row['content']}\n</tool_response>"}
    return row
