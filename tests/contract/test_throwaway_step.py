"""A new step is its file and one row: in a copy of the package, by command line, recipe and Python.

The step takes several inputs in one role.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from package_copy import copy_package, python

STEP = '''
"""Step `blend`: count the models it is given."""

from __future__ import annotations

from pydantic import Field

from gulliver.core.options import Options


class BlendOptions(Options):
    """Options of `blend`."""

    scale: float = Field(1.0, gt=0, description="what is written into the report")


def run(cfg, inputs, ctx):
    names = [model.id for model in inputs["models"]]
    with ctx.writer(kind="report", task="toy", config=cfg) as writer:
        (writer.path / "blend.txt").write_text(f"{cfg.scale} {names}")
        return writer.commit()
'''
ROW = """STEPS = (
    Step(
        "blend",
        "gulliver.train.blend:run",
        "gulliver.train.blend:BlendOptions",
        needs=("models",),
        several=("models",),
        makes=("report",),
        help="count models that are given together",
    ),
"""
DRIVER = """
import sys
import toys
from gulliver.pipeline import steps
steps.STEPS = (*steps.STEPS, toys.TABLE[0])  # `make`: models to take
"""
RECIPE = """
[[step]]
id = "a"
use = "make"
weights = 8

[[step]]
id = "b"
use = "make"
weights = 9

[[step]]
id = "both"
use = "blend"
inputs = { models = ["a", "b"] }
scale = 0.5
"""
Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs Python code in a process that sees a copy of the package with one more step."""
    folder = tmp_path_factory.mktemp("package")
    package = copy_package(folder)
    (package / "train" / "blend.py").write_text(STEP)
    table = package / "pipeline" / "steps.py"
    table.write_text(table.read_text().replace("STEPS = (\n", ROW, 1))

    def started(code: str, *words: str, expected: int = 0) -> str:
        words = ("-W", "error", "-c", DRIVER + code, *words)
        return python(folder, *words, cwd=folder, expected=expected, HOME=str(folder))

    return started


CLI = "from gulliver.cli.main import main; sys.exit(main())"


def test_a_step_is_a_file_and_a_row(run: Run, tmp_path: Path) -> None:
    home = ["--home", str(tmp_path / "home"), "--json"]
    assert "count models that are given together" in run(CLI, "--help")
    shown = run(CLI, "blend", "--help")
    assert "MODELS [MODELS ...]" in shown and "what is written into the report (default 1)" in shown
    one, two = (json.loads(run(CLI, "make", "--weights", weights, *home))["id"] for weights in ("8", "9"))

    made = json.loads(run(CLI, "blend", one, two[:10], "--scale", "0.5", *home))
    assert made["reused"] is False and made["parents"] == [one, two]
    assert json.loads(run(CLI, "show", made["id"], *home))["inputs"] == {"models": [one, two]}
    turned = json.loads(run(CLI, "blend", two, one, "--scale", "0.5", *home))
    assert turned["id"] != made["id"], "the order of several inputs is part of the call"

    python = f"import gulliver; print(gulliver.blend([{one!r}, {two!r}], scale=0.5, home={home[1]!r}).id)"
    assert run(python).strip() == made["id"]
    assert "'blend'" in run("import gulliver; print(gulliver.__all__)")

    recipe = tmp_path / "blend.toml"
    recipe.write_text(RECIPE)
    calls = json.loads(run(CLI, "run", str(recipe), *home))["calls"]
    assert [(call["artifact"], call["reused"]) for call in calls] == [(one, True), (two, True), (made["id"], True)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"b"] }', '"c"] }', "line 15: input models = 'c' is not the id of an earlier step"),
        ('["a", "b"]', "[]", 'needs inputs = { models = ["the id of an earlier step", …] }'),
        ('["a", "b"]', "3", "models = 3 must be the id of an earlier step"),
        ("scale", "scael", "has no key 'scael'; did you mean 'scale'?"),
    ],
)
def test_several_inputs_are_checked_before_anything_runs(
    run: Run, tmp_path: Path, old: str, new: str, message: str
) -> None:
    recipe = tmp_path / "blend.toml"
    assert old in RECIPE
    recipe.write_text(RECIPE.replace(old, new))
    assert message in run(CLI, "run", str(recipe), "--home", str(tmp_path), expected=2)


def test_one_is_enough_and_several_where_one_is_wanted_are_refused(run: Run, tmp_path: Path) -> None:
    code = f"""
import gulliver
from gulliver.core.errors import ConfigError
from gulliver.pipeline.api import step_function
home = {str(tmp_path)!r}
one, two = (step_function("make")(weights=weights, home=home) for weights in (8, 9))
assert gulliver.blend(one, home=home).parents == (one.id,)
try:
    gulliver.speed([one, two], home=home)
except ConfigError as failure:
    print(failure)
"""
    assert run(code).strip() == "step 'speed' takes one model, not 2"
