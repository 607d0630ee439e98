"""API keys at rest, and the buckets behind their limits."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gulliver.core.errors import ConfigError
from gulliver.core.store.files import file_lock
from gulliver.serve import keys
from gulliver.serve.keys import Bucket, Caller, Key, KeyRing, add_key, hash_key, read_keys, remove_key


def test_a_key_is_kept_as_a_hash_alone(tmp_path: Path) -> None:
    path = tmp_path / "below" / "keys.json"
    key = add_key(path, "ann", requests_per_minute=5)
    assert key.startswith("gk-") and len(key) >= 43
    assert key not in path.read_text() and hash_key(key) in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_keys(path) == [Key(name="ann", sha256=hash_key(key), requests_per_minute=5)]
    assert add_key(path, "bob") != key


def test_a_ring_finds_whose_key_it_is(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secrets = {name: add_key(path, name) for name in ("ann", "bob")}
    ring = KeyRing(path, print)
    for name, secret in secrets.items():
        caller = ring.find(secret)
        assert caller is not None and caller.key.name == name
    for wrong in (
        "",
        "gk-",
        secrets["ann"][:-1],
        secrets["ann"] + "x",
        hash_key(secrets["ann"]),
        "x" * 10_000,
        "\udc80",
    ):
        assert ring.find(wrong) is None


def test_every_hash_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    first = add_key(path, "ann")
    add_key(path, "bob")
    ring = KeyRing(path, print)
    compared: list[str] = []
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda one, other: compared.append(other) or one == other)
    ring.find(first)
    assert len(compared) == 2


def test_a_changed_file_keeps_the_debts_of_keys_that_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "REREAD_SECONDS", 0.0)
    path = tmp_path / "keys.json"
    secret = add_key(path, "ann", tokens_per_minute=10)
    ring = KeyRing(path, print)
    caller = ring.find(secret)
    assert caller is not None
    caller.charge(1000)
    bob = add_key(path, "bob")
    assert ring.find(secret) is caller and ring.find(bob) is not None


def test_names_come_once_and_go(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "ann")
    with pytest.raises(ConfigError, match="already has a key named 'ann'"):
        add_key(path, "ann")
    with pytest.raises(ConfigError, match="it has: ann"):
        remove_key(path, "bob")
    with pytest.raises(ConfigError, match="not a valid key name"):
        add_key(path, "a\nb")
    with pytest.raises(ConfigError, match="requests_per_minute: Input should be greater than or equal to 1"):
        add_key(path, "bob", requests_per_minute=0)
    remove_key(path, "ann")
    assert read_keys(path) == []


GOOD = {"name": "ann", "sha256": "0" * 64}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"format": 2, "keys": []}',
        b'{"format": 1, "keys": {}}',
        b"\xff",
        b"[" * 100_000,
        json.dumps({"format": 1, "keys": [GOOD, GOOD]}).encode(),
        *(
            json.dumps({"format": 1, "keys": [row]}).encode()
            for row in (
                1,
                {},
                {"name": "ann"},
                GOOD | {"sha256": "0" * 63},
                GOOD | {"sha256": 5},
                GOOD | {"name": ""},
                GOOD | {"other": 1},
                GOOD | {"requests_per_minute": True},
                GOOD | {"tokens_per_minute": -1},
            )
        ),
    ],
)
def test_a_file_that_is_wrong_is_refused(body: bytes, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(body)
    with pytest.raises(ConfigError):
        KeyRing(path, print)


def test_a_key_written_by_mistake_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    for rows in (["gk-secret"], [GOOD | {"sha256": "gk-secret"}]):
        path.write_text(json.dumps({"format": 1, "keys": rows}))
        with pytest.raises(ConfigError, match=r"keys\.0.*should") as caught:
            read_keys(path)
        assert "secret" not in str(caught.value)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gulliver keys .*nothing\.json --add NAME"):
        KeyRing(tmp_path / "nothing.json", print)


# ---- buckets ---------------------------------------------------------------------------------------------------------


def test_a_bucket_fills_at_its_rate_and_holds_a_minutes_worth() -> None:
    now = [0.0]
    bucket = Bucket(60, lambda: now[0])
    bucket.take(60)
    assert bucket.seconds_until(1) == pytest.approx(1)
    now[0] = 30
    assert bucket.level() == pytest.approx(30) and bucket.seconds_until(30) == 0
    now[0] = 10_000
    assert bucket.level() == 60


def limited(requests: int | None, tokens: int | None, clock: Callable[[], float] = time.monotonic) -> Caller:
    return Caller(Key(**GOOD, requests_per_minute=requests, tokens_per_minute=tokens), clock)


def test_a_debt_of_tokens_must_be_paid_first() -> None:
    now = [0.0]
    limiter = limited(None, 60, lambda: now[0])
    assert limiter.admit() is None
    limiter.charge(180)
    assert limiter.admit() == ("tokens", pytest.approx(121))
    now[0] = 121
    assert limiter.admit() is None


def test_a_refused_request_is_not_counted() -> None:
    now = [0.0]
    limiter = limited(1, None, lambda: now[0])
    assert limiter.admit() is None
    for _ in range(5):
        assert limiter.admit() == ("requests", pytest.approx(60))
    now[0] = 60.001
    assert limiter.admit() is None
    assert limited(None, None).admit() is None


@given(st.integers(1, 500), st.lists(st.tuples(st.floats(0, 30), st.integers(0, 400)), max_size=60))
def test_over_time_no_more_tokens_pass_than_the_rate_allows(rate: int, events: list[tuple[float, int]]) -> None:
    now = [0.0]
    limiter = limited(None, rate, lambda: now[0])
    passed, last = 0, 0
    for wait, tokens in events:
        now[0] += wait
        if limiter.admit() is None:
            limiter.charge(tokens)
            passed, last = passed + tokens, tokens
    assert passed - last <= rate + rate * now[0] / 60 + 1e-6


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_keys_command(tmp_path: Path, command: Callable[..., Any]) -> None:
    path = tmp_path / "keys.json"
    code, shown, _ = command("keys", path, "--add", "ann", "--tokens-per-minute", "100", "--json")
    made = json.loads(shown)
    assert code == 0 and read_keys(path)[0].sha256 == hash_key(made["key"])
    code, shown, _ = command("keys", path)
    assert code == 0 and shown == "ann: any number of requests, 100 tokens a minute\n"
    assert command("keys", path, "--add", "ann")[0] == 2
    assert command("keys", path, "--add", "bob", "--remove", "ann")[0] == 2
    assert command("keys", path, "--requests-per-minute", "3")[0] == 2
    code, shown, _ = command("keys", path, "--remove", "ann")
    assert code == 0 and command("keys", path)[1] == "no keys yet\n"


# ---- the file among processes ----------------------------------------------------------------------------------------


def test_keys_that_are_added_at_once_are_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"

    def slowly(path: Path, read: Callable[[Path], list[Key]] = keys.read_keys) -> list[Key]:
        found = read(path)
        time.sleep(0.01)  # in which another would read the same
        return found

    monkeypatch.setattr(keys, "read_keys", slowly)
    names = [f"user{number}" for number in range(12)]
    with ThreadPoolExecutor(12) as pool:  # the lock is of the opened file, so that threads stand for processes
        secrets = dict(zip(names, pool.map(lambda name: add_key(path, name), names), strict=True))
        assert {key.name: key.sha256 for key in read_keys(path)} == {
            name: hash_key(secret) for name, secret in secrets.items()
        }
        list(pool.map(lambda name: remove_key(path, name), names[:6]))
    assert sorted(key.name for key in read_keys(path)) == sorted(names[6:])


def test_a_file_that_another_process_holds_is_waited_for_within_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "LOCK_SECONDS", 0.1)
    path = tmp_path / "keys.json"
    with file_lock(tmp_path / "keys.json.lock"), pytest.raises(ConfigError, match="another process holds"):
        add_key(path, "ann")
    assert not path.exists()
    add_key(path, "ann")


def test_a_link_to_the_file_stays_one(tmp_path: Path) -> None:
    add_key(tmp_path / "real.json", "ann")
    (tmp_path / "keys.json").symlink_to("real.json")
    add_key(tmp_path / "keys.json", "bob")
    assert (tmp_path / "keys.json").is_symlink() and len(read_keys(tmp_path / "real.json")) == 2


def test_what_cannot_be_a_file_of_keys_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        for attempt in (lambda path=path: add_key(path, "ann"), lambda path=path: KeyRing(path, print)):
            with pytest.raises(ConfigError, match=r"is not a file|cannot be"):
                attempt()
    with pytest.raises(ConfigError, match="cannot be written"):
        add_key(tmp_path / "file" / "keys.json", "ann")
