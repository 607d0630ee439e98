#!/usr/bin/env python3
"""What a change did to every speed of the runtime: two checkouts, each with its own .venv, measured in turn.

    python benchmarks/versions.py BEFORE AFTER --model FITTED --eight 8-BIT --large LARGE --out versions.json all
    python benchmarks/versions.py BEFORE AFTER --model FITTED --eight 8-BIT --large LARGE --out versions.json decode

BEFORE and AFTER are folders in which `make venv` ran; both open the same models: one that `gulliver fit` made, one in
8 bits and one beyond the last-level cache (`runtime.py models` makes the last two). Every row has what each checkout
reached and the ratio of their speeds, after over before, round by round: above 1, the change made it faster. Each
checkout is measured by its own scripts in benchmarks/, which must answer alike.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from compress_common import Results
from runtime_common import Watch, answer, in_turn, paired, summary, text_of
from runtime_engine import BareEngine
from runtime_extras import after_one_system_prompt
from runtime_http import our_name
from runtime_server import Server
from runtime_speed import DEPTH, TWENTY_TOKENS

SIDES = ("before", "after")
WORDS = 32
LOAD_SECONDS = 30.0
Measured = Mapping[str, Callable[[int], float]]
"""{side: what measures it in one round}."""


class Engine(BareEngine):
    """An engine of one checkout as a process; `script` names the file in its benchmarks/."""

    def __init__(self, checkout: Path, model: Path, *options: object, script: str = "runtime_engine.py") -> None:
        self._command = [*_python(checkout), str(checkout / "benchmarks" / script), str(model), *map(str, options)]


def _python(checkout: Path) -> list[str]:
    return [str(checkout / ".venv" / "bin" / "python")]


def ours(checkout: Path, *words: object) -> dict:
    """What the checkout's runtime_ours.py measures, in a new process."""
    return answer(*_python(checkout), checkout / "benchmarks" / "runtime_ours.py", *words)


def compared(engines: Measured, rounds: int, *, seconds: bool = False) -> dict:
    """Both sides in turn: their summaries, and the ratio of speeds. `seconds` says that less is better."""
    values = in_turn(engines, rounds).values
    before, after = (values[side] for side in SIDES)
    ratio = paired(before, after) if seconds else paired(after, before)
    return {**{side: summary(values[side]) for side in SIDES}, "speed_ratio": ratio}


# ---- parts ----------------------------------------------------------------------------------------------------------
def decode(args: argparse.Namespace) -> dict:
    """Tokens per second at batch 1: the fitted model, the one in 8 bits and the large one."""
    models = {"fitted": args.model, "8-bit": args.eight, "large": args.large}

    def run(checkout: Path, model: Path, index: int) -> float:
        tokens = 64 if model == args.large else 128
        return ours(checkout, "decode", model, "--prompt", DEPTH, "--tokens", tokens, "--seed", index)["tokens_s"]

    return {
        name: compared({side: lambda i, c=c, m=model: run(c, m, i) for side, c in args.sides.items()}, args.rounds)
        for name, model in models.items()
    }


def prefill(args: argparse.Namespace) -> dict:
    """Tokens per second of a prompt of 512 tokens."""

    def run(checkout: Path, index: int) -> float:
        return ours(checkout, "prefill", args.model, "--prompt", 512, "--seed", index)["tokens_s"]

    return {"fitted": compared({side: lambda i, c=c: run(c, i) for side, c in args.sides.items()}, args.rounds)}


def cold(args: argparse.Namespace) -> dict:
    """Seconds of a new process: from its imports to the first token, and of the whole `generate` command."""

    def opened(checkout: Path, _: int) -> float:
        return ours(checkout, "cold", args.model, "--text", TWENTY_TOKENS)["seconds"]

    def command(checkout: Path, _: int) -> float:
        words = (
            *_python(checkout),
            "-m",
            "gulliver",
            "generate",
            str(args.model),
            "--prompt",
            "Once upon a time",
            "--max-tokens",
            "1",
        )
        began = time.perf_counter()
        subprocess.run(words, check=True, capture_output=True)
        return time.perf_counter() - began

    return {
        name: compared({side: lambda i, c=c, a=act: a(c, i) for side, c in args.sides.items()}, count, seconds=True)
        for name, act, count in (("first token", opened, 2 * args.rounds), ("generate", command, 2 * args.rounds))
    }


def streams(args: argparse.Namespace) -> dict:
    """Total tokens per second of 16 streams at once and of one, over HTTP and in the bare engine."""
    rows, prompts = {}, {count: _prompts(count) for count in (1, 16)}
    with ExitStack() as stack:
        servers = {side: stack.enter_context(_server(args, c, "--slots", 16)) for side, c in args.sides.items()}
        engines = {side: stack.enter_context(Engine(c, args.model, "--threads", 2)) for side, c in args.sides.items()}
        names = {side: our_name(server) for side, server in servers.items()}
        for count, texts in prompts.items():
            rounds = args.rounds * (1 if count > 1 else 4)

            def http(side: str, index: int, count=count) -> float:
                return _burst(args, servers[side], names[side], count, index)["tokens_s"]

            def bare(side: str, index: int, texts=texts) -> float:
                return engines[side].ask(texts(index), args.tokens)["tokens_s"]

            for name, act in ((f"http {count}", http), (f"engine {count}", bare)):
                for side in SIDES:
                    act(side, 1000)  # the first requests are slower
                rows[name] = compared({side: lambda i, s=side, a=act: a(s, i) for side in SIDES}, rounds)
    return rows


