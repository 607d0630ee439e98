"""Recipes are checked whole before anything runs; every error names the line and the nearest thing that exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gulliver.core.errors import ConfigError
from gulliver.pipeline import steps
from gulliver.pipeline.recipe import GateCall, StepCall, key_lines, load, parse

STEPS = steps.STEPS
pytestmark = pytest.mark.usefixtures("toy_table")

GOOD = '''# a comment with [[step]] and bits = 2
name = "toy"

[[step]]
id = "parent"
use = "make"
weights = 32
source = """
[[step]]
bits = 3
"""

[[step]]
id = "small"
use = "shrink"
bits = 4
group_sizes = [
  32,
  64,
]
[step.inputs]
model = "parent"

[[gate]]
on = "small"
metric = "size_bytes"
at_most = 1000
'''


def test_a_good_recipe_keeps_the_order_of_the_file() -> None:
    recipe = parse(GOOD)
    parent, small, gate = recipe.calls
    assert recipe.name == "toy"
    assert isinstance(parent, StepCall)
    assert isinstance(small, StepCall)
    assert isinstance(gate, GateCall)
    assert [key_lines(GOOD)[at] for at in (("step", 0), ("step", 1), ("gate", 0))] == [4, 13, 24]
    assert dict(small.inputs) == {"model": "parent"}
    assert small.config.group_sizes == (32, 64)
    assert gate.gate.at_most == 1000


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ('name = "toy"', 'nmae = "toy"', 2, "unknown key 'nmae'; did you mean 'name'?"),
        ("weights = 32", "weigths = 32", 7, "has no key 'weigths'; did you mean 'weights'?"),
        ("weights = 32", "sed = 32", 7, "has no key 'sed'; did you mean 'seed'?"),
        ("weights = 32", 'weights = "x"', 7, "weights = 'x' is not valid"),
        ("bits = 4", "bits = 3", 16, "it takes 2 | 4 | 8, default 4"),
        ('use = "shrink"', 'use = "shrnk"', 15, "unknown step 'shrnk'; did you mean 'shrink'?"),
        ('use = "shrink"', "use = 3", 15, "use = 3 must be the name of a step"),
        ('id = "small"', 'id = "parent"', 14, "the id 'parent' is taken"),
        ('model = "parent"', 'modle = "parent"', 22, "takes no input 'modle'; did you mean 'model'?"),
        ('model = "parent"', 'model = "parnt"', 22, "'parnt' is not the id of an earlier step; did you mean 'parent'?"),
        ('model = "parent"', 'model = "small"', 22, "'small' is not the id of an earlier step"),
        ('model = "parent"', "", 21, "needs inputs = { model ="),
        ('on = "small"', 'on = "smal"', 25, "did you mean 'small'?"),
        ('on = "small"', "", 24, "this [[gate]] has no 'on'"),
        ('metric = "size_bytes"', 'metric = "size_byte"', 26, "did you mean 'size_bytes'?"),
        ("at_most = 1000", "at_mots = 1000", 27, "a gate has no key 'at_mots'; did you mean 'at_most'?"),
        ("at_most = 1000", "at_least = 1000", 26, "write at_most instead"),
        ("at_most = 1000", 'at_most = "x"', 27, "at_most = 'x' must be a number"),
        ("at_most = 1000", "at_most = nan", 26, "finite"),
    ],
)
def test_a_mistake_names_its_line_and_the_remedy(old: str, new: str, line: int, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        parse(GOOD.replace(old, new), "life.toml")
    assert f"life.toml, line {line}: " in str(caught.value)
    assert message in str(caught.value)


def test_only_a_model_is_judged() -> None:
    measured = '[[step]]\nid = "m"\nuse = "measure"\ninputs = { model = "small" }\n'
    gate = '[[gate]]\non = "m"\nmetric = "size_bytes"\nat_most = 1\n'
    with pytest.raises(ConfigError, match="a gate judges a model, but 'm' makes a report"):
        parse(GOOD + measured + gate)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has no \[\[step\]\]"),
        ("name = ", "not valid TOML"),
        ("step = 3", r"write each step as its own \[\[step\]\] table"),
        ('step = [{ id = "a", use = "make" }]', r"write each step as its own \[\[step\]\] table"),
        ("name = 3\n", "name = 3 must be text"),
        ("[step]\nid = 1", r"write each step"),
        ('[[step]]\nid = "a"\n', "this .* has no 'use'"),
        ('[[step]]\nid = "a"\nuse = "make"\ninputs = 3\n', "inputs = 3 must be a table"),
        ('[[step]]\nid = "a"\nuse = "make"\nseed = true\n', "seed is True; it must be a whole number"),
    ],
)
def test_hostile_recipes_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "binary.toml")
    (tmp_path / "long.toml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(ConfigError, match="at most 1000000"):
        load(tmp_path / "long.toml")


_WORD = st.text("abcdefgh_", min_size=1, max_size=6)
_VALUE = st.sampled_from(
    ["1", "true", '"x = 1"', "'''\n[a]\n'''", '"""\nk = 2\n"""', "[1,\n2,\n]", "{ a = 1 }", "[ # ]\n]"]
)


@given(st.lists(st.tuples(_WORD, st.lists(st.tuples(_WORD, _VALUE), max_size=4, unique_by=lambda pair: pair[0]))))
def test_every_key_is_found_on_its_line(tables: list[tuple[str, list[tuple[str, str]]]]) -> None:
    text, expected, counts = "", {}, {}
    for name, pairs in tables:
        index = counts[name] = counts.get(name, -1) + 1
        text += f"# [[{name}]]\n[[{name}]]\n"
        expected[(name, index)] = text.count("\n")
        for key, value in pairs:
            expected[(name, index, key)] = text.count("\n") + 1
            if value.startswith("{"):
                expected[(name, index, key, "a")] = expected[(name, index, key)]
            text += f"{key} = {value}\n"
    tomllib.loads(text)
    assert key_lines(text) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tokens = 1", "line 4: step 'sample': tokens = 1 is not valid"),
        ('tokens = "many"', "it takes int, default 512"),
        ("tokns = 8", "has no key 'tokns'; did you mean 'tokens'?"),
    ],
)
def test_options_of_a_family_are_checked_with_the_file(
    line: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "STEPS", STEPS)
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(f'[[step]]\nid = "a"\nuse = "sample"\n{line}\n')
