"""The commands that are not steps, in one list. This file names functions and options as strings, so that reading the
list imports none of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from gulliver.cli.arguments import arguments
from gulliver.core.names import named


@dataclass(frozen=True)
class Command:
    """A command that is not a step: `function` is given (options, session) and returns (JSON document, lines of text).

    `function` is "file:function" of this folder, `model` a class of options.py. `streams` says that it writes to stdout
    itself, as the words come, unless --json is given. `cold` says that its first word must come at once: its options
    are checked by the parser alone, since importing pydantic takes a tenth of a second.
    """

    name: str
    function: str
    model: str
    help: str
    streams: bool = False
    cold: bool = False

    @property
    def options(self) -> str:
        """ "module:class" of its options."""
        return f"gulliver.cli.options:{self.model}"

    def act(self, given: Mapping[str, Any], session: Any) -> tuple[Any, list[str]]:
        """Do it with the options that were given; the others are at their defaults."""
        if self.cold:
            defaults = {argument.name: argument.default for argument in arguments(self.options)}
            options: Any = SimpleNamespace(**{**defaults, **given})
        else:
            options = named(self.options)(**given)
        return named(f"gulliver.cli.{self.function}")(options, session)


COMMANDS = (
    Command("fit", "make:fit", "FitOptions", "the best model that fits a budget of bytes, memory, speed and quality"),
    Command("run", "make:run", "RunOptions", "a whole life from a recipe; resumable; writes an HTML report"),
    Command("audit", "show:audit", "AuditOptions", "measure quality, size, memory and speed now"),
    Command("show", "show:show", "OneArtifact", "an artifact's card, lineage and evidence"),
    Command("verify", "show:verify", "VerifyOptions", "derive every hash of an artifact, or of a whole home, again"),
    Command("list", "show:list_all", "NoOptions", "all artifacts of this home"),
    Command("doctor", "show:doctor", "DoctorOptions",
            "cores, memory, instruction set, measured bandwidth and peaks, which kernels run and why"),
    Command("ask", "generate:ask", "AskOptions", "answer one request with a model of any family"),
    Command("generate", "generate:generate", "GenerateOptions", "answer a prompt, as the words come",
            streams=True, cold=True),
    Command("chat", "generate:chat", "ChatOptions", "talk with a model on the terminal", streams=True, cold=True),
    Command("bench", "show:bench", "BenchOptions",
            "prefill, decode, batch, cold start and memory of a model, measured now"),
    Command("serve", "serve:serve", "ServeOptions", "answer requests over HTTP as OpenAI's API does, with a chat page"),
    Command("keys", "serve:keys", "KeysOptions", "the API keys that `gulliver serve` asks for"),
)  # fmt: skip
