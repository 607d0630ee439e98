"""Ways to change a valid file into one that a stranger could write: bytes, JSON values, tokens of a text."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    10**4,
    10**6,
    10**9,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**60,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *(None, True, False, 0.5, -0.0, 1e308, float("inf"), float("nan"), 10**400),
    *("", "x", "x" * 5000, "../../../etc/passwd", "/dev/zero", "\ud800", "\x00", "{{ 1 }}", "é漢🚀"),
    *([], {}, [[]], [0] * 1000, {"a": {"a": {}}}, [None], ["x"], {"": ""}),
)
Mutation = Callable[[random.Random, bytes], bytes]


# ---- bytes ----------------------------------------------------------------------------------------------------------
def flip(rng: random.Random, data: bytes) -> bytes:
    """Some bits are others."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[_place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def number(rng: random.Random, data: bytes) -> bytes:
    """A number of one to eight bytes is another: a length, a count, an offset or a type."""
    size, code = rng.choice(((1, "B"), (2, "<H"), (4, "<I"), (8, "<Q")))
    at = _place(rng, data)
    return data[:at] + struct.pack(code, rng.choice(NUMBERS) % (1 << 8 * size)) + data[at + size :]


def cut(rng: random.Random, data: bytes) -> bytes:
    """The file ends too early, or a piece of it is missing."""
    at = _place(rng, data)
    return data[:at] if rng.random() < 0.5 else data[:at] + data[at + rng.randrange(1, 64) :]


def repeat(rng: random.Random, data: bytes) -> bytes:
    """A piece is there several times."""
    at, size = _place(rng, data), rng.choice((1, 4, 16, 64, 256))
    return data[:at] + data[at : at + size] * rng.choice((2, 3, 100)) + data[at + size :]


def swap(rng: random.Random, data: bytes) -> bytes:
    """Two pieces change places."""
    one, other = sorted((_place(rng, data), _place(rng, data)))
    size = min(rng.choice((1, 4, 8, 32)), other - one)
    return (
        data[:one]
        + data[other : other + size]
        + data[one + size : other]
        + data[one : one + size]
        + data[other + size :]
    )


def insert(rng: random.Random, data: bytes) -> bytes:
    """Bytes that were not there."""
    at = _place(rng, data)
    return data[:at] + rng.randbytes(rng.choice((1, 4, 8, 100))) + data[at:]


def _place(rng: random.Random, data: bytes) -> int:
    """A place in the data; often near the beginning, where headers are."""
    return rng.randrange(max(1, min(len(data), 400) if rng.random() < 0.5 else len(data)))


BYTES: tuple[Mutation, ...] = (flip, number, number, cut, repeat, swap, insert)


# ---- JSON -----------------------------------------------------------------------------------------------------------
def json_value(rng: random.Random, data: bytes) -> bytes:
    """One to three values of a JSON text are others, missing, nested or moved."""
    body = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        inside, key = _spot(rng, body)
        if inside is None:
            continue
        way = rng.randrange(8)
        if way < 4:
            inside[key] = copy.deepcopy(rng.choice(VALUES))
        elif way == 4:
            del inside[key]
        elif way == 5:
            inside[key] = [inside[key]] * rng.choice((1, 2, 1000))
        elif way == 6:
            inside[key] = {"a": inside[key]}
        else:
            other, place = _spot(rng, body)
            if other is not None:
                inside[key] = copy.deepcopy(other[place])
    text = json.dumps(body)
    if rng.random() < 0.1:
        text = text.replace(rng.choice(("1", "0", "null", '"')), rng.choice(("[" * 3000, "1" * 5000, "{", "-", '"')), 1)
    return text.encode()


def _spot(rng: random.Random, body: Any) -> tuple[Any, Any]:
    """(container, key or index) of a value somewhere in a JSON body; (None, None) where there is none."""
    inside, key = None, None
    while isinstance(body, dict | list) and body and (inside is None or rng.random() < 0.8):
        inside, key = body, rng.choice(list(body)) if isinstance(body, dict) else rng.randrange(len(body))
        body = inside[key]
    return inside, key


JSON: tuple[Mutation, ...] = (json_value, json_value, json_value, json_value, *BYTES[:4])


# ---- text -----------------------------------------------------------------------------------------------------------
def tokens(words: Sequence[str]) -> tuple[Mutation, ...]:
    """Mutations of a text with what its language is made of."""

    def splice(rng: random.Random, data: bytes) -> bytes:
        text = data.decode("utf-8", "replace")
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(len(text) + 1)
            word = rng.choice((*words, *map(str, NUMBERS)))
            text = text[:at] + word * rng.choice((1, 1, 1, 2, 50, 3000)) + text[at + rng.choice((0, 0, 1, 5)) :]
        return text.encode("utf-8", "replace")

    def lines(rng: random.Random, data: bytes) -> bytes:
        rows = data.split(b"\n")
        at = rng.randrange(len(rows))
        way = rng.randrange(4)
        if way == 0:
            del rows[at]
        elif way == 1:
            rows[at:at] = [rows[at]] * rng.choice((1, 5, 500))
        elif way == 2:
            rows[at], rows[-1] = rows[-1], rows[at]
        else:
            rows[at] += rng.choice(rows)
        return b"\n".join(rows)

    def replaced(rng: random.Random, data: bytes) -> bytes:
        found = rng.choice([word for word in (*words, *"0123456789") if word.encode() in data] or ["\n"])
        return data.replace(found.encode(), rng.choice(words).encode(), rng.choice((1, 1, -1)))

    return (splice, splice, splice, lines, replaced, *BYTES[:4])
