"""The list of attacks in short, on a server without a model: nothing hangs, and no status is 5xx but 503 and 504.

`make attack` runs the same list with many attempts each on a real model, beside a steady stream.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest
from attack.__main__ import faults, run
from attack.client import HUNG, request, sends, tried
from attack.rows import ATTACKS, Attack
from http_samples import FakeEngine, Running, serving

from gulliver.serve import connections
from gulliver.serve.state import Settings


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    settings = Settings(head_seconds=0.3, body_seconds=0.3, write_seconds=0.5, max_body_bytes=200_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "UNREAD_SECONDS", 0.3)
        with serving(FakeEngine(answer=lambda request: "ok " * 100, context=4096), settings=settings) as running:
            yield running


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.name.replace(" ", "-") for attack in ATTACKS])
def test_an_attack_is_held(attack: Attack, server: Running) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    outcomes = asyncio.run(run(attack, port, 0.0, 1))
    assert not faults(outcomes, 0.0, 0.0, True), outcomes
    assert asyncio.run(tried(sends(request("GET", "/healthz")), port, 0)) == 200


def test_harm_is_seen() -> None:
    assert not faults(Counter({200: 9, 503: 1, 504: 1, 0: 3}), 5.0, 50e6, True)
    told = faults(Counter({500: 1, 502: 1, HUNG: 1}), 5.1, 51e6, False)
    assert told == ["status 500", "status 502", "hung", "the server stands still", "p99 x5.1", "memory +51 MB"]
    assert len(ATTACKS) >= 40
