"""The commands `generate` and `chat`; their first word comes at once, so nothing here imports pydantic."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gulliver.core.errors import ConfigError

if TYPE_CHECKING:
    from gulliver.cli.options import AnswerOptions, ChatOptions, GenerateOptions
    from gulliver.cli.session import Session


# ---- generate --------------------------------------------------------------------------------------------------------
def generate(options: GenerateOptions, session: Session) -> tuple[Any, list[str]]:
    """Answer one prompt, its text on stdout as it comes; or the prompts of a file, one JSON line each."""
    from gulliver.pipeline.generate import SLOTS, open_model

    prompts = _prompts(options)
    sampling, schema = _sampling(options), _schema(options.json_schema)
    opening = _opening(options, min(len(prompts), SLOTS))
    with open_model(options.model, opening, store=lambda: session.store, progress=session.progress) as model:
        if not options.raw and not model.has_chat_template:
            session.progress.print(f"{model.folder.name} has no chat template: the prompt itself is continued")
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
        answer = model.answer(requests[0], (lambda text: None) if session.json else _write)
        document = {**asdict(answer), "timings": answer.timings(), **_how(model, raw=options.raw)}
        if not session.json and not answer.text.endswith("\n"):
            _write("\n")
        session.progress.print(model.told(answer))
    return document, []


def _many(options: GenerateOptions, model: Any, requests: list[Any], session: Session) -> tuple[Any, list[str]]:
    began = time.perf_counter()
    answers = model.answers(requests)
    seconds = time.perf_counter() - began
    rows = [{"text": answer.text, "finish_reason": answer.finish_reason} for answer in answers]
    if not session.json:
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


def _prompts(options: GenerateOptions) -> list[Any]:
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


def _sampling(options: AnswerOptions) -> Any:
    from gulliver.pipeline.generate import TEMPERATURE
    from gulliver.runtime.sampling import Sampling

    given = {one.name: getattr(options, one.name, None) for one in fields(Sampling)}
    given = {name: value for name, value in given.items() if value is not None}
    return Sampling(**{"temperature": TEMPERATURE, **given})


def _opening(options: AnswerOptions, slots: int = 1) -> Any:
    from gulliver.pipeline.generate import Opening

    return Opening(options.threads, options.isa, options.backend, options.ram, slots)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


# ---- chat ------------------------------------------------------------------------------------------------------------
def chat(options: ChatOptions, session: Session) -> tuple[Any, list[str]]:
    """Talk until the input ends. ConfigError for a model without a chat template."""
    from gulliver.cli.chat import Chat
    from gulliver.pipeline.generate import open_model

    sampling = _sampling(options)
    with open_model(options.model, _opening(options), store=lambda: session.store, progress=session.progress) as model:
        if not model.has_chat_template:
            raise ConfigError(f"{options.model} has no chat template, which a chat needs; use `gulliver generate`")
        talk = Chat(
            model,
            sampling,
            max_tokens=options.max_tokens,
            system=options.system,
            tell=session.progress.print,
        )
        talk.run((lambda text: None) if session.json else _write)
        return {"messages": talk.messages, **_how(model, raw=False)}, []
