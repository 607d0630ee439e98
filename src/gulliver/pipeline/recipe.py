"""TOML -> a checked list of step calls and gates, in file order. Nothing runs before the whole file is checked.

Every error names the file, the line, the value, and the nearest thing that exists.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gulliver.core.errors import ConfigError
from gulliver.core.evidence.gate import Gate
from gulliver.pipeline.steps import (
    INPUT_KINDS,
    Step,
    WrongKey,
    checked_config,
    did_you_mean,
    fields_of,
    find,
    options_class,
)

MAX_RECIPE_BYTES = 1_000_000
TOP_KEYS = ("name", "home", "seed", "step", "gate")
CALL_KEYS = ("id", "use", "inputs", "seed")
GATE_KEYS = ("on", "metric", "at_most", "at_least")


@dataclass(frozen=True)
class StepCall:
    """One [[step]]: `inputs` maps roles to the ids of earlier calls; `config` is checked."""

    id: str
    use: str
    inputs: Mapping[str, str | tuple[str, ...]]
    config: Any
    seed: int
    line: int


@dataclass(frozen=True)
class GateCall:
    """One [[gate]]: a rule over the evidence about the model that the call `on` made."""

    on: str
    gate: Gate
    line: int


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; `calls` are in file order."""

    name: str
    home: str | None
    calls: tuple[StepCall | GateCall, ...]


def load(path: Path | str) -> Recipe:
    """Read and check a recipe. ConfigError names the line and the remedy."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"recipe {path} does not exist; give the path of a .toml file")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes; a recipe has at most {MAX_RECIPE_BYTES}")
    try:
        return parse(path.read_bytes().decode("utf-8"), str(path))
    except UnicodeDecodeError as failure:
        raise ConfigError(f"{path} is not UTF-8 text (byte {failure.start}); save it as UTF-8") from None


def parse(text: str, source: str = "recipe") -> Recipe:
    """A checked Recipe from TOML text; `source` is its name in error messages."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as failure:
        raise ConfigError(f"{source} is not valid TOML: {failure}") from None
    return _Checker(source, key_lines(text), document).recipe()


class _Checker:
    """Holds what every check needs: the document, the line of each key, and the calls seen so far."""

    def __init__(self, source: str, lines: Mapping[tuple[Any, ...], int], document: dict[str, Any]) -> None:
        self.source, self.lines, self.document = source, lines, document
        self.made: dict[str, tuple[str, ...]] = {}

    def recipe(self) -> Recipe:
        for key, value in self.document.items():
            if key not in TOP_KEYS:
                raise self.error((key,), f"unknown key {key!r}{did_you_mean(key, TOP_KEYS)}")
            if key in ("name", "home"):
                self.typed((key,), value, str, "text")
        seed = self.seed((), self.document)
        tables = self.tables("step") + self.tables("gate")
        if not self.document.get("step"):
            raise ConfigError(f"{self.source} has no [[step]]; a recipe is a list of steps")
        calls: list[StepCall | GateCall] = []
        for line, kind, index in sorted(tables):
            table = self.document[kind][index]
            if kind == "step":
                calls.append(self.step((kind, index), table, line, seed))
            else:
                calls.append(self.gate((kind, index), table, line))
        name = self.document.get("name", Path(self.source).stem)
        return Recipe(name=name, home=self.document.get("home"), calls=tuple(calls))

    def tables(self, kind: str) -> list[tuple[int, str, int]]:
        """(line, kind, index) of every table of `kind`; their order in the file is the order of the run."""
        entries = self.document.get(kind, [])
        if not isinstance(entries, list) or ((kind, len(entries) - 1) not in self.lines and entries):
            raise self.error((kind,), f"write each {kind} as its own [[{kind}]] table")
        return [(self.lines[(kind, index)], kind, index) for index in range(len(entries))]

    def step(self, at: tuple[Any, ...], table: dict[str, Any], line: int, seed: int) -> StepCall:
        name = self.typed((*at, "use"), self.required(at, table, "use"), str, "the name of a step")
        identity = self.typed((*at, "id"), self.required(at, table, "id"), str, "text")
        if identity in self.made:
            raise self.error((*at, "id"), f"the id {identity!r} is taken by an earlier step; choose another")
        try:
            row = find(name)
        except ConfigError as failure:
            raise self.error((*at, "use"), str(failure)) from None
        try:
            values = {key: value for key, value in table.items() if key not in CALL_KEYS}
            config = checked_config(row, values)
        except WrongKey as failure:
            message = str(failure)
            if failure.kind == "unknown":
                known = (*CALL_KEYS, *fields_of(options_class(row)))
                message = f"step {name!r} has no key {failure.key!r}{did_you_mean(failure.key, known)}"
            raise self.error((*at, failure.key), message) from None
        except ConfigError as failure:
            raise self.error(at, str(failure)) from None
        inputs = self.inputs((*at, "inputs"), table.get("inputs", {}), row)
        self.made[identity] = row.makes
        return StepCall(identity, name, inputs, config, self.seed(at, table, seed), line)

    def inputs(self, at: tuple[Any, ...], inputs: Any, row: Step) -> dict[str, str | tuple[str, ...]]:
        self.typed(at, inputs, dict, 'a table such as { model = "parent" }')
        found: dict[str, str | tuple[str, ...]] = {}
        known = (*row.needs, *row.optional)
        for role, reference in inputs.items():
            if role not in known:
                raise self.error((*at, role), f"step {row.name!r} takes no input {role!r}{did_you_mean(role, known)}")
            if role in row.several and isinstance(reference, list):
                found[role] = tuple(self.earlier((*at, role), one) for one in reference)
            else:
                found[role] = self.earlier((*at, role), reference)
        for role in row.needs:
            if not found.get(role):
                one = '["the id of an earlier step", …]' if role in row.several else '"the id of an earlier step"'
                raise self.error(at, f"step {row.name!r} needs inputs = {{ {role} = {one} }}")
        return found

    def earlier(self, at: tuple[Any, ...], reference: Any) -> str:
        """The id of an earlier step that makes what the input at[-1] must be."""
        role = at[-1]
        self.typed(at, reference, str, "the id of an earlier step")
        if reference not in self.made:
            told = f"input {role} = {reference!r} is not the id of an earlier step"
            raise self.error(at, told + did_you_mean(reference, self.made))
        if INPUT_KINDS[role] not in self.made[reference]:
            made = " or ".join(self.made[reference])
            raise self.error(at, f"input {role} must be a {INPUT_KINDS[role]}, but {reference!r} makes a {made}")
        return reference

    def gate(self, at: tuple[Any, ...], table: dict[str, Any], line: int) -> GateCall:
        for key in table:
            if key not in GATE_KEYS:
                raise self.error((*at, key), f"a gate has no key {key!r}{did_you_mean(key, GATE_KEYS)}")
        on = self.typed((*at, "on"), self.required(at, table, "on"), str, "the id of an earlier step")
        if on not in self.made:
            raise self.error((*at, "on"), f"on = {on!r} is not the id of an earlier step{did_you_mean(on, self.made)}")
        if "model" not in self.made[on]:
            raise self.error((*at, "on"), f"a gate judges a model, but {on!r} makes a {' or '.join(self.made[on])}")
        metric = self.typed((*at, "metric"), self.required(at, table, "metric"), str, "the name of a metric")
        limits = {key: table[key] for key in ("at_most", "at_least") if key in table}
        for key, value in limits.items():
            self.typed((*at, key), value, (int, float), "a number")
        try:
            return GateCall(on, Gate(metric, **limits), line)
        except ConfigError as failure:
            raise self.error((*at, "metric"), str(failure)) from None

    def seed(self, at: tuple[Any, ...], table: dict[str, Any], default: int = 0) -> int:
        return self.typed((*at, "seed"), table.get("seed", default), int, "a whole number")

    def required(self, at: tuple[Any, ...], table: dict[str, Any], key: str) -> Any:
        if key in table:
            return table[key]
        raise self.error(at, f"this [[{at[0]}]] has no {key!r}; add {key} = …")

    def typed(self, at: tuple[Any, ...], value: Any, kind: type | tuple[type, ...], expected: str) -> Any:
        if isinstance(value, kind) and not isinstance(value, bool):
            return value
        raise self.error(at, f"{at[-1]} = {value!r} must be {expected}")

    def error(self, at: tuple[Any, ...], message: str) -> ConfigError:
        """The message with the file and the line of the key, or of the closest table around it."""
        while at and at not in self.lines:
            at = at[:-1]
        return ConfigError(f"{self.source}, line {self.lines.get(at, 1)}: {message}")


