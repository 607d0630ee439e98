"""Every row of the table of steps: what it names is there, its config is strict, and it explains itself."""

from __future__ import annotations

import ast
import inspect
import re
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

import gulliver
from gulliver.cli.commands import COMMANDS
from gulliver.core.names import named
from gulliver.core.store.manifest import KINDS
from gulliver.pipeline import steps
from gulliver.pipeline.recipe import CALL_KEYS
from gulliver.pipeline.steps import INPUT_KINDS, STEPS, Step

each_step = pytest.mark.parametrize("row", STEPS, ids=lambda row: row.name)
UNITS = {
    "size": "_bytes",
    "ram": "_bytes",
    "memory": "_bytes",
    "latency": "_ms",
    "time": "_seconds",
    "duration": "_seconds",
    "timeout": "_seconds",
}
"""A field with this word in its name carries this unit, unless it counts something (`group_size`, `batch_size`)."""
COUNTS = ("group_size", "batch_size", "size", "spill_rows", "window_size", "block_size", "group_sizes")


def test_names_are_unique_and_no_command_shares_one() -> None:
    names = [row.name for row in STEPS] + [command.name for command in COMMANDS]
    assert len(names) == len(set(names))


def test_the_public_names_are_functions_and_editors_know_them() -> None:
    assert {"fit", "quantize", "generate"} < set(gulliver.__all__)
    stub = ast.parse(Path(gulliver.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    known = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    known |= {
        alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names if alias.asname
    }
    assert known == set(gulliver.__all__)
    assert Path(gulliver.__file__).with_name("py.typed").is_file()
    for name in gulliver.__all__:
        assert callable(getattr(gulliver, name))


@each_step
def test_the_function_is_there(row: Step) -> None:
    function = named(row.function)
    assert list(inspect.signature(function).parameters) == ["cfg", "inputs", "ctx"]
    assert inspect.isfunction(function)


@each_step
def test_inputs_and_outputs_are_known_kinds(row: Step) -> None:
    assert set(row.needs) | set(row.optional) <= set(INPUT_KINDS)
    assert not set(row.needs) & set(row.optional)
    assert row.makes
    assert set(row.makes) <= set(KINDS)
    assert row.version >= 1
    assert re.fullmatch(r"[a-z][^\n]{10,110}[^.\n]", row.help), "one line, lower case, no full stop"


@each_step
def test_the_config_is_frozen_and_strict(row: Step) -> None:
    config = named(row.options)
    assert issubclass(config, BaseModel)
    stage = row.function.split(".")[1]
    assert row.options == f"gulliver.{stage}.options:{row.name.capitalize()}Options"
    assert inspect.signature(named(row.function)).parameters["cfg"].annotation == config.__name__
    assert config.model_config.get("frozen")
    assert config.model_config.get("extra") == "forbid"
    assert set(row.reads) <= set(config.model_fields)


@each_step
def test_fields_carry_units_and_no_name_that_recipes_use(row: Step) -> None:
    fields = steps.fields_of(named(row.options))
    reserved = {*CALL_KEYS, *row.needs, *row.optional, "home", "database", "json", "quiet", "out", "progress"}
    assert not set(fields) & reserved
    for name in fields:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        for word, unit in UNITS.items():
            if word in name.split("_") and name not in COUNTS:
                assert name.endswith(unit), f"{row.name}.{name} must end with {unit}"


@each_step
def test_every_field_can_be_written_in_json_and_on_the_command_line(row: Step) -> None:
    for name, field in steps.fields_of(named(row.options)).items():
        assert field.annotation is not None
        assert not _callable_or_class(field.annotation), f"{row.name}.{name}: no class paths, no callables"
        if not field.is_required():
            default = field.get_default(call_default_factory=True)
            assert default is None or isinstance(default, (bool, int, float, str, tuple)), f"{row.name}.{name}"


def _callable_or_class(annotation: object) -> bool:
    if typing.get_origin(annotation) in (type, typing.get_origin(typing.Callable)):
        return True
    return any(_callable_or_class(part) for part in typing.get_args(annotation) if not isinstance(part, (str, int)))


@each_step
def test_an_unknown_key_is_refused_by_name(row: Step) -> None:
    with pytest.raises(steps.WrongKey, match=r"has no key 'no_such_key'|needs the key"):
        steps.checked_config(row, {"no_such_key": 1})
