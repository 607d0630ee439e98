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
from gulliver.core.foreign import foreign, read_bytes
from gulliver.core.names import did_you_mean
from gulliver.core.quantities import checked_seed
from gulliver.core.store.files import named_path
from gulliver.pipeline.steps import INPUT_KINDS, Step, WrongKey, checked_config, find

MAX_RECIPE_BYTES = 1_000_000
MAX_KEY_PARTS, MAX_VALUES = 32, 20_000
"""Parts of a key, or brackets inside each other, whose square TOML's reader takes in time; and of all values."""
TOP_KEYS = ("name", "home", "seed", "step", "gate")
CALL_KEYS = ("id", "use", "inputs", "seed")
LIMITS = ("at_most", "at_least")
GATE_KEYS = ("on", "metric", *LIMITS)


@dataclass(frozen=True)
class StepCall:
    """One [[step]]: `inputs` maps roles to the ids of earlier calls; `config` is checked."""

    id: str
    use: str
    inputs: Mapping[str, str | tuple[str, ...]]
    config: Any
    seed: int


@dataclass(frozen=True)
class GateCall:
    """One [[gate]]: a rule over the evidence about the model that the call `on` made."""

    on: str
    gate: Gate


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; `calls` are in file order."""

    name: str
    home: str | None
    calls: tuple[StepCall | GateCall, ...]


def load(path: Path | str) -> Recipe:
    """Read and check a recipe. ConfigError names the line and the remedy."""
    path = named_path(path)
    if not path.is_file():
        raise ConfigError(f"recipe {path} does not exist; give the path of a .toml file")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes; a recipe has at most {MAX_RECIPE_BYTES}")
    try:
        return parse(read_bytes(path, MAX_RECIPE_BYTES, ConfigError).decode("utf-8"), str(path))
    except UnicodeDecodeError as failure:
        raise ConfigError(f"{path} is not UTF-8 text (byte {failure.start}); save it as UTF-8") from None


def parse(text: str, source: str = "recipe") -> Recipe:
    """A checked Recipe from TOML text; `source` is its name in error messages."""
    with foreign(f"{source} is not valid TOML", ConfigError):
        _check_depth(text)
        document, lines = tomllib.loads(text), key_lines(text)
    return _Checker(source, lines, document).recipe()


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
        self.seed((), self.document)
        tables = self.tables("step") + self.tables("gate")
        if not self.document.get("step"):
            raise ConfigError(f"{self.source} has no [[step]]; a recipe is a list of steps")
        checks = {"step": self.step, "gate": self.gate}
        calls = tuple(checks[kind]((kind, index), self.document[kind][index]) for _, kind, index in sorted(tables))
        return Recipe(self.document.get("name", Path(self.source).stem), self.document.get("home"), calls)

    def tables(self, kind: str) -> list[tuple[int, str, int]]:
        """(line, kind, index) of every table of `kind`; their order in the file is the order of the run."""
        entries = self.document.get(kind, [])
        if not isinstance(entries, list) or ((kind, len(entries) - 1) not in self.lines and entries):
            raise self.error((kind,), f"write each {kind} as its own [[{kind}]] table")
        return [(self.lines[(kind, index)], kind, index) for index in range(len(entries))]

    def step(self, at: tuple[Any, ...], table: dict[str, Any]) -> StepCall:
        name = self.text(at, table, "use", "the name of a step")
        identity = self.text(at, table, "id")
        if identity in self.made:
            raise self.error((*at, "id"), f"the id {identity!r} is taken by an earlier step; choose another")
        try:
            row = find(name)
        except ConfigError as failure:
            raise self.error((*at, "use"), str(failure)) from None
        try:
            values = {key: value for key, value in table.items() if key not in CALL_KEYS}
            config = checked_config(row, values, also=CALL_KEYS)
        except ConfigError as failure:
            raise self.error((*at, failure.key) if isinstance(failure, WrongKey) else at, str(failure)) from None
        inputs = self.inputs((*at, "inputs"), table.get("inputs", {}), row)
        self.made[identity] = row.makes
        return StepCall(identity, name, inputs, config, self.seed(at, self.document | table))

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

    def gate(self, at: tuple[Any, ...], table: dict[str, Any]) -> GateCall:
        for key in table:
            if key not in GATE_KEYS:
                raise self.error((*at, key), f"a gate has no key {key!r}{did_you_mean(key, GATE_KEYS)}")
        on = self.text(at, table, "on", "the id of an earlier step")
        if on not in self.made:
            raise self.error((*at, "on"), f"on = {on!r} is not the id of an earlier step{did_you_mean(on, self.made)}")
        if "model" not in self.made[on]:
            raise self.error((*at, "on"), f"a gate judges a model, but {on!r} makes a {' or '.join(self.made[on])}")
        metric = self.text(at, table, "metric", "the name of a metric")
        given = [key for key in LIMITS if key in table]
        limits = {key: self.typed((*at, key), table[key], (int, float), "a number") for key in given}
        try:
            return GateCall(on, Gate(metric, **limits))
        except ConfigError as failure:
            raise self.error((*at, "metric"), str(failure)) from None

    def seed(self, at: tuple[Any, ...], table: dict[str, Any]) -> int:
        try:
            return checked_seed(table.get("seed", 0))
        except ConfigError as failure:
            raise self.error((*at, "seed"), str(failure)) from None

    def text(self, at: tuple[Any, ...], table: dict[str, Any], key: str, expected: str = "text") -> str:
        if key not in table:
            raise self.error(at, f"this [[{at[0]}]] has no {key!r}; add {key} = …")
        return self.typed((*at, key), table[key], str, expected)

    def typed(self, at: tuple[Any, ...], value: Any, kind: type | tuple[type, ...], expected: str) -> Any:
        if isinstance(value, kind) and not isinstance(value, bool):
            return value
        raise self.error(at, f"{at[-1]} = {value!r} must be {expected}")

    def error(self, at: tuple[Any, ...], message: str) -> ConfigError:
        """The message with the file and the line of the key, or of the closest table around it."""
        while at and at not in self.lines:
            at = at[:-1]
        return ConfigError(f"{self.source}, line {self.lines.get(at, 1)}: {message[:600]}")


# ---- the line of each key (tomllib does not tell) -----------------------------------------------------------------

_OPAQUE = re.compile(r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*', re.DOTALL)
"""Strings and comments: brackets and line ends in them end nothing."""
_STEP = re.compile(r"[\[\]{}]|[^\[\]{},=\n]+")
"""A bracket, or what may be a key."""


def key_lines(text: str) -> dict[tuple[Any, ...], int]:
    """Line numbers, from 1, of every table and key of valid TOML text, by path: ("step", 0, "bits") -> 7."""
    lines: dict[tuple[Any, ...], int] = {}
    counts: dict[tuple[Any, ...], int] = {}
    table: tuple[Any, ...] = ()
    for line, statement in _statements(text):
        found = tomllib.loads(statement)
        if statement.lstrip().startswith("["):
            table = _table(found, counts)
            lines.setdefault(table, line)
        else:
            for path in _paths(found):
                lines.setdefault((*table, *path), line)
    return lines


def _check_depth(text: str) -> None:
    """ValueError for a key of too many parts, for too many brackets inside each other, and for too many values."""
    bare, depth = _OPAQUE.sub(lambda found: "\n" * found[0].count("\n"), text), 0
    for count, found in enumerate(_STEP.finditer(bare)):
        if count > 2 * MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES} keys and values")
        depth += 1 if found[0] in "[{" else -1 if found[0] in "]}" else 0
        if depth > MAX_KEY_PARTS or found[0].count(".") >= MAX_KEY_PARTS:
            line = bare.count("\n", 0, found.start()) + 1
            raise ValueError(
                f"more than {MAX_KEY_PARTS} parts of a key, or brackets, are inside each other (line {line})"
            )


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every statement: a header, or a key with its value over as many lines as that takes."""
    start, end, depth, line = 0, 0, 0, 1
    empty = True
    for bare in _OPAQUE.sub(lambda found: " " * len(found[0]), text).split("\n"):
        end += len(bare) + 1
        empty = empty and not bare.strip()
        depth += sum(map(bare.count, "[{")) - sum(map(bare.count, "]}"))
        if depth == 0:
            if not empty:
                yield line, text[start:end]
            empty = True
            line += text.count("\n", start, end)
            start = end


def _table(header: dict[str, Any], counts: dict[tuple[Any, ...], int]) -> tuple[Any, ...]:
    """The path of a header that was read alone: [step.inputs] belongs to the last [[step]], whose index is in it."""
    path: tuple[Any, ...] = ()
    inside: Any = header
    while inside:
        [(key, inside)] = inside.items()
        path = (*path, key)
        if isinstance(inside, list):
            counts[path] = counts.get(path, -1) + 1
            inside = inside[0]
        if path in counts:
            path = (*path, counts[path])
    return path


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of the keys in a value, those of inline tables included."""
    for key in value if isinstance(value, dict) else ():
        yield (*path, key)
        yield from _paths(value[key], (*path, key))
