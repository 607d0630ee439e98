"""The command line over the toy table: results on stdout, errors as one message, exit codes, --json."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from postgres import postgres_server, postgres_url  # noqa: F401 - fixtures

from gulliver.cli import main as cli
from gulliver.cli.arguments import PARSERS, arguments
from gulliver.cli.commands import COMMANDS, Command
from gulliver.cli.make import _value
from gulliver.cli.parser import parsed
from gulliver.core.errors import BudgetError, GateRefused
from gulliver.core.names import named
from gulliver.core.store.store import Store
from gulliver.pipeline.steps import STEPS, Step

Run = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("toy_table")


def _ok(result: tuple[int, str, str]) -> dict:
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def test_a_life_on_the_command_line(command: Run, tmp_path: Path) -> None:
    made = _ok(command("make", "--weights", "32", "--json"))
    again = _ok(command("make", "--weights", "32", "--json"))
    assert (made["reused"], again["reused"]) == (False, True)
    small = _ok(command("shrink", made["id"][:8], "--bits", "2", "--out", tmp_path / "small", "--json"))
    assert small["path"] == str(tmp_path / "small")
    assert small["parents"] == [made["id"]]
    report = _ok(command("measure", tmp_path / "small", "--parent", made["id"], "--json"))
    assert report["kind"] == "report"
    shown = _ok(command("show", small["id"], "--json"))
    assert [row["id"] for row in shown["lineage"]] == [small["id"], made["id"]]
    assert {row["metric"] for row in shown["evidence"]} == {"size_bytes", "perplexity_ratio"}
    assert {row["id"] for row in _ok(command("list", "--json"))} == {made["id"], small["id"], report["id"]}
    assert _ok(command("verify", tmp_path / "small", "--json"))["verified"]


def test_text_is_for_people(command: Run) -> None:
    assert command("list")[1] == "nothing yet\n"
    code, out, _ = command("make", "--weights", "32")
    assert code == 0
    identity, line = out.splitlines()
    assert len(identity) == 64
    assert line.startswith("model of task toy")
    model = identity
    shown = command("shrink", model, "--blocks", "2")
    assert "shrink: 2 blocks in" in shown[2]
    assert command("shrink", model, "--blocks", "3", "--quiet")[2] == ""
    assert "no evidence yet" in command("show", model)[1]
    command("measure", model)
    assert "size_bytes" in command("show", model)[1]
    assert model[:12] in command("list")[1]


def test_verify_names_the_file_that_differs(command: Run, tmp_path: Path) -> None:
    command("make", "--out", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    code, out, err = command("verify", tmp_path / "model")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "model.safetensors differs" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shrnk"], "unknown command 'shrnk'; did you mean 'shrink'?"),
        (["make", "--weigths", "3"], "gulliver make does not take '--weigths'; did you mean '--weights'?"),
        (["make", "--weights", "many"], "weights = 'many' is not valid"),
        (["make", "8"], "gulliver make does not take '8'; see `gulliver make --help`"),
        (["make", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["shrink"], "the following arguments are required: MODEL"),
        (["show", "nothing"], "'nothing' is neither the id nor the folder of an artifact"),
        (["show", "abcdef"], "`gulliver list` shows what is there"),
        (["run", "none.toml"], "recipe none.toml does not exist"),
        (["list", "--home", "/dev/null/x"], "the home /dev/null/x cannot be used"),
        ([], "required: COMMAND"),
    ],
)
def test_wrong_input_is_one_message_and_exit_2(words: list[str], message: str, command: Run) -> None:
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err


def test_errors_with_json_are_a_document(command: Run) -> None:
    code, out, err = command("show", "abcdef", "--json")
    assert code == 2
    document = json.loads(out)
    assert document["error"] == "ArtifactError"
    assert document["exit_code"] == 2
    assert document["message"] in err


@pytest.mark.parametrize(
    ("failure", "expected"), [(GateRefused("no"), 3), (BudgetError("no"), 4), (RuntimeError("bug"), 1)]
)
def test_exit_codes(failure: Exception, expected: int, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr("toys.make.run", fail)
    code, out, err = command("make", "--json")
    assert code == expected
    assert json.loads(out)["exit_code"] == expected
    assert ("Traceback" in err) == (expected == 1)


def test_what_libraries_print_stays_off_stdout(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import toys.make

    honest = toys.make.run

    def loud(*given: object) -> object:
        print("a library says hello")
        return honest(*given)

    monkeypatch.setattr("toys.make.run", loud)
    _, out, err = command("make", "--json")
    assert json.loads(out)["kind"] == "model"
    assert "a library says hello" in err


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("8", int, "8"),
        ("true", bool, "true"),
        ("32,64", tuple[int, ...], [32, 64]),
        ("32", tuple[int, ...], [32]),
        ("a,b", tuple[str, ...], ["a", "b"]),
        ("a,b", str, "a,b"),
        ("16", str | None, "16"),
    ],
)
def test_an_options_text_becomes_the_fields_type(text: str, annotation: object, value: object) -> None:
    assert _value(text, annotation) == value


def test_home_may_stand_before_the_command(command: Run, tmp_path: Path) -> None:
    assert _ok(command("--json", "--home", tmp_path / "other", "list")) == []


@pytest.mark.postgres
def test_evidence_and_runs_may_live_in_postgresql(command: Run, postgres_url: str, tmp_path: Path) -> None:  # noqa: F811
    def run(home: str, *words: str) -> dict:
        return _ok(command(*words, "--database", postgres_url, "--home", tmp_path / home, "--json"))

    made = run("one", "make")
    assert run("one", "make")["reused"]
    run("one", "measure", made["id"])
    assert len(run("one", "show", made["id"])["evidence"]) == 2
    elsewhere = run("two", "make")  # the run is on record, but its artifact is not in this home
    assert (elsewhere["reused"], elsewhere["id"]) == (False, made["id"])
    assert not (tmp_path / "one" / "gulliver.db").exists()


def test_options_come_from_the_config(command: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    made = _ok(command("make", "--json"))
    words = ["--group-sizes", "32,64", "--max-ram-bytes", "100GB", "--bits", "8", "--exact", "--block-seconds", "0"]
    small = _ok(command("shrink", made["id"], *words, "--json"))
    config = _ok(command("show", small["id"], "--json"))["config"]
    assert config["group_sizes"] == [32, 64]
    assert "max_ram_bytes" not in config  # what the run was allowed; the model does not depend on it
    assert Store(tmp_path / "home").runs()[-1].config["max_ram_bytes"] == 100_000_000_000
    assert (config["bits"], config["exact"]) == (8, True)
    assert cli.main(["make", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "how many weights to write (default 64)" in shown


def test_run_prints_a_table_and_a_second_run_does_nothing(command: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "life.toml"
    recipe.write_text(
        '[[step]]\nid = "a"\nuse = "make"\n'
        '[[step]]\nid = "b"\nuse = "measure"\ninputs = { model = "a" }\n'
        '[[gate]]\non = "a"\nmetric = "size_bytes"\nat_most = 1000\n'
    )
    code, out, err = command("run", recipe)
    assert code == 0, err
    assert "PASS  size_bytes <= 1000" in out
    assert "report: " in out
    document = _ok(command("run", recipe, "--report", tmp_path / "report.html", "--json"))
    assert [entry["reused"] for entry in document["calls"]] == [True, True]
    assert (tmp_path / "report.html").is_file()
    recipe.write_text(recipe.read_text().replace("1000", "1"))
    code, out, err = command("run", recipe)
    assert code == 3
    assert "size_bytes" in err


def test_doctor_says_what_runs_and_why(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from gulliver.core.machine import identify
    from gulliver.runtime import decode

    monkeypatch.setattr("gulliver.core.machine.describe", lambda home: identify())
    document = _ok(command("doctor", "--json"))
    assert document["cores"] >= 1
    rows = {row["name"]: row for row in document["kernels"]}
    assert "reference backend" in rows["reference"]["why"]
    if decode.native_reason() is None:
        states = [row["state"] for row in document["kernels"][:-1]]
        assert states.count("runs") == 1 and rows["plain"]["state"] in ("runs", "can run")
        assert "runs" not in states[states.index("runs") + 1 :] and "can run" not in states[: states.index("runs")]
        assert all(row["why"] for row in rows.values())
        assert "Llama" in rows["reference"]["why"]
    assert "kernels plain" in command("doctor")[1] or decode.native_reason()
    monkeypatch.setattr("gulliver.runtime.decode._native_missing", "there was no compiler")
    rows = {row["name"]: row for row in _ok(command("doctor", "--json"))["kernels"]}
    assert rows["native"] == {"name": "native", "state": "cannot run", "why": "there was no compiler"}
    assert rows["reference"]["why"].startswith("every model")


def test_help_imports_no_torch_and_no_step() -> None:
    code = (
        "import sys; from gulliver.cli.main import main; assert main(['--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'sqlalchemy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    for command in COMMANDS:
        assert f"    {command.name} " in found.stdout


@pytest.mark.parametrize("row", STEPS, ids=lambda row: row.name)
def test_the_help_of_a_step_imports_no_torch(row: Step) -> None:
    code = (
        f"import sys; from gulliver.cli.main import main; assert main([{row.name!r}, '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'sqlalchemy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "--seed" in found.stdout


def test_reading_a_recipe_imports_no_torch() -> None:
    recipes = sorted(str(path) for path in (Path(__file__).parent.parent / "recipes").glob("*.toml"))
    code = (
        f"import sys; from gulliver.pipeline import recipe\nfor path in {recipes}: recipe.load(path)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'sqlalchemy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_numbers_out_of_bounds_name_the_option_and_the_bound(command: Run) -> None:
    code, _, err = command("bench", "x", "--repeats", "1")
    assert (code, err) == (2, "error: --repeats is 1; it must be at least 2\n")
    code, _, err = command("serve", "x", "--timeout", "0")
    assert (code, err) == (2, "error: --timeout is 0; it must be above 0\n")


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: row.name)
def test_what_a_parser_reads_is_what_the_model_holds(row: Command) -> None:
    """parsers.json and the frozen model of a command agree on every default and on every kind of value."""
    needed = [record for record in arguments(row.options) if record.required]
    words = [word for record in needed for word in ([] if record.positional else [record.flag]) + ["7"]]
    line = parsed([row.name, *words])
    options = named(row.options)(**line.given)
    assert options.model_config["frozen"] and options.model_config["extra"] == "forbid"
    for record in arguments(row.options):
        value = getattr(options, record.name)
        if record.required:
            assert value == (("7",) if record.many else "7")
        else:
            assert value == (tuple(record.default) if record.many else record.default)
            given = {"int": "19", "float": "9.5", "switch": None, "text": "9"}[record.kind]
            flag = [] if record.positional else [record.flag]
            again = parsed([row.name, *words, *flag, *([given] if given else [])])
            assert named(row.options)(**again.given) != options
    assert set(line.everywhere) == {"home", "database", "json_", "quiet"}


def test_a_table_that_parsers_json_does_not_know_is_read_from_its_models(command: Run) -> None:
    assert "toys.make:Config" not in json.loads(PARSERS.read_text(encoding="utf-8"))
    assert command("make", "--weights", "8")[0] == 0
