"""Writes all that is made from the tables of steps and commands; `make docs` runs it, a test compares the files.

docs/steps.md and docs/commands.md for people, cli/parsers.json for a fast `--help`, __init__.pyi for editors.
"""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import gulliver
from gulliver.cli import arguments as records
from gulliver.cli.arguments import Argument, parsers_json
from gulliver.cli.commands import COMMANDS
from gulliver.cli.parser import EVERYWHERE, MAKING
from gulliver.core.names import named
from gulliver.core.store.files import write_atomic
from gulliver.pipeline.steps import INPUT_KINDS, STEPS, Step, fields_of

ROOT = Path(__file__).parent.parent

STEPS_PAGE = """\
# Steps

*Made by `make docs` from the table in [`steps.py`](../src/gulliver/pipeline/steps.py); change it there.*

A step turns artifacts and a config into one artifact. Each is a command (`gulliver NAME`, keys as options:
`group_size` is `--group-size`), a function (`gulliver.NAME(…)`) and a `use = "NAME"` in a recipe. Keys that end in
`_bytes` read `64MB` (10⁶) and `64MiB` (2²⁰). A call that was made before, with the same config, inputs, local files and
seed, is found and not made again.
"""

COMMANDS_PAGE = """\
# Commands

*Made by `make docs` from the table in [`commands.py`](../src/gulliver/cli/commands.py); change it there.*

Each step is a command too: [steps](steps.md). Exit codes: 0 passed, 1 bug, 2 bad input, 3 a gate refused, 4 the budget
is infeasible. Results go to stdout, progress and errors to stderr.
"""

STUB = '''\
"""The public names as editors see them. Made by `make docs` from the table of steps; change it there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from gulliver.core.progress import Progress
from gulliver.core.store.artifact import Artifact
'''


def files() -> dict[Path, str]:
    """What every generated file holds."""
    options = [row.options for row in (*STEPS, *COMMANDS)]
    return {
        ROOT / "docs" / "steps.md": steps_page(),
        ROOT / "docs" / "commands.md": commands_page(),
        ROOT / "src" / "gulliver" / "cli" / "parsers.json": parsers_json([*options, EVERYWHERE, MAKING]),
        ROOT / "src" / "gulliver" / "__init__.pyi": stub(),
    }


# ---- pages -----------------------------------------------------------------------------------------------------------


def steps_page() -> str:
    """The whole text of docs/steps.md."""
    rows = [f"| [{row.name}](#{row.name}) | {_inputs(row)} | {' or '.join(row.makes)} | {row.help} |" for row in STEPS]
    lines = ["| step | inputs | makes | what it does |", "| --- | --- | --- | --- |", *rows, ""]
    return "\n".join([STEPS_PAGE, *lines, *[line for row in STEPS for line in _step(row)]])


def _inputs(row: Step) -> str:
    return ", ".join([*row.needs, *(f"({role})" for role in row.optional)]) or "none"


def _step(row: Step) -> list[str]:
    lines = [
        f"## {row.name}",
        "",
        f"{row.help[:1].upper()}{row.help[1:]}. `{row.function}`, version {row.version}.",
        "",
    ]
    roles = [f"`{role}` ({_kind(row, role)})" for role in row.needs]
    roles += [f"`{role}` ({_kind(row, role)}, optional)" for role in row.optional]
    if roles:
        lines += [f"Inputs: {', '.join(roles)}.", ""]
    return [*lines, *_table("key", {f"`{one.name}`": one for one in records.made(row.options)})]


def _kind(row: Step, role: str) -> str:
    return f"several {INPUT_KINDS[role]}s" if role in row.several else f"a {INPUT_KINDS[role]}"


def commands_page() -> str:
    """The whole text of docs/commands.md."""
    lines = [COMMANDS_PAGE]
    for row in COMMANDS:
        lines += [f"## {row.name}", "", f"{row.help[:1].upper()}{row.help[1:]}.", "", *_options(row.options)]
    return "\n".join([*lines, "## Every command", "", *_options(EVERYWHERE)])


def _options(options: str) -> list[str]:
    rows = {f"`{one.metavar if one.positional else one.flag}`": one for one in records.made(options)}
    return _table("option", rows)


def _table(first: str, rows: dict[str, Argument]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {first} | takes | default | meaning |", "| --- | --- | --- | --- |"]
    for name, one in rows.items():
        cells = [name, one.takes, "required" if one.required else f"`{_written(one.default)}`", one.help]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def _written(value: Any) -> str:
    """A default as users write it in a recipe."""
    if value in (None, []):
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- the stub --------------------------------------------------------------------------------------------------------


def stub() -> str:
    """The whole text of __init__.pyi."""
    places = {name: place.split(":") for name, place in gulliver.FUNCTIONS.items()}
    imports = [f"from {module} import {attribute} as {name}" for name, (module, attribute) in places.items()]
    names = ", ".join(f'"{name}"' for name in gulliver.__all__)
    return "\n".join(
        [
            STUB + "\n".join(sorted(imports)),
            "",
            "__version__: str",
            f"__all__ = [{names}]",
            "",
            "_Source = str | Path | Artifact",
            '"""An artifact, its id, its folder, or what `pull` and `read` take."""',
            *[line for row in STEPS for line in _function(row)],
        ]
    )


def _function(row: Step) -> list[str]:
    """One step as a function."""
    given = [_input(row, role) for role in row.needs] + [f"{_input(row, role)} | None = None" for role in row.optional]
    fields = [_field(name, info) for name, info in fields_of(named(row.options)).items()]
    shared = [
        "home: Path | str | None = None",
        "database_url: str | None = None",
        "seed: int = 0",
        "progress: Progress | None = None",
    ]
    parameters = [*given, "*", *fields, *shared] if given else [*fields, "*", *shared]
    return ["", f"def {row.name}(", *(f"    {one}," for one in parameters), ") -> Artifact:", f'    """{row.help}"""']


def _input(row: Step, role: str) -> str:
    return f"{role}: Sequence[_Source]" if role in row.several else f"{role}: _Source"


def _field(name: str, info: Any) -> str:
    kind = _python(info.annotation)
    if name.endswith("_bytes"):
        kind = kind.replace("int", "int | str", 1)
    return (
        f"{name}: {kind}" if info.is_required() else f"{name}: {kind} = {info.get_default(call_default_factory=True)!r}"
    )


def _python(annotation: Any) -> str:
    """A type as Python source."""
    if annotation is NoneType:
        return "None"
    if get_origin(annotation) is Annotated:
        return _python(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_python(part) for part in get_args(annotation))
    if get_origin(annotation) is Literal:
        return f"Literal[{', '.join(map(repr, get_args(annotation)))}]"
    return str(annotation) if get_args(annotation) else annotation.__name__


if __name__ == "__main__":
    for path, text in files().items():
        write_atomic(path, text)
