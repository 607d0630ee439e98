#!/usr/bin/env python3
"""Clients of a streaming completion server, in a process of its own: as light as can be, the same for every server.

    python benchmarks/runtime_client.py --port 8000 --model NAME burst --streams 16 --tokens 128 --words 32
    python benchmarks/runtime_client.py --port 8000 --model NAME load --clients 200 --seconds 180 --killed 0.1

`burst` starts all streams at once and waits for all. `load` keeps every client asking, one request after the other,
and breaks off a share of the requests after some tokens by closing the connection. Requests go to /v1/completions with
streaming, greedy unless `--temperature` says otherwise; tokens are counted from `usage`, and a stream counts as whole
when it ends with `data: [DONE]`. One JSON line is printed; `cpu_share` is what these clients took of one core, to judge
whether they were in the way. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import time
from dataclasses import dataclass

from runtime_common import quantile, summary, text_of

USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
LONGEST_WAIT_SECONDS = 30.0
ANSWER_SECONDS = 300.0


@dataclass(frozen=True)
class Outcome:
    """One request. `kind`: done, killed (by us), busy (429), or an error in words."""

    kind: str
    tokens: int = 0
    first_token_seconds: float | None = None
    seconds: float = 0.0
    retry_after_seconds: float = 1.0


class Stream(asyncio.Protocol):
    """One streamed completion over its own connection; `outcome` is done when it ended in one way or another."""

    def __init__(self, request: bytes, killed_after: int | None) -> None:
        self._request, self._killed_after = request, killed_after
        self._pieces: list[bytes] = []
        self._events, self._first = 0, None
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._began = transport, time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._pieces.append(data)
        if self._first is None and has_text(b"".join(self._pieces)):
            self._first = time.perf_counter() - self._began
        if self._first is not None and self._killed_after is not None:
            self._events += data.count(b"\n\n")
            if self._events >= self._killed_after:
                self._settle(Outcome("killed", 0, self._first, time.perf_counter() - self._began))
                self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.outcome.done():
            seconds = time.perf_counter() - self._began
            self._settle(outcome_of(b"".join(self._pieces), self._first, seconds, error))

    def _settle(self, outcome: Outcome) -> None:
        if not self.outcome.done():
            self.outcome.set_result(outcome)


def has_text(stream: bytes) -> bool:
    """Whether the events so far hold a character of text. (The first event may hold none: half of a character.)"""
    return any(choice.get("text") for event in events_of(stream) for choice in event.get("choices", ()))


def events_of(stream: bytes) -> list[dict]:
    """The whole JSON events of a response whose head may not be whole yet."""
    _, _, body = stream.partition(b"\r\n\r\n")
    found = []
    for line in unchunked(body).split(b"\n"):
        if line.startswith(b"data: {"):
            try:
                found.append(json.loads(line[6:]))
            except ValueError:  # the end has not arrived
                break
    return found


def unchunked(body: bytes) -> bytes:
    """A body in HTTP/1.1 chunks without their frames; a body that has none comes back as it is."""
    out, place = [], 0
    while place < len(body):
        end = body.find(b"\r\n", place)
        size = body[place : max(end, place)].split(b";")[0].strip()
        try:
            length = int(size, 16)
        except ValueError:
            return body if place == 0 else b"".join(out)
        out.append(body[end + 2 : end + 2 + length])
        place = end + 4 + length
    return b"".join(out)


def outcome_of(stream: bytes, first: float | None, seconds: float, error: Exception | None) -> Outcome:
    """What a response that has ended amounts to."""
    head, _, body = stream.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    if status == 429:
        found = re.search(rb"(?im)^retry-after:\s*([0-9.]+)", head)
        return Outcome("busy", seconds=seconds, retry_after_seconds=float(found[1]) if found else 1.0)
    if status != 200:
        return Outcome(f"status {status}" if status else f"no answer: {error or 'the connection was closed'}")
    text = unchunked(body)
    usage = USAGE.findall(text)
    if not text.rstrip().endswith(b"data: [DONE]"):
        return Outcome("the stream ended without [DONE]", first_token_seconds=first, seconds=seconds)
    if b'data: {"error"' in text:
        return Outcome("an error event in the stream", first_token_seconds=first, seconds=seconds)
    if not usage or first is None:
        return Outcome("the stream has no usage or no text", first_token_seconds=first, seconds=seconds)
    return Outcome("done", int(usage[-1]), first, seconds)


def request_bytes(args: argparse.Namespace, prompt: str, tokens: int) -> bytes:
    """The HTTP request of one completion."""
    body = {
        "model": args.model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": args.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    text = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(text)}\r\n\r\n"
    )
    return head.encode() + text


async def ask(args: argparse.Namespace, prompt: str, tokens: int, killed_after: int | None = None) -> Outcome:
    """One request and what became of it."""
    request = request_bytes(args, prompt, tokens)
    try:
        transport, stream = await asyncio.get_running_loop().create_connection(
            lambda: Stream(request, killed_after), "127.0.0.1", args.port
        )
    except OSError as error:
        return Outcome(f"no connection: {error.strerror or error}")
    try:
        return await asyncio.wait_for(stream.outcome, ANSWER_SECONDS)
    except TimeoutError:
        return Outcome(f"no end after {ANSWER_SECONDS:.0f} s")
    finally:
        transport.abort()


# ---- burst ----------------------------------------------------------------------------------------------------------
async def burst(args: argparse.Namespace) -> dict:
    """All streams at once: total tokens per second, from the first request to the last token."""
    prompts = [text_of(args.words, 1000 * args.seed + index) for index in range(args.streams)]
    began = time.perf_counter()
    outcomes = await asyncio.gather(*(ask(args, prompt, args.tokens) for prompt in prompts))
    seconds = time.perf_counter() - began
    wrong = [one.kind for one in outcomes if one.kind != "done" or one.tokens != args.tokens]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {args.streams} streams failed: {wrong[0]}")
    firsts = [one.first_token_seconds for one in outcomes if one.first_token_seconds is not None]
    tokens = sum(one.tokens for one in outcomes)
    return {
        "tokens_s": tokens / seconds,
        "seconds": seconds,
        "tokens": tokens,
        "first_token_seconds": summary(firsts),
    }


# ---- load -----------------------------------------------------------------------------------------------------------
async def load(args: argparse.Namespace) -> dict:
    """Every client asks until the time is over; those still in progress then are let finish."""
    until = time.perf_counter() + args.seconds
    answers = await asyncio.gather(*(_client(args, number, until) for number in range(args.clients)))
    outcomes = [one for many in answers for one in many]
    kinds: dict[str, int] = {}
    for one in outcomes:
        kinds[one.kind] = kinds.get(one.kind, 0) + 1
    firsts = [one.first_token_seconds for one in outcomes if one.first_token_seconds is not None]
    if not firsts:
        raise SystemExit(f"no request was admitted: {kinds}")
    median, late = quantile(firsts, 0.5), quantile(firsts, 0.99)
    known = ("done", "killed", "busy")
    return {
        "outcomes": kinds,
        "errors": sum(count for kind, count in kinds.items() if kind not in known),
        "tokens": sum(one.tokens for one in outcomes),
        "admitted": len(firsts),
        "first_token_seconds": {"median": median, "p99": late, "most": max(firsts)},
        "p99_over_median": late / median,
    }


async def _client(args: argparse.Namespace, number: int, until: float) -> list[Outcome]:
    """One client: prompts of 4 to 200 words (most are short), 16 to 128 tokens."""
    chance, outcomes = random.Random(args.seed * 100_003 + number), []
    await asyncio.sleep(chance.random())  # not all in the same millisecond
    while time.perf_counter() < until:
        words = min(200, int(4 * (1 - chance.random()) ** -1.2))
        tokens = chance.randrange(16, 129)
        killed_after = chance.randrange(1, 12) if chance.random() < args.killed else None
        outcome = await ask(args, text_of(words, chance.randrange(10**9)), tokens, killed_after)
        outcomes.append(outcome)
        if outcome.kind == "busy":
            wait = min(outcome.retry_after_seconds, LONGEST_WAIT_SECONDS) * (1 + chance.random())
            await asyncio.sleep(min(wait, max(0.0, until - time.perf_counter())))
        elif outcome.kind not in ("done", "killed"):
            await asyncio.sleep(0.5)
    return outcomes


PARTS = {"burst": burst, "load": load}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="default", help="the model's name at the server")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--temperature", type=float, default=0.0)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("burst", help=burst.__doc__)
    one.add_argument("--streams", type=int, default=16)
    one.add_argument("--tokens", type=int, default=128)
    one.add_argument("--words", type=int, default=32, help="length of a prompt")
    one = parts.add_parser("load", help=load.__doc__)
    one.add_argument("--clients", type=int, default=200)
    one.add_argument("--seconds", type=float, default=180.0)
    one.add_argument("--killed", type=float, default=0.1, help="share of the requests that are broken off")
    args = parser.parse_args()
    wall, cpu = time.perf_counter(), time.process_time()
    found = asyncio.run(PARTS[args.part](args))
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    print(json.dumps({**found, "cpu_share": round(share, 4)}))


if __name__ == "__main__":
    main()
