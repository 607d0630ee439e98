"""The attacks, a row each. A new one is a row here; what it needs beyond bytes is a function of client.py.

`needs`: what of a server it is aimed at, beside HTTP: "template" a model whose chat template is hostile (HOSTILE),
"grammar" a model that compiles schemas. Without it the request is refused earlier, which must hold too.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attack.client import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    Act,
    drips,
    floods,
    holds,
    leaves,
    never_reads,
    posted,
    request,
    sends,
)

MODEL = "fake"
MEGABYTE = 10**6
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
HOSTILE = (
    "{% set word = messages[0]['content'] %}"
    "{% if word == 'loop' %}" + "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3 + "{% endif %}"
    "{% if word == 'grow' %}{% set ns = namespace(s='xxxxxxxx') %}"
    "{% for a in range(32) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}{% endif %}"
    "{% if word == 'times' %}{{ 'x' * 9999999999 }}{% endif %}"
    "{% if word == 'power' %}{{ 9 ** 9 ** 9 }}{% endif %}"
    "{% if word == 'pad' %}{{ '%99999999999d' % 1 }}{% endif %}"
    "{% if word == 'deep' %}{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}{% endif %}"
) + PLAIN
"""A chat template that does harm at a word, so that loading the model and first tries look healthy."""


@dataclass(frozen=True)
class Attack:
    """A row of the table. `workers`: how many attempts at one time."""

    name: str
    act: Act
    needs: str = ""
    workers: int = 4


def chat(**fields: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **fields}


def schema(make: Callable[[int], Any]) -> Act:
    """Asks for an answer by a schema, another one each time."""

    def body(number: int) -> bytes:
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": make(number)}}
        return posted(CHAT, chat(response_format=form))

    return sends(body)


def raw_schema(text: bytes) -> Act:
    """The same with bytes, where json could not write it."""
    form = b'"response_format":{"type":"json_schema","json_schema":{"name":"n","schema":' + text + b"}}"
    return sends(posted(CHAT, b'{"model":"fake","messages":[{"role":"user","content":"hi"}],' + form + b"}"))


def word(content: str) -> Act:
    """A chat request that wakes a hostile template."""
    return sends(posted(CHAT, {"model": "hostile", "messages": [{"role": "user", "content": content}]}))


def raw_chat(fields: bytes) -> Act:
    """A chat request with more fields, as bytes."""
    return sends(posted(CHAT, b'{"model":"fake","messages":[{"role":"user","content":"hi"}],"max_tokens":2,' + fields))


def nested(number: int, depth: int = 400) -> Any:
    """A schema within a schema."""
    found: Any = {"type": "string", "maxLength": 3 + number}
    for _ in range(depth):
        found = {"type": "object", "properties": {"a": found}, "required": ["a"]}
    return found


def words(number: int, count: int) -> list[str]:
    """Random words, others for each number."""
    digits = random.Random(number).randbytes(30 * count).hex()
    return [digits[place : place + 60] for place in range(0, len(digits), 60)]


HEAD = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
LONG = {"model": MODEL, "prompt": "a", "max_tokens": 100_000, "ignore_eos": True}
STREAM = posted(COMPLETIONS, {**LONG, "stream": True})

CONNECTIONS = (
    Attack("a header without end", floods(HEAD + b"x: ", b"a" * 2**18, 60 * MEGABYTE)),
    Attack("many headers", sends(HEAD + b"x: y\r\n" * 100_000 + b"\r\n")),
    Attack("a long path", sends(request("GET", "/" + "a" * 100_000))),
    Attack("a long query", sends(request("GET", "/v1/models?" + "a=b&" * 100_000))),
    Attack("a slow head", drips(HEAD + b"x: ", b"a"), workers=32),
    Attack("half-open connections", holds(b"GET / HT", 300), workers=1),
    Attack("idle connections", holds(b"", 300), workers=1),
    Attack("connections that are kept", holds(HEAD + b"\r\n", 300), workers=1),
    Attack("blank lines without end", floods(b"", b"\r\n" * 2**15, 20 * MEGABYTE)),
    Attack("TLS where HTTP is spoken", sends(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x55" * 500)),
    Attack("random bytes", sends(lambda number: random.Random(number).randbytes(2000) + b"\r\n\r\n")),
    Attack("unknown methods", sends(lambda number: request(f"X{number}", "/v1/models"))),
    Attack("CONNECT", sends(b"CONNECT evil.example:443 HTTP/1.1\r\nhost: localhost\r\n\r\n")),
    Attack("another protocol", sends(HEAD + b"connection: upgrade\r\nupgrade: websocket\r\n\r\n")),
    Attack("requests sent ahead", sends(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n" * 5000)),
    Attack("paths out of the page", sends(request("GET", "/..%2f..%2f..%2fetc%2fpasswd"))),
    Attack("paths that are counted", sends(lambda number: request("GET", f"/v1/{random.Random(number).random()}"))),
    Attack("a foreign host", sends(request("GET", "/v1/models", host="rebind.evil.example"))),
    Attack("a foreign page", sends(posted(COMPLETIONS, LONG, origin="http://evil.example", content_type="text/plain"))),
    Attack("no host", sends(posted(COMPLETIONS, LONG, host=""))),
)
BODIES = (
    Attack("a slow body", drips(POST + b"content-length: 100000\r\n\r\n", b"a"), workers=32),
    Attack("a body that does not come", sends(POST + b"content-length: 1000\r\nexpect: 100-continue\r\n\r\n")),
    Attack("a body cut short", leaves(POST + b"content-length: 1000\r\n\r\n{", 0)),
    Attack("a length beyond all", sends(POST + b"content-length: 99999999999\r\n\r\n{")),
    Attack("two lengths", sends(POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\n{}")),
    Attack("a length and chunks", sends(POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")),
    Attack("a body beyond the limit", floods(CHUNKED, b"40000\r\n" + b"a" * 2**18 + b"\r\n", 20 * MEGABYTE)),
    Attack(
        "a body of a GET", floods(HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\na\r\n" * 9999, 40 * MEGABYTE)
    ),
    Attack("tiny chunks", floods(CHUNKED, b"1\r\n \r\n" * 9999, 40 * MEGABYTE)),
    Attack("marks of chunks without end", floods(CHUNKED + b"1;", b"x" * 2**18, 40 * MEGABYTE)),
    Attack("headers after a body", floods(CHUNKED + b"2\r\n{}\r\n0\r\n", b"x: y\r\n" * 9999, 40 * MEGABYTE)),
    Attack("a chunk of no size", sends(CHUNKED + b"zz\r\n")),
    Attack("a body in gzip", sends(posted(COMPLETIONS, gzip.compress(bytes(50 * MEGABYTE)), content_encoding="gzip"))),
    Attack("streams that are left", leaves(STREAM, 200), workers=16),
    Attack("streams that nobody reads", never_reads(STREAM), workers=8),
    Attack("a stream with a request behind it", leaves(STREAM.replace(b"close", b"keep-alive") + HEAD + b"\r\n", 200)),
)
JSON = (
    Attack("deep arrays", sends(posted(CHAT, b"[" * MEGABYTE))),
    Attack("deep objects", sends(posted(CHAT, b'{"a":' * 200_000))),
    Attack("bytes that are no UTF-8", sends(posted(CHAT, b'{"model":"\xff\xfe\xed\xa0\x80"}'))),
    Attack("half characters", raw_chat(b'"user":"\\ud800"}')),
    Attack("a zero byte", raw_chat(b'"user":"\\u0000"}')),
    Attack("a number of a million digits", raw_chat(b'"seed":' + b"9" * MEGABYTE + b"}")),
    Attack("numbers beyond all", raw_chat(b'"temperature":1e999,"max_tokens":18446744073709551616}')),
    Attack("numbers that are none", raw_chat(b'"temperature":NaN,"top_p":Infinity}')),
    Attack("one field twice", raw_chat(b'"model":"x","model":"fake"}')),
    Attack("unknown fields", raw_chat(b",".join(b'"f%d":0' % place for place in range(200_000)) + b"}")),
    Attack("text without end", raw_chat(b'"user":"' + b"a" * 3 * MEGABYTE)),
    Attack("a list of mistakes", sends(posted(CHAT, chat(messages=[{"role": "user", "content": [0] * MEGABYTE}])))),
    Attack(
        "calls that are mistakes", sends(posted(CHAT, chat(messages=[{"role": "user", "tool_calls": [0] * 500_000}])))
    ),
    Attack("stops that are mistakes", sends(posted(COMPLETIONS, {**LONG, "stop": [0] * MEGABYTE}))),
    Attack("biases that are mistakes", sends(posted(CHAT, chat(logit_bias={f"x{n}": 1 for n in range(200_000)})))),
    Attack("a deep tree that is kept", raw_chat(b'"metadata":' + b"[" * 900 + b"]" * 900 + b"}")),
)
REQUESTS = (
    Attack("a giant prompt of words", sends(posted(COMPLETIONS, {"model": MODEL, "prompt": "a " * 1_900_000}))),
    Attack("a giant prompt of one word", sends(posted(COMPLETIONS, {"model": MODEL, "prompt": "a" * 3_900_000}))),
    Attack("a giant message", sends(posted(CHAT, chat(messages=[{"role": "user", "content": "é" * 300_000}])))),
    Attack("a giant prompt of tokens", sends(posted(COMPLETIONS, {"model": MODEL, "prompt": [1] * MEGABYTE}))),
    Attack("a giant text to embed", sends(posted(EMBEDDINGS, {"model": MODEL, "input": ["a " * 1000] * 1500}))),
    Attack("many messages", sends(posted(CHAT, chat(messages=[{"role": "user", "content": "x"}] * 90_000)))),
    Attack(
        "many parts",
        sends(posted(CHAT, chat(messages=[{"role": "user", "content": [{"type": "text", "text": ""}] * 90_000}]))),
    ),
    Attack("many answers", sends(posted(COMPLETIONS, {**LONG, "n": 128, "max_tokens": 20}))),
    Attack("many prompts", sends(posted(COMPLETIONS, {**LONG, "prompt": ["a"] * 128, "max_tokens": 20}))),
    Attack("many probabilities", sends(posted(CHAT, chat(logprobs=True, top_logprobs=20, n=32, max_tokens=60)))),
    Attack(
        "long stops",
        sends(posted(COMPLETIONS, {**LONG, "stop": ["a" * 200_000 + str(n) for n in range(16)], "max_tokens": 20})),
    ),
    Attack("an unknown model of a long name", sends(posted(CHAT, {**chat(), "model": "m" * MEGABYTE}))),
    Attack(
        "tools without end",
        sends(posted(CHAT, chat(tools=[{"type": "function", "function": {"name": f"f{n}"}} for n in range(20_000)]))),
    ),
)
GRAMMARS = (
    Attack("a text of a billion", schema(lambda n: {"type": "string", "maxLength": 10**9 + n}), "grammar"),
    Attack("a list of a billion", schema(lambda n: {"type": "array", "minItems": 10**9 + n, "items": {}}), "grammar"),
    Attack(
        "a pattern of patterns",
        schema(lambda n: {"type": "string", "pattern": f"((a{{1,999}}){{1,999}}){{1,{99 + n}}}"}),
        "grammar",
    ),
    Attack(
        "a pattern that goes back", schema(lambda n: {"type": "string", "pattern": "(a|a?)+" * 40 + str(n)}), "grammar"
    ),
    Attack(
        "many properties",
        schema(lambda n: {"type": "object", "properties": {f"{n}-{p}": {} for p in range(20_000)}}),
        "grammar",
    ),
    Attack("many words", schema(lambda n: {"enum": words(n, 30_000)}), "grammar"),
    Attack("a deep schema", schema(nested), "grammar"),
    Attack("a bottomless schema", raw_schema(b'{"not":' * 900 + b"{}" + b"}" * 900), "grammar"),
    Attack(
        "a schema of itself",
        schema(lambda n: {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}] * 3}, "n": n}}),
        "grammar",
    ),
    Attack(
        "either of many",
        schema(
            lambda n: {"anyOf": [{"type": "object", "properties": {f"p{n}{p}": nested(p, 3)}} for p in range(2000)]}
        ),
        "grammar",
    ),
    Attack(
        "other schemas each time",
        schema(lambda n: {"type": "object", "properties": {f"p{n}": {"type": "string"}}}),
        "grammar",
    ),
    Attack(
        "tools that are forced",
        sends(
            lambda n: posted(
                CHAT,
                chat(
                    tool_choice="required",
                    tools=[{"type": "function", "function": {"name": "f", "parameters": {"enum": words(n, 20_000)}}}],
                ),
            )
        ),
        "grammar",
    ),
)
TEMPLATES = tuple(
    Attack(f"a template: {content}", word(content), "template", workers=1)
    for content in ("loop", "grow", "times", "power", "pad", "deep")
)
ATTACKS = (*CONNECTIONS, *BODIES, *JSON, *REQUESTS, *GRAMMARS, *TEMPLATES)
assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)