# ---- the line of each key (tomllib does not tell) -----------------------------------------------------------------

_STRING = re.compile(r'"""(?:\\.|[^\\])*?"""|\'\'\'.*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'', re.DOTALL)
_HEADER = re.compile(r"(\[\[?)\s*([^\[\]\n]+?)\s*\]\]?")
_KEY = re.compile(r"""((?:[\w-]+|"[^"\n]*"|'[^'\n]*')(?:\s*\.\s*(?:[\w-]+|"[^"\n]*"|'[^'\n]*'))*)\s*=""")


def key_lines(text: str) -> dict[tuple[Any, ...], int]:
    """Line numbers, from 1, of every table and key of valid TOML text, by path: ("step", 0, "bits") -> 7.

    Keys of inline tables are found too when they are alone on their path; values are skipped over.
    """
    lines: dict[tuple[Any, ...], int] = {}
    counts: dict[tuple[Any, ...], int] = {}
    table: tuple[Any, ...] = ()
    for line, statement in _statements(text):
        header = _HEADER.match(statement)
        if header:
            path = _resolved(_parts(header[2]), counts)
            if header[1] == "[[":
                counts[path] = counts.get(path, -1) + 1
                path = (*path, counts[path])
            table = path
            lines.setdefault(path, line)
            continue
        key = _KEY.match(statement)
        if key:
            parts = _parts(key[1])
            for depth in range(len(parts)):
                lines.setdefault((*table, *parts[: depth + 1]), line)
    return lines


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every statement: a header, or a key with its value over as many lines as that takes."""
    position, start, depth, line, first = 0, 0, 0, 1, 1
    while position < len(text):
        character = text[position]
        string = _STRING.match(text, position) if character in "\"'" else None
        if string:
            line += string[0].count("\n")
            position = string.end()
            continue
        if character == "#":
            end = text.find("\n", position)
            position = len(text) if end < 0 else end
            continue
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(character, 0)
        position += 1
        line += character == "\n"
        if character == "\n" and depth <= 0:
            yield first, text[start:position].strip()
            start, depth, first = position, 0, line
    yield first, text[start:position].strip()


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part[1:-1] if part[0] in "\"'" else part for part in re.findall(r"[\w-]+|\"[^\"]*\"|'[^']*'", dotted))


def _resolved(parts: tuple[str, ...], counts: Mapping[tuple[Any, ...], int]) -> tuple[Any, ...]:
    """[step.inputs] belongs to the last [[step]]: put its index into the path."""
    path: tuple[Any, ...] = ()
    for depth, part in enumerate(parts):
        path = (*path, part)
        if path in counts and depth < len(parts) - 1:
            path = (*path, counts[path])
    return path
