"""Where chat templates run: a small process of their own, with limits that the kernel enforces.

A template comes with a model, so it is a stranger's program. Jinja's immutable sandbox keeps it from Python's objects,
but not from loops that print nothing, from products that fill the memory, nor from one comparison of nested lists that
never ends. So it is compiled and run here, under a limit of memory for the process and of processor time for each text,
past which the kernel kills it, whatever it is doing. The server's process only waits (chat_template.py), and others run
meanwhile. This file is run by its path, so that nothing but Jinja is imported.

Messages to it are a length and JSON: first `sys.path`, the sources by name and the limit of time, then (name, values)
for every text. Each is answered by one letter, a length and text: see ANSWERS.
"""

from __future__ import annotations

import json
import resource
import signal
import struct
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, BinaryIO

LIMIT_CHARACTERS = 4_000_000  # of a text
LIMIT_BYTES = 512 * 2**20  # address space of the process
LIMIT_SECONDS = 10.0  # of processor time for a text; a conversation of a thousand messages takes a hundredth
HEAD = struct.Struct("<cI")
TEXT, REFUSED, UNREADABLE = b"t", b"r", b"u"
ANSWERS = {TEXT: "the text", REFUSED: "why the template refuses", UNREADABLE: "why it cannot be compiled"}


def environment() -> Any:
    """Jinja as transformers sets it up for chat templates."""
    import jinja2.exceptions
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Namespace(jinja2.utils.Namespace):
        """Jinja's own without underscored names, through which a template could reach Python's own objects."""

        def __init__(*args: Any, **attributes: Any) -> None:  # so that namespace(self=…) works, as in Jinja itself
            self, *given = args
            values = dict(*given, **attributes)
            for name in values:
                refuse_private(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            refuse_private(name)
            super().__setitem__(name, value)

    def refuse_private(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template must not set {name!r}")

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what an assistant wrote, which matters in training alone: here it is its body."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Jinja's sandbox; a product that is too long is named, where the limit of memory would not say why."""

        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            for value, times in ((left, right), (right, left)):
                long = hasattr(value, "__len__") and isinstance(times, int) and len(value) * times > LIMIT_CHARACTERS
                if long or (operator == "**" and isinstance(times, int) and abs(times) > LIMIT_CHARACTERS):
                    raise jinja2.exceptions.SecurityError(f"a chat template must not compute so long a {operator}")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": raise_exception, "strftime_now": _strftime_now}
    made.globals |= {"dict": _Dict(), "namespace": Namespace}
    return made


class _Dict:
    """`dict` for templates: a call and `fromkeys`, and nothing else to reach through."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def receive(stream: BinaryIO) -> Any:
    """The next message; None at the end."""
    head = stream.read(HEAD.size)
    return json.loads(stream.read(HEAD.unpack(head)[1])) if len(head) == HEAD.size else None


def reason_of(error: BaseException) -> str:
    """What an error says, as one line."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def _limited(seconds: float, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` gives for the arguments; past its processor time the kernel ends the process."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return work(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _compiled(sources: Mapping[str, str]) -> dict[str, Any]:
    jinja = environment()
    return {name: jinja.from_string(source) for name, source in sources.items()}


def _text(template: Any, values: Mapping[str, Any]) -> str:
    text, size = [], 0
    for part in template.generate(**values):
        text.append(part)
        size += len(part)
        if size > LIMIT_CHARACTERS:
            raise ValueError(f"the rendered chat has more than {LIMIT_CHARACTERS:,} characters; shorten it")
    return "".join(text)


def main() -> None:
    """Answer until the end of standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the terminal is meant for the parent
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process; the parent may have ignored or blocked it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    given, answer = sys.stdin.buffer, sys.stdout.buffer
    path, sources, seconds = receive(given)
    sys.path[:] = path
    datetime.now().astimezone()  # reads the time zone's file
    for limit, most in ((resource.RLIMIT_AS, LIMIT_BYTES), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    templates: dict[str, Any] = {}
    while (job := receive(given)) is not None:
        name, values = job
        kind = UNREADABLE
        try:
            if not templates:
                templates = _limited(seconds, _compiled, sources)
            kind = REFUSED
            text = _limited(seconds, _text, templates[name], values).encode("utf-8", "surrogatepass")
            kind = TEXT
        except MemoryError:
            text = f"it takes more than {LIMIT_BYTES >> 20} MiB of memory".encode()
        except Exception as error:
            text = reason_of(error).encode("utf-8", "surrogatepass")
        answer.write(HEAD.pack(kind, len(text)) + text)
        answer.flush()


if __name__ == "__main__":
    main()
