"""The commands `ask`, `generate` and `chat`; their first word comes at once, so nothing here imports pydantic."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from gulliver.cli.session import Session, opening
from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.foreign import read_bytes
from gulliver.core.store.files import named_path

if TYPE_CHECKING:
    from gulliver.cli.options import AnswerOptions, AskOptions, ChatOptions, GenerateOptions

MAX_PROMPT_BYTES = 2**26
"""Most of a file of prompts, or of what comes by a pipe, which might have no end."""


def ask(options: AskOptions, session: Session) -> tuple[Any, list[str]]:
    """One answer of a model of any family. ConfigError or DataError for an input that it does not understand."""
    from gulliver.pipeline.ask import answered, open_answerer, shown_name

    given = _given([_read("-", "the input")] if options.input == ("-",) else list(options.input))
    how = opening(options, slots=1)
    with open_answerer(options.model, how, store=lambda: session.store, progress=session.progress) as answerer:
        response = answered(answerer, given)
        session.progress.print(f"{shown_name(answerer)} by {answerer.backend}: {answerer.why}")
        return response.model_dump(), answerer.show(response)


def _given(words: list[str]) -> Any:
    """What was written after the model: a JSON object is a request, everything else is the family's to read."""
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        try:
            return json.loads(words[0])
        except (ValueError, RecursionError):
            return words  # a prompt may begin with a brace
    return words


# ---- generate --------------------------------------------------------------------------------------------------------
def generate(options: GenerateOptions, session: Session) -> tuple[Any, list[str]]:
    """Answer one prompt, its text on stdout as it comes; or the prompts of a file, one JSON line each."""
    from gulliver.pipeline.generate import SLOTS, open_model

    prompts = _prompts(options)
    sampling, schema = _sampling(options), _schema(options.json_schema)
    how = opening(options, slots=min(len(prompts), SLOTS))
    with open_model(options.model, how, store=lambda: session.store, progress=session.progress) as model:
        if not options.raw and not model.has_chat_template:
            session.progress.print(f"{model.name} has no chat template: the prompt itself is continued")
        asked: dict[str, Any] = {"sampling": sampling, "stop": options.stop, "json_schema": schema}
        if options.max_tokens is not None:
            asked["max_tokens"] = options.max_tokens
        tokens = [model.tokens(prompt, raw=options.raw, system=options.system) for prompt in prompts]
        requests = [model.request(one, **asked) for one in tokens]
        if options.prompts is not None:
            return _many(options, model, requests, session)
        answer = model.answer(requests[0], _writer(session))
        document = {**asdict(answer), "timings": answer.timings(), **_how(model, raw=options.raw)}
        if not answer.text.endswith("\n"):
            _writer(session)("\n")
        session.progress.print(model.told(answer))
    return document, []


def _many(options: GenerateOptions, model: Any, requests: list[Any], session: Session) -> tuple[Any, list[str]]:
    began = time.perf_counter()
    answers = model.answers(requests)
    seconds = time.perf_counter() - began
    rows = [{"text": answer.text, "finish_reason": answer.finish_reason} for answer in answers]
    _writer(session)("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
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


def _prompts(options: GenerateOptions) -> list[Any]:
    """The prompt, or those of the file."""
    if options.prompts is not None:
        if options.prompt is not None:
            raise ConfigError("--prompt and --prompts exclude each other; give one")
        return _prompt_lines(_read(options.prompts, "--prompts"))
    if options.prompt is None and sys.stdin.isatty():
        raise ConfigError("there is nothing to answer; give --prompt TEXT, --prompts FILE or text by a pipe")
    return [_read("-", "--prompt") if options.prompt in (None, "-") else options.prompt]


def _prompt_lines(text: str) -> list[Any]:
    prompts: list[Any] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and len(row) == 1:
            row = row.get("prompt", row.get("messages"))
        if not (isinstance(row, str) or (isinstance(row, list) and row and all(isinstance(m, dict) for m in row))):
            forms = '"text", {"prompt": "text"} or {"messages": […]}'
            raise ConfigError(f"line {number} of --prompts is {line[:60]!r}; write {forms}")
        prompts.append(row)
    if not prompts:
        raise ConfigError("--prompts has no prompts; write one per line")
    return prompts


def _schema(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        found = json.loads(_read(path, "--json-schema"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--json-schema {path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--json-schema {path} must contain a JSON object")
    return found


def _piped() -> str:
    """The text of standard input."""
    text = sys.stdin.read(MAX_PROMPT_BYTES + 1)
    if len(text) > MAX_PROMPT_BYTES:
        raise ConfigError(f"standard input has more than the {MAX_PROMPT_BYTES:,} characters that are allowed")
    return text


def _read(path: str, option: str) -> str:
    """The text of a file; of standard input for "-"."""
    try:
        if path == "-":
            return _piped()
        return read_bytes(named_path(path), MAX_PROMPT_BYTES).decode()
    except ArtifactError as error:
        raise ConfigError(f"{option} {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the text is not UTF-8 (byte {error.start}); convert it first") from None


def _sampling(options: AnswerOptions) -> Any:
    from gulliver.pipeline.generate import TEMPERATURE
    from gulliver.runtime.sampling import Sampling

    given = {one.name: getattr(options, one.name, None) for one in fields(Sampling)}
    given = {name: value for name, value in given.items() if value is not None}
    return Sampling(**{"temperature": TEMPERATURE, **given})


def _writer(session: Session) -> Callable[[str], object]:
    """Writes text as it comes; with --json, where stdout is for the document, it writes nothing."""
    return (lambda text: None) if session.json else partial(print, end="", flush=True)


# ---- chat ------------------------------------------------------------------------------------------------------------
def chat(options: ChatOptions, session: Session) -> tuple[Any, list[str]]:
    """Talk until the input ends. ConfigError for a model without a chat template."""
    from gulliver.cli.chat import Chat
    from gulliver.pipeline.generate import open_model

    sampling, how = _sampling(options), opening(options, slots=1)
    with open_model(options.model, how, store=lambda: session.store, progress=session.progress) as model:
        if not model.has_chat_template:
            raise ConfigError(f"{options.model} has no chat template, which a chat needs; use `gulliver generate`")
        limit, tell = options.max_tokens, session.progress.print
        talk = Chat(model, sampling, max_tokens=limit, system=options.system, tell=tell)
        talk.run(_writer(session))
        return {"messages": talk.messages, **_how(model, raw=False)}, []
