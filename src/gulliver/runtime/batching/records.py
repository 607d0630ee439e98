"""What goes into an engine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from gulliver.core.errors import ConfigError, GulliverError
from gulliver.runtime.batching.grammar import Grammar
from gulliver.runtime.batching.refusals import EngineClosed, EngineLost, QueueFull
from gulliver.runtime.sampling import Sampling

__all__ = ["EngineClosed", "EngineLost", "Piece", "QueueFull", "Request", "TokenChoice", "check_finish"]


@dataclass(frozen=True)
class Request:
    """One completion asked of an engine."""

    prompt: tuple[int, ...]  # tokens, at least one
    max_tokens: int | None = None  # None: the rest of the context; 0 only with echo_logprobs
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()  # texts that end the answer; they are not part of it
    stop_tokens: tuple[int, ...] = ()  # besides the model's own
    ignore_end: bool = False  # continue past the end token (benchmarks)
    top_logprobs: int | None = None  # None: no logprobs; 0: of the chosen token alone
    echo_logprobs: bool = False  # logprobs of the prompt's tokens too (completions with echo)
    grammar: Grammar | None = None  # from engine.grammars
    timeout_seconds: float | None = None  # counted from submit, waiting included
    owner: str = ""  # prompts that begin alike share what was computed when their owner is the same

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError("the prompt is empty; give at least one token")
        if self.max_tokens is not None and self.max_tokens < (0 if self.echo_logprobs else 1):
            raise ConfigError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if self.top_logprobs is not None and self.top_logprobs < 0:
            raise ConfigError(f"top_logprobs is {self.top_logprobs}; it must be 0 or more")
        if self.timeout_seconds is not None and not self.timeout_seconds > 0:
            raise ConfigError(f"timeout_seconds is {self.timeout_seconds}; it must be above 0")
        if not all(self.stop):
            raise ConfigError("a stop text is empty; leave it out")


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """One token of an answer. Logprobs are of the model itself: natural, before temperature, penalties and masks."""

    id: int
    text: bytes  # what it writes in UTF-8, maybe a part of a character; a special token (never in the text): its name
    logprob: float | None = None  # None when not asked for, and for a prompt's first token
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens and their logprobs, best first


@dataclass(frozen=True, slots=True)
class Piece:
    """What an engine delivers: text that is certain (no half characters, nothing that may be part of a stop).

    The last piece of every request, and only that one, has `finish`: "stop", "length", "cancelled", "timeout" or
    "error: …". The numbers count from the request's beginning. `completion_tokens` counts an end token, `tokens` does
    not hold it. A token comes with the piece that completes its text; tokens cut off by a stop text never come.
    """

    text: str
    tokens: tuple[TokenChoice, ...] = ()
    finish: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the cache
    completion_tokens: int = 0
    prompt: tuple[TokenChoice, ...] = ()  # with echo_logprobs, in one piece before any text


def check_finish(finish: str | None) -> None:
    """GulliverError for an answer that ended by an error of the engine."""
    if finish is not None and finish.startswith("error: "):
        raise GulliverError(finish.removeprefix("error: "))
