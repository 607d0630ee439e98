"""Chat templates: messages to the text a model was trained on, exactly as transformers' `apply_chat_template` does it.

Templates come with models and are untrusted code: they run in Jinja's immutable sandbox and see plain values alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from gulliver.core.errors import ArtifactError, ConfigError

Objects = Sequence[Mapping[str, Any]]
LIMIT_CHARACTERS = 4_000_000  # a rendered chat longer than this is refused: a template could loop without end
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template raises on messages that it was not made for."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message's reasoning comes; templates read the first, some the second."""


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without underscored names, through which a template could reach Python's own objects."""

    def __init__(*args: Any, **attributes: Any) -> None:  # so that namespace(self=…) works, as in Jinja itself
        self, *given = args
        values = dict(*given, **attributes)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template must not set {name!r}")


class _Dict:
    """`dict` for templates: a call and `fromkeys`, and nothing else to reach through."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote, which matters in training alone; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a short product cannot fill the memory."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self.filters["tojson"] = _to_json
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.globals |= {"dict": _Dict(), "namespace": _Namespace}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for value, times in ((left, right), (right, left)):
            long = hasattr(value, "__len__") and isinstance(times, int) and len(value) * times > LIMIT_CHARACTERS
            if long or (operator == "**" and isinstance(times, int) and abs(times) > LIMIT_CHARACTERS):
                raise jinja2.exceptions.SecurityError(f"a chat template must not compute so long a {operator}")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A model's templates: `sources` by name ("default", "tool_use", …), `tokens` like bos_token -> "<s>"."""

    def __init__(self, sources: Mapping[str, str], tokens: Mapping[str, str]) -> None:
        self.sources = dict(sources)
        self._tokens = dict(tokens)
        environment = _Sandbox()
        self._compiled: dict[str, jinja2.Template] = {}
        for name, source in self.sources.items():
            try:
                self._compiled[name] = environment.from_string(source)
            except jinja2.exceptions.TemplateError as error:
                raise ArtifactError(f"the model's chat template {name!r} cannot be read: {error}") from error

    def render(
        self, messages: Objects, tools: Objects | None = None, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a chat, as transformers' `apply_chat_template` renders it.

        `messages`: role, content, tool_calls, …; `tools`: JSON schemas of functions. ConfigError when the template
        refuses them or there is none.
        """
        name = "tool_use" if tools is not None and "tool_use" in self._compiled else "default"
        if name not in self._compiled:
            raise ConfigError("this model has no chat template; ask it for plain completions instead")
        if not messages:
            raise ConfigError("there are no messages; give at least one")
        values = self._tokens | variables | {"add_generation_prompt": add_generation_prompt, "documents": None}
        text, size = [], 0
        try:
            values |= {"messages": [_message(message) for message in messages], "tools": _plain(tools)}
            for part in self._compiled[name].generate(**values):
                text.append(part)
                size += len(part)
                if size > LIMIT_CHARACTERS:
                    raise ConfigError(f"the rendered chat has more than {LIMIT_CHARACTERS:,} characters; shorten it")
        except REFUSALS as error:
            reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            raise ConfigError(f"the model's chat template refuses these messages: {reason}") from error
        return "".join(text)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message for templates: keys without a value are left out, reasoning has the names that are read."""
    plain = {key: value for key, value in _plain(message).items() if value is not None}
    reasoning = next((plain[name] for name in REASONING if name in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """The value made of JSON's types alone; anything else becomes its type's name."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"
