"""What a new family of models costs: its own folder under tasks/, one row in TASKS, and its metrics. Nothing else.

A copy of the package gets the throw-away family in new_family/digits_toy (sequences of digits, with a metric of its
own); then the real commands make, compress, measure, judge, ask and serve a model of it.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from package_copy import copy_package, python

ROOT = Path(__file__).parent.parent.parent
FAMILY = Path(__file__).parent / "new_family" / "digits_toy"
ROW = """\
    "digits_toy": Family(
        task="gulliver.tasks.digits_toy.task:DigitsTask",
        options="gulliver.tasks.digits_toy.options:DigitsOptions",
        answerer="gulliver.tasks.digits_toy.answerer:DigitsAnswerer",
        claims="gulliver.tasks.digits_toy.config:claims",
        examples="digits",
        speed_metric="examples_per_s",
        can=("predict",),
    ),
"""
METRICS = """\
    "next_digit_accuracy": Metric("fraction", "higher", "fraction of the next digits told right"),
    "baseline_next_digit_accuracy": Metric("fraction", "none", "the same by always telling the most frequent digit"),
    "next_digit_accuracy_vs_baseline": Metric("fraction", "higher", "accuracy minus that of the most frequent digit"),
"""
EVIDENCE = "src/gulliver/core/evidence/evidence.py"
PATCHES = (
    ("src/gulliver/tasks/__init__.py", '}\n"""The last row that claims', ROW + '}\n"""At most one row claims'),
    (EVIDENCE, "    # against the simplest baseline\n", METRICS + "    # against the simplest baseline\n"),
    (
        EVIDENCE,
        '    "accuracy_vs_baseline": 0.0,\n',
        '    "accuracy_vs_baseline": 0.0,\n' + '    "next_digit_accuracy_vs_baseline": 0.0,\n',
    ),
)
"""(file, old, new): all that is written by hand outside the family's own folder."""
GENERATED = {"src/gulliver/cli/parsers.json", "src/gulliver/__init__.pyi", "docs/steps.md"}
"""What `make docs` writes again, because the family has an option."""
MOST_FILES = 5

