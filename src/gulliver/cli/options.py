"""The options of every command that is not a step, and those that all commands take.

arguments.py makes arguments from these models: a first field that is required has no flag, `about` is the help. Only
what makes parsers.json and commands that are not in a hurry import this, never `generate` and `chat`.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from gulliver.cli.arguments import MODEL_HELP
from gulliver.core.options import Options

ANSWERS, RUNS = "how it answers", "how it runs"
ISA_HELP = "instruction set of the native backend, as doctor names it"


def option(
    default: Any, about: str, *, metavar: str = "", group: str = "", positional: bool = False, **bounds: Any
) -> Any:
    """A field: `...` for one that is required; `metavar` and `group` are how the help shows it.

    `positional`: it has no flag, as a first required field has none.
    """
    extra: dict[str, Any] = {"metavar": metavar, "group": group, "positional": positional}
    return Field(default, description=about, json_schema_extra=extra, **bounds)


class Everywhere(Options):
    """What every command takes."""

    home: str | None = option(None, "where artifacts and evidence are kept (default ~/.gulliver)", metavar="DIR")
    database: str | None = option(None, "keep evidence and runs there, e.g. postgresql+psycopg://…", metavar="URL")
    json_: bool = option(False, "print one JSON document on stdout, nothing else")
    quiet: bool = option(False, "show no progress")


class Making(Options):
    """What every step takes beside its inputs and its own options."""

    seed: int = option(0, "seed of everything random")
    out: str | None = option(None, "also copy what was made there", metavar="DIR")


class NoOptions(Options):
    """Nothing beside what every command takes: `list`."""


class OneArtifact(Options):
    """Options of `show`."""

    id: str = option(..., "the id of an artifact, its first 6 or more digits, or its folder")


class VerifyOptions(Options):
    """Options of `verify`."""

    id: str | None = option(
        None,
        "the id of an artifact, its first 6 or more digits, or its folder (default: the whole home, all artifacts and "
        "every row of its database)",
        positional=True,
    )


class DoctorOptions(Options):
    """Options of `doctor`."""

    repair: bool = option(False, "restore a database that is damaged or gone from what the artifacts hold")


class FitOptions(Options):
    """Options of `fit`."""

    model: str = option(..., MODEL_HELP)
    size: str | None = option(None, "most bytes of weights: 64MB (10^6), 64MiB (2^20) or 30% of the parent's")
    ram: str | None = option(None, "most memory that compressing may take, e.g. 1GB")
    speed: float | None = option(None, "least tokens per second on this machine")
    max_drop: str | None = option(None, "most quality to give up, e.g. 5%; without --size: the smallest within it")
    data: str | None = option(None, "text files, a dataset artifact or catalog:NAME")
    eval_data: str | None = option(None, "held-out text; without it a part of --data is held out")
    for_: str = option(
        "native", "native, gguf, vllm or transformers: only what its file holds exactly, and its bytes count"
    )
    effort: str = option("normal", "fast, normal or high: how much work may go into it")
    seed: int = option(0, "seed of everything random")
    domain_only: bool = option(False, "calibrate and judge on --data alone, not on the model's own text too")
    dry_run: bool = option(False, "make no model: the quality that sizes would cost, and the time it would take")
    out: str | None = option(
        None, "where to put the fitted model and its report; needed without --dry-run", metavar="DIR"
    )


class RunOptions(Options):
    """Options of `run`."""

    recipe: str = option(..., "a recipe: steps and gates in order", metavar="RECIPE.toml")
    report: str | None = option(None, "where to write the HTML report (default: beside the model)", metavar="FILE")


class AuditOptions(Options):
    """Options of `audit`."""

    model: str = option(..., MODEL_HELP)
    data: str | None = option(None, "data to measure on (default: the held-out part of what it was made with)")
    eval_data: str | None = option(None, "held-out text, when --data names text files")
    parent: str | None = option(None, "the model to compare with (default: the one it was made from)")
    tasks: str | None = option(None, "tasks of lm-eval too, such as arc_easy,hellaswag (extra: gulliver[eval])")
    limit: int | None = option(None, "most items of each task (default: all)", metavar="N", ge=1)
    include_path: str | None = option(None, "folder with tasks of your own (YAML)", metavar="FOLDER")
    seed: int = option(0, "seed of everything random")


class OpeningOptions(Options):
    """What commands share that open one model to answer."""

    model: str = option(..., MODEL_HELP)
    threads: int | None = option(None, "threads (default: one per core)", metavar="N", group=RUNS, ge=1)
    isa: str = option("auto", ISA_HELP, group=RUNS)
    backend: str = option("auto", "what runs the model: auto, native or reference", group=RUNS)
    ram: str | None = option(
        None, "most memory of this whole process, e.g. 1GB; weights beyond it are read again at each step", group=RUNS
    )


class AskOptions(OpeningOptions):
    """Options of `ask`."""

    input: tuple[str, ...] = option(
        ..., "a prompt, texts, a picture's path, or one request as a JSON object; - reads it", positional=True
    )


class BenchOptions(Options):
    """Options of `bench`."""

    model: str = option(..., MODEL_HELP)
    repeats: int = option(9, "measured runs of everything, after one", ge=2)
    threads: int | None = option(None, "threads (default: one per core)", metavar="N", ge=1)
    isa: str = option("auto", ISA_HELP)


class AnswerOptions(OpeningOptions):
    """What `generate` and `chat` share. The names of the group are those of runtime.sampling.Sampling."""

    system: str | None = option(None, "the system message, for a model with a chat template", metavar="TEXT")
    temperature: float | None = option(
        None, "how random the choice of a token is; 0 takes the likeliest (default 0.7)", group=ANSWERS
    )
    top_p: float | None = option(
        None, "keep the fewest likeliest tokens that reach this probability (default 1: all)", group=ANSWERS
    )
    top_k: int | None = option(None, "keep this many of the likeliest tokens (default 0: all)", group=ANSWERS)
    min_p: float | None = option(
        None, "keep tokens at least this fraction as likely as the likeliest (default 0: all)", group=ANSWERS
    )
    repetition_penalty: float | None = option(
        None, "above 1: tokens that are there already become less likely (default 1)", group=ANSWERS
    )
    seed: int | None = option(None, "the same seed gives the same answer (default: another each time)", group=ANSWERS)


class GenerateOptions(AnswerOptions):
    """Options of `generate`."""

    max_tokens: int | None = option(None, "longest answer in tokens (default 512)", metavar="N", group=ANSWERS, ge=1)
    prompt: str | None = option(None, "what to answer; - reads standard input (as when it is piped)", metavar="TEXT")
    prompts: str | None = option(
        None, 'one prompt a line: text as JSON, {"prompt": …} or {"messages": […]}', metavar="FILE"
    )
    raw: bool = option(False, "continue the prompt itself, without the chat template")
    stop: tuple[str, ...] = option((), "end before this text; repeatable", metavar="TEXT")
    json_schema: str | None = option(None, "the answer is JSON that fits the schema in this file", metavar="FILE")


class ChatOptions(AnswerOptions):
    """Options of `chat`."""

    max_tokens: int | None = option(
        None, "longest answer in tokens (default: what the context holds)", metavar="N", group=ANSWERS, ge=1
    )


class ServeOptions(Options):
    """Options of `serve`."""

    models: tuple[str, ...] = option(
        ..., f"what to serve, as MODEL or NAME=MODEL; MODEL is {MODEL_HELP}", metavar="MODEL"
    )
    host: str = option("127.0.0.1", "address to listen on, this machine alone unless given; others need --api-keys")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    threads: int | None = option(None, "threads of each model (default: one per core)", metavar="N", ge=1)
    slots: int = option(16, "most completions in one step of a model", metavar="N", ge=1)
    cache_tokens: int | None = option(None, "tokens that a model's cache holds (default: by memory)", ge=1)
    queue: int = option(256, "most requests that wait for a model", metavar="N", ge=1)
    api_keys: str | None = option(None, "serve only requests with a key; see `gulliver keys`", metavar="FILE")
    without_keys: bool = option(False, "serve whoever reaches --host, although it is not this machine alone")
    allowed_host: tuple[str, ...] = option(
        (), "without keys, answer requests under this name too; repeatable", metavar="NAME"
    )
    verify: bool = option(False, "hash every file of the models again before they are served; refuse damaged ones")
    timeout: float = option(600.0, "seconds a request may take", metavar="SECONDS", gt=0)
    grace: float = option(30.0, "seconds running answers get on SIGTERM", metavar="SECONDS", ge=0)
    max_body: str = option("4MiB", "longest body of a request", metavar="SIZE")
    ram: str | None = option(
        None,
        "most memory of the server's whole process, e.g. 1GB; weights beyond it are read again at each step",
        metavar="SIZE",
    )
    backend: str = option("auto", "what runs the models: auto, native or reference")
    isa: str = option("auto", ISA_HELP)


class KeysOptions(Options):
    """Options of `keys`."""

    file: str = option(..., "the file of keys; it holds their hashes, never the keys")
    add: str | None = option(None, "make a key, print it once, and keep its hash under this name", metavar="NAME")
    remove: str | None = option(None, "take a key out; running servers refuse it within a second", metavar="NAME")
    requests_per_minute: int | None = option(None, "limit of the new key (default: none)", metavar="N", ge=1)
    tokens_per_minute: int | None = option(None, "limit of the new key (default: none)", metavar="N", ge=1)