def overhead(args: argparse.Namespace) -> dict:
    """Seconds of one streamed completion over HTTP over those of the bare engine, each side by its own."""
    with ExitStack() as stack:
        acts: dict[str, Callable[[int], float]] = {}
        for side, checkout in args.sides.items():
            server = stack.enter_context(_server(args, checkout))
            engine = stack.enter_context(Engine(checkout, args.model, "--threads", 2))
            name = our_name(server)
            acts[f"{side} http"] = lambda i, s=server, n=name: _burst(args, s, n, 1, i)["seconds"]
            acts[f"{side} engine"] = lambda i, e=engine: e.ask(_prompts(1)(i), args.tokens)["seconds"]
        for act in acts.values():
            act(1000)
        values = in_turn(acts, args.rounds * 6).values
    over = {side: paired(values[f"{side} http"], values[f"{side} engine"]) for side in SIDES}
    each = {
        side: [h / e for h, e in zip(values[f"{side} http"], values[f"{side} engine"], strict=True)] for side in SIDES
    }
    row = {"seconds": {name: summary(times) for name, times in values.items()}}
    return {**row, "http_over_engine": over, "speed_ratio": paired(each["before"], each["after"])}


def two(args: argparse.Namespace) -> dict:
    """Total tokens per second of two engines of one process under load at once."""
    rows = {}
    with ExitStack() as stack:
        engines = {
            side: stack.enter_context(Engine(c, args.model, "--threads", 2, script="runtime_two_engines.py"))
            for side, c in args.sides.items()
        }
        for count in (1, 16):

            def run(side: str, index: int, count=count) -> float:
                texts = _prompts(2 * count)(index)
                asked = {"prompts": [texts[:count], texts[count:]], "tokens": args.tokens, "at_once": True}
                return engines[side].answer_to(asked)["tokens_s"]

            for side in SIDES:
                run(side, 1000)
            rows[f"{count} + {count}"] = compared(
                {side: lambda i, s=side, r=run: r(s, i) for side in SIDES}, args.rounds
            )
    return rows


def reuse(args: argparse.Namespace) -> dict:
    """Tokens per second with prompt lookup, and seconds to the first token after a shared beginning."""
    edit = "Repeat this text word for word:\n\n" + text_of(120, 7)
    with ExitStack() as stack:
        engines = {side: stack.enter_context(Engine(c, args.model, "--threads", 2)) for side, c in args.sides.items()}

        def lookup(side: str, index: int) -> float:
            return engines[side].ask([[{"role": "user", "content": f"{index}. {edit}"}]], args.tokens)["tokens_s"]

        def shared(side: str, index: int) -> float:
            many = [engines[side].ask([one], 1)["first_token_seconds"][0] for one in after_one_system_prompt(index)]
            return sum(many[1:])

        return {
            "prompt lookup": compared({side: lambda i, s=side: lookup(s, i) for side in SIDES}, 2 * args.rounds),
            "shared beginning": compared(
                {side: lambda i, s=side: shared(s, i) for side in SIDES}, args.rounds, seconds=True
            ),
        }


def load(args: argparse.Namespace) -> dict:
    """200 clients for half a minute, a tenth of the requests broken off: tokens per second, and errors."""
    found: dict[str, list[dict]] = {side: [] for side in SIDES}

    def run(side: str, index: int) -> float:
        with _server(args, args.sides[side]) as server:
            words = ("load", "--clients", 200, "--seconds", LOAD_SECONDS, "--killed", 0.1)
            found[side].append(_client(server, our_name(server), *words, seed=index))
        return found[side][-1]["tokens"] / LOAD_SECONDS

    row = compared({side: lambda i, s=side: run(s, i) for side in SIDES}, 3)
    return {
        "200 clients": {**row, "errors": {side: sum(one["errors"] for one in many) for side, many in found.items()}}
    }


# ---- servers --------------------------------------------------------------------------------------------------------
def _server(args: argparse.Namespace, checkout: Path, *options: object) -> Server:
    words = ("-m", "gulliver", "serve", args.model, "--port", 0, "--home", args.home, "--threads", 2, *options)
    return Server((*_python(checkout), *words), health="/readyz")


def _client(server: Server, name: str, *words: object, seed: int) -> dict:
    own = ("--port", server.port, "--model", name, "--seed", seed, "--temperature", 0.0)
    return answer(sys.executable, Path(__file__).with_name("runtime_client.py"), *own, *words)


def _burst(args: argparse.Namespace, server: Server, name: str, count: int, seed: int) -> dict:
    return _client(server, name, "burst", "--streams", count, "--tokens", args.tokens, "--words", WORDS, seed=seed)


def _prompts(count: int) -> Callable[[int], list[str]]:
    return lambda index: [text_of(WORDS, 1000 * index + number) for number in range(count)]


# ---- the program ----------------------------------------------------------------------------------------------------
PARTS = {one.__name__: one for one in (decode, prefill, cold, streams, overhead, two, reuse, load)}


def _commit(checkout: Path) -> str:
    return subprocess.check_output(["git", "-C", checkout, "rev-parse", "--short", "HEAD"], text=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("part", choices=(*PARTS, "all"))
    for name in ("model", "eight", "large", "home", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    args.sides = dict(zip(SIDES, (args.before.resolve(), args.after.resolve()), strict=True))
    results = Results(args.out)
    for name, part in PARTS.items():
        if args.part == name or (args.part == "all" and not results.has(name, name)):
            with Watch() as watch:
                rows = part(args)
            commits = {side: _commit(checkout) for side, checkout in args.sides.items()}
            results.put(name, name, {"rows": rows, "commits": commits, **watch.row})


if __name__ == "__main__":
    main()
