"""Writes docs/steps.md from the table of steps; `make docs` runs it and a test compares the file with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gulliver.core.store.files import write_atomic
from gulliver.pipeline.steps import INPUT_KINDS, STEPS, Step, options_class, type_name

PAGE = Path(__file__).parent / "steps.md"

INTRODUCTION = """\
# Steps

*Made by `make docs` from the table in [`steps.py`](../src/gulliver/pipeline/steps.py); change it there.*

A step turns artifacts and a config into one artifact. Each is a command (`gulliver NAME`, keys as options:
`group_size` is `--group-size`), a function (`gulliver.NAME(…)`) and a `use = "NAME"` in a recipe. Keys that end in
`_bytes` read `64MB` (10⁶) and `64MiB` (2²⁰). A call that was made before, with the same config, inputs, local files and
seed, is found and not made again.
"""


def page() -> str:
    """The whole text of docs/steps.md."""
    return "\n".join([INTRODUCTION, *_overview(), *[line for row in STEPS for line in _section(row)]])


def _overview() -> list[str]:
    rows = [f"| [{row.name}](#{row.name}) | {_inputs(row)} | {' or '.join(row.makes)} | {row.help} |" for row in STEPS]
    return ["| step | inputs | makes | what it does |", "| --- | --- | --- | --- |", *rows, ""]


def _inputs(row: Step) -> str:
    return ", ".join([*row.needs, *(f"({role})" for role in row.optional)]) or "none"


def _section(row: Step) -> list[str]:
    lines = [
        f"## {row.name}",
        "",
        f"{row.help[:1].upper()}{row.help[1:]}. `{row.function}`, version {row.version}.",
        "",
    ]
    roles = [f"`{role}` (a {INPUT_KINDS[role]})" for role in row.needs]
    roles += [f"`{role}` (a {INPUT_KINDS[role]}, optional)" for role in row.optional]
    if roles:
        lines += [f"Inputs: {', '.join(roles)}.", ""]
    fields = options_class(row).model_fields
    if fields:
        lines += ["| key | takes | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [_row(name, field) for name, field in fields.items()]
        lines.append("")
    return lines


def _row(name: str, field: Any) -> str:
    default = "required" if field.is_required() else f"`{_written(field.get_default(call_default_factory=True))}`"
    cells = [f"`{name}`", type_name(field.annotation), default, field.description or ""]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _written(value: Any) -> str:
    """A default as users write it in a recipe."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    write_atomic(PAGE, page())