LIFE = '''
import contextlib, io, json, sys
from pathlib import Path

from http_samples import served, serving

import gulliver
from gulliver.cli.main import main
from gulliver.core.errors import DataError
from gulliver.pipeline.ask import open_answerer

copy, work = Path(sys.argv[1]), Path.cwd()
assert Path(gulliver.__file__).is_relative_to(copy), gulliver.__file__
found = {}


def command(name, *words):
    """One command line; its JSON document is kept under `name`."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([*map(str, words), "--json", "--quiet", "--home", str(work / "home")])
    assert code == 0, (words, code, out.getvalue())
    found[name] = json.loads(out.getvalue())
    return found[name]


read = command("read", "read", work / "counting.jsonl", "--task", "digits_toy", "--held-out", "0.3")
train = command("train", "train", read["id"], "--size", "2", "--steps", "150", "--learning-rate", "0.01")
command("fit", "fit", train["id"], "--size", "14000", "--max-drop", "10%", "--effort", "fast", "--out", work / "fitted")
command("audit", "audit", work / "fitted")
command("run", "run", work / "recipe.toml", "--report", work / "recipe.html")
command("ask", "ask", work / "fitted", "2468")
found["python"] = gulliver.ask(work / "fitted", {"digits": "13579"}, home=work / "home")
try:
    gulliver.ask(work / "fitted", {"digits": "12x4"}, home=work / "home")
except DataError as error:
    found["refused"] = str(error)
with open_answerer(work / "fitted", store=lambda: None) as answerer:
    with serving(models=[served(answerer, "digits")]) as running, running.client() as client:
        for name, digits in (("served", "8642"), ("wrong", "86")):
            answer = client.post("/v1/predict", json={"model": "digits", "input": {"digits": digits}})
            found[name] = [answer.status_code, answer.json()]
print(json.dumps(found))
'''
RECIPE = """\
name = "digits"

[[step]]
id = "data"
use = "read"
data = "counting.jsonl"
task = "digits_toy"
held_out = 0.3

[[step]]
id = "network"
use = "train"
inputs = { dataset = "data" }
size = 2
steps = 150
learning_rate = 0.01

[[step]]
id = "quality"
use = "quality"
inputs = { model = "network", dataset = "data" }

[[gate]]
on = "network"
metric = "next_digit_accuracy"
at_least = 0.6
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and its pages, with the family in it and the generated files made again."""
    copy = tmp_path_factory.mktemp("copy")
    package = copy_package(copy / "src")
    shutil.copytree(ROOT / "docs", copy / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(FAMILY, package / "tasks" / "digits_toy", ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new in PATCHES:
        text = (copy / file).read_text()
        assert text.count(old) == 1, (file, old)
        (copy / file).write_text(text.replace(old, new))
    python(copy / "src", str(copy / "docs" / "make_docs.py"), cwd=copy)
    return copy


@pytest.fixture(scope="module")
def life(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """What every command answered, by its name, and the folder in which they worked."""
    work = tmp_path_factory.mktemp("work")
    (work / "counting.jsonl").write_text("".join(json.dumps({"digits": one}) + "\n" for one in _counting(300)))
    (work / "recipe.toml").write_text(RECIPE)
    return json.loads(python(copy / "src", "-c", LIFE, str(copy), cwd=work).splitlines()[-1]), work


def _counting(count: int) -> list[str]:
    """Sequences that count by 1, 2 or 3 from somewhere, a tenth of their digits wrong."""
    chance, found = random.Random(0), []
    for _ in range(count):
        start, step = chance.randrange(10), chance.randint(1, 3)
        digits = [(start + step * place) % 10 for place in range(24)]
        found.append("".join(str(chance.randrange(10) if chance.random() < 0.1 else digit) for digit in digits))
    return found


def _metrics(rows: list[dict]) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in rows}


def test_a_family_changes_few_files_and_none_of_a_stage(copy: Path) -> None:
    changed = {
        file.relative_to(ROOT).as_posix()
        for folder in ("src/gulliver", "docs")
        for file in sorted((ROOT / folder).rglob("*"))
        if file.is_file() and (copy / file.relative_to(ROOT)).is_file()
        if file.read_bytes() != (copy / file.relative_to(ROOT)).read_bytes()
    }
    by_hand = {file for file, _, _ in PATCHES}
    assert by_hand == {"src/gulliver/tasks/__init__.py", EVIDENCE}
    assert changed == by_hand | GENERATED
    assert len(changed) <= MOST_FILES, changed
    stages = ("pipeline", "compress", "audit", "report", "serve", "train", "data")
    assert not [file for file in changed if file.startswith(tuple(f"src/gulliver/{stage}/" for stage in stages))]


def test_it_is_read_trained_and_beats_its_baseline_by_its_own_metric(life: tuple[dict, Path]) -> None:
    found, _ = life
    assert found["read"]["kind"] == "dataset" and found["train"]["task"] == "digits_toy"
    (gate,) = found["run"]["gates"]
    assert (gate["metric"], gate["outcome"]) == ("next_digit_accuracy", "PASS")


def test_it_fits_a_budget_packed_and_the_page_and_card_show_its_metric(life: tuple[dict, Path]) -> None:
    found, work = life
    packing = json.loads((work / "fitted" / "packing.json").read_text())
    assert set(packing["tensors"]) == {"table.weight", "hidden.weight", "head.weight"}
    values = _metrics(found["fit"]["evidence"])
    assert values["size_bytes"] <= 14000 < found["train"]["weight_bytes"] and values["quality_loss"] <= 0.1
    assert values["next_digit_accuracy"] > values["baseline_next_digit_accuracy"] + 0.3
    page = (work / "fitted" / "report.html").read_text()
    assert "next_digit_accuracy" in page.replace(" ", "_") and "quality loss" in page.lower()
    assert "next digit accuracy" in (work / "fitted" / "README.md").read_text()
    assert "next digit accuracy" in (work / "recipe.html").read_text()


def test_it_is_audited_with_its_speed(life: tuple[dict, Path]) -> None:
    values = _metrics(life[0]["audit"]["evidence"])
    assert {"next_digit_accuracy", "next_digit_accuracy_vs_baseline", "examples_per_s", "size_bytes"} <= set(values)


def test_it_answers_on_the_command_line_and_in_python(life: tuple[dict, Path]) -> None:
    found, _ = life
    assert found["ask"]["digit"] == 0 and 0 < found["ask"]["probability"] <= 1
    assert found["python"]["digit"] == 1
    assert "digits" in found["refused"]


def test_it_is_served(life: tuple[dict, Path]) -> None:
    found, _ = life
    assert found["served"][0] == 200 and found["served"][1]["digit"] == 0
    assert found["wrong"][0] in (400, 422) and "digits" in found["wrong"][1]["error"]["message"]
