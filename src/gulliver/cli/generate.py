"""The commands `generate`, `chat` and `bench`. Each is a row like those in commands.py."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gulliver.core.errors import ConfigError

MODEL_HELP = "an artifact id, a folder, a .gguf file, catalog:NAME or hf:ORG/NAME"
SAMPLING = {
    "temperature": (float, "how much chance there is in the choice of a token; 0 takes the likeliest (default 0.7)"),
    "top_p": (float, "keep the fewest likeliest tokens that reach this probability (default 1: all)"),
    "top_k": (int, "keep this many of the likeliest tokens (default 0: all)"),
    "min_p": (float, "keep tokens at least this fraction as likely as the likeliest (default 0: all)"),
    "repetition_penalty": (float, "above 1: tokens that are there already become less likely (default 1)"),
    "seed": (int, "the same seed gives the same answer (default: another each time)"),
}
"""Option -> (type, help). The names are those of runtime.sampling.Sampling."""


# ---- generate --------------------------------------------------------------------------------------------------------
def generate_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `generate`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--prompt", metavar="TEXT", help="what to answer; - reads standard input (as when it is piped)")
    parser.add_argument(
        "--prompts", metavar="FILE", help='one prompt a line: text as JSON, {"prompt": …} or {"messages": […]}'
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message, for a model with a chat template")
    parser.add_argument("--raw", action="store_true", help="go on from the prompt itself, without the chat template")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--json-schema", metavar="FILE", help="the answer is JSON that fits the schema in this file")
    _answer_arguments(parser, "512")


def _answer_arguments(parser: argparse.ArgumentParser, most: str) -> None:
    group = parser.add_argument_group("how it answers")
    group.add_argument("--max-tokens", type=int, metavar="N", help=f"longest answer in tokens (default {most})")
    for name, (kind, about) in SAMPLING.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=about)
    _opening_arguments(parser)


def _opening_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it runs")
    group.add_argument("--threads", type=int, metavar="N", help="threads (default: one per core)")
    group.add_argument("--isa", default="auto", help="instruction set of the native path, as doctor names it")
    group.add_argument("--path", default="auto", help="what runs the model: auto, native or reference (default auto)")
    group.add_argument("--ram", help="most memory of the whole process, e.g. 1GB; weights beyond it are read anew")


def generate(options: argparse.Namespace, session: Any) -> tuple[Any, list[str]]:
    """Answer one prompt, its text on stdout as it comes; or the prompts of a file, one JSON line each."""
    from gulliver.pipeline.generate import SLOTS, open_model

    prompts = _prompts(options)
    sampling, schema = _sampling(options), _schema(options.json_schema)
    opening = _opening(options, min(len(prompts), SLOTS))
    with open_model(options.model, opening, store=lambda: session.store, progress=session.progress) as model:
        if not options.raw and not model.has_chat_template:
            session.progress.print(f"{model.folder.name} has no chat template: it goes on from the prompt itself")
        limit = {} if options.max_tokens is None else {"max_tokens": options.max_tokens}
        requests = [
            model.request(
                model.tokens(prompt, raw=options.raw, system=options.system),
                sampling=sampling,
                stop=options.stop,
                json_schema=schema,
                **limit,
            )
            for prompt in prompts
        ]
        if options.prompts is not None:
            return _many(options, model, requests, session)
        answer = model.answer(requests[0], (lambda text: None) if options.json else _write)
        document = {**asdict(answer), "timings": answer.timings(), **_how(model, raw=options.raw)}
        if not options.json and not answer.text.endswith("\n"):
            _write("\n")
        session.progress.print(model.told(answer))
    return document, []


def _many(options: argparse.Namespace, model: Any, requests: list[Any], session: Any) -> tuple[Any, list[str]]:
    began = time.perf_counter()
    answers = model.answers(requests)
    seconds = time.perf_counter() - began
    rows = [{"text": answer.text, "finish_reason": answer.finish_reason} for answer in answers]
    if not options.json:
        _write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    tokens = sum(answer.completion_tokens for answer in answers)
    session.progress.print(f"{len(rows)} answers, {tokens} tokens, {tokens / seconds:.0f} tokens/s; {model.told()}")
    document = {"answers": rows, "completion_tokens": tokens, "tokens_per_s": round(tokens / seconds, 2)}
    return {**document, **_how(model, raw=options.raw)}, []


def _how(model: Any, *, raw: bool) -> dict[str, Any]:
    """What ran, how long it took to be there, and the memory that it holds."""
    from gulliver.core.memory import current_rss_bytes, peak_rss_bytes
    from gulliver.pipeline.generate import seconds_since_start

    return {
        "model": str(model.folder),
        "backend": model.engine.decoder.backend,
        "why": model.engine.decoder.why,
        "chat_template": model.has_chat_template and not raw,
        "load_seconds": round(model.load_seconds, 4),
        "process_seconds": seconds_since_start(),
        "rss_bytes": current_rss_bytes(),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _prompts(options: argparse.Namespace) -> list[Any]:
    """The prompt, or those of the file."""
    if options.prompts is not None:
        if options.prompt is not None:
            raise ConfigError("--prompt and --prompts exclude each other; give one")
        return _prompt_lines(_read(options.prompts, "--prompts"))
    if options.prompt in (None, "-"):
        if options.prompt is None and sys.stdin.isatty():
            raise ConfigError("there is nothing to answer; give --prompt TEXT, --prompts FILE or text by a pipe")
        return [_utf8(sys.stdin.read)]
    return [options.prompt]


def _prompt_lines(text: str) -> list[Any]:
    prompts: list[Any] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        wrong = ConfigError(
            f'line {number} of --prompts is {line[:60]!r}; write "text", {{"prompt": "text"}} or {{"messages": […]}}'
        )
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise wrong from None
        if isinstance(row, dict) and len(row) == 1:
            row = row.get("prompt", row.get("messages"))
        if not (isinstance(row, str) or (isinstance(row, list) and row and all(isinstance(m, dict) for m in row))):
            raise wrong
        prompts.append(row)
    if not prompts:
        raise ConfigError("--prompts holds no prompt; write one a line")
    return prompts


def _schema(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        found = json.loads(_read(path, "--json-schema"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--json-schema {path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--json-schema {path} holds no JSON object; a schema is one")
    return found


def _read(path: str, option: str) -> str:
    def read() -> str:
        return Path(path).expanduser().read_text(encoding="utf-8")

    try:
        return _utf8(read)
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be read: {error.strerror}") from None


def _utf8(read: Any) -> str:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"the text is not UTF-8 (byte {error.start}); convert it first") from None


def _sampling(options: argparse.Namespace) -> Any:
    from gulliver.pipeline.generate import TEMPERATURE
    from gulliver.runtime.sampling import Sampling

    given = {name: getattr(options, name) for name in SAMPLING if getattr(options, name) is not None}
    return Sampling(**{"temperature": TEMPERATURE, **given})


def _opening(options: argparse.Namespace, slots: int = 1) -> Any:
    from gulliver.pipeline.generate import Opening

    return Opening(options.threads, options.isa, options.path, options.ram, slots)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


# ---- chat ------------------------------------------------------------------------------------------------------------
def chat_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `chat`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    _answer_arguments(parser, "what the context holds")


def chat(options: argparse.Namespace, session: Any) -> tuple[Any, list[str]]:
    """Talk until the input ends. ConfigError for a model without a chat template."""
    from gulliver.cli.chat import Chat
    from gulliver.pipeline.generate import open_model

    sampling = _sampling(options)
    with open_model(options.model, _opening(options), store=lambda: session.store, progress=session.progress) as model:
        if not model.has_chat_template:
            raise ConfigError(f"{options.model} has no chat template, so it is no chat model; use `gulliver generate`")
        talk = Chat(
            model,
            sampling,
            max_tokens=options.max_tokens,
            system=options.system,
            tell=session.progress.print,
        )
        talk.run((lambda text: None) if options.json else _write)
        return {"messages": talk.messages, **_how(model, raw=False)}, []


# ---- bench -----------------------------------------------------------------------------------------------------------
def bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--repeats", type=int, default=9, help="measured runs of everything, after one (default 9)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: one per core)")
    parser.add_argument("--isa", default="auto", help="instruction set of the native path, as doctor names it")


def bench(options: argparse.Namespace, session: Any) -> tuple[Any, list[str]]:
    """Measure speed and memory now; the medians and their intervals."""
    from gulliver.pipeline.bench import bench, lines

    document = bench(
        options.model,
        repeats=options.repeats,
        threads=options.threads,
        isa=options.isa,
        store=lambda: session.store,
        progress=session.progress,
    )
    return document, lines(document)
