"""Parts of runtime.py through HTTP: many streams at once, what HTTP costs, and a long load with clients that vanish."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from contextlib import ExitStack

from peers_runtime_llama import Llama
from runtime_common import FITTED, HERE, answer, in_turn, llama_name, paired, rounded, slope, summary, text_of
from runtime_engine import BareEngine
from runtime_server import Resident, Server, resident_bytes

CLIENT = HERE / "runtime_client.py"
SLOTS = 16
CONTEXT = 512
WORDS = 32
SETTLED_SECONDS = 60.0
"""From then on memory should not grow: before, the cache is touched for the first time."""
BARE = "bare engine"


def our_server(args: argparse.Namespace, *options: object) -> Server:
    """`gulliver serve` of the fitted model, as a user would start it."""
    words = (sys.executable, "-m", "gulliver", "serve", args.model, "--port", 0, "--home", args.home, "--threads",
             args.threads, *options)  # fmt: skip
    return Server(words, health="/readyz")


def our_name(server: Server) -> str:
    """The name under which the server has its model."""
    return json.loads(server.get("/v1/models"))["data"][0]["id"]


def client(server: Server, name: str, *words: object, seed: int, temperature: float = 0.0) -> dict:
    """What runtime_client.py saw."""
    own = ("--port", server.port, "--model", name, "--seed", seed, "--temperature", temperature)
    return answer(sys.executable, CLIENT, *own, *words)


# ---- streams --------------------------------------------------------------------------------------------------------
def streams(args: argparse.Namespace) -> dict:
    """Total tokens per second of 16 streams at once over HTTP, ours and llama.cpp's server, by the same clients.

    `drafted_share` of our tokens came from prompt lookup: greedy answers of a small model repeat themselves.
    """
    llama, seen = Llama(args.peers), {}
    burst = ("burst", "--streams", SLOTS, "--tokens", args.tokens, "--words", WORDS)
    with ExitStack() as stack:
        ready = {FITTED: stack.enter_context(our_server(args, "--slots", SLOTS))}
        for kind in ("Q4_0", "Q4_K_M"):
            command = llama.server_command(kind, 0, slots=SLOTS, context=CONTEXT, threads=args.threads)
            ready[llama_name(kind)] = stack.enter_context(Server(command, health="/health"))
        names = {name: our_name(server) if name == FITTED else "default" for name, server in ready.items()}

        def run(name: str, index: int) -> float:
            found = client(ready[name], names[name], *burst, seed=index, temperature=args.temperature)
            seen.setdefault(name, []).append(found)
            return found["tokens_s"]

        for name in ready:
            run(name, 1000)  # the first requests of a server are slower
        seen.clear()
        rounds = in_turn({name: lambda index, name=name: run(name, index) for name in ready}, args.rounds)
        counted = totals(ready[FITTED].get("/metrics"))
    return {
        **rounds.row([FITTED]),
        "streams": SLOTS,
        "tokens": args.tokens,
        "temperature": args.temperature,
        "drafted_share": rounded(counted["draft_accepted"] / counted["completion_tokens"], 3),
        "client_cpu_share": {name: max(one["cpu_share"] for one in many) for name, many in seen.items()},
        "first_token_seconds": {
            name: summary([one["first_token_seconds"]["median"] for one in many]) for name, many in seen.items()
        },
    }


# ---- overhead -------------------------------------------------------------------------------------------------------
def overhead(args: argparse.Namespace) -> dict:
    """Seconds of one streamed completion over HTTP against the bare engine in its own process, the same prompts."""
    with our_server(args) as server, BareEngine(args.model, threads=args.threads) as engine:
        name, burst = our_name(server), ("burst", "--streams", 1, "--tokens", args.tokens, "--words", WORDS)

        def http(index: int) -> float:
            return client(server, name, *burst, seed=index)["seconds"]

        def bare(index: int) -> float:
            return engine.ask([text_of(WORDS, 1000 * index)], args.tokens)["seconds"]

        for one in (http, bare):
            one(1000)
        values = in_turn({"http": http, BARE: bare}, args.rounds).values
    ratio = paired(values["http"], values[BARE])
    extra = {name: rounded(ratio[name] - 1, 3) for name in ("median", "low", "high")}
    return {
        "overhead": {**ratio, **extra},
        "seconds": {name: summary(times) for name, times in values.items()},
        "tokens": args.tokens,
    }


# ---- load -----------------------------------------------------------------------------------------------------------
def load(args: argparse.Namespace) -> dict:
    """200 clients for three minutes, a tenth of the requests broken off: errors, memory over time, first tokens."""
    with our_server(args) as server:
        name = our_name(server)
        client(server, name, "burst", "--streams", SLOTS, "--tokens", 16, seed=1000)
        before = resident_bytes(server.process.pid)
        with Resident(server.process.pid) as resident:
            began = server.cpu_seconds()
            found = client(server, name, "load", "--clients", args.clients, "--seconds", args.seconds,
                           "--killed", args.killed, seed=0)  # fmt: skip
            used = server.cpu_seconds() - began
        time.sleep(2)
        left = leftovers(server.get("/metrics"))
        says = client(server, name, "burst", "--streams", 1, "--tokens", 16, seed=2000)
    settled = [(t, s) for t, s in zip(resident.times, resident.sizes, strict=True) if t >= SETTLED_SECONDS]
    settled = settled or list(zip(resident.times, resident.sizes, strict=True))
    steep, error = slope([t for t, _ in settled], [float(size) for _, size in settled])
    return {
        **found,
        "clients": args.clients,
        "seconds": args.seconds,
        "killed_share": args.killed,
        "rss_bytes": {"before": before, "settled": settled[0][1], "end": settled[-1][1], "most": max(resident.sizes)},
        "rss_bytes_per_minute": {"value": rounded(60 * steep), "standard_error": rounded(60 * error)},
        "left_over": left,
        "answers_afterwards": says["tokens"],
        "server_cpu_seconds": round(used, 1),
        "drained_seconds": server.drained_seconds and round(server.drained_seconds, 2),
        "exit_code": server.exit_code,
    }


def totals(metrics: str) -> dict[str, float]:
    """{name: count since the start, over all models} of our server's counters of tokens."""
    found = {"draft_accepted": 0.0, "completion_tokens": 0.0}
    for name in found:
        values = re.findall(rf"^gulliver_{name}_total(?:\{{[^}}]*\}})? ([0-9.e+-]+)$", metrics, re.MULTILINE)
        found[name] = sum(map(float, values))
    return found


def leftovers(metrics: str) -> dict[str, float]:
    """What a server with nothing to do should show as zero: requests running, waiting and active."""
    pattern = r"^(gulliver_(?:requests_running|requests_waiting|http_requests_active))(?:\{[^}]*\})? ([0-9.e+-]+)$"
    found: dict[str, float] = {}
    for name, value in re.findall(pattern, metrics, re.MULTILINE):
        found[name] = found.get(name, 0.0) + float(value)
    return found
