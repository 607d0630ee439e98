"""Names, numbers and recipes that no call can take: one line that names the value, before any work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import gulliver
from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.store.artifact import check_target
from gulliver.pipeline import recipe

Run = Callable[..., tuple[int, str, str]]
NAMES = {"empty": "", "long": "a" * 300, "a null byte": "a\0b", "an unknown home": "~no-such-user-here/x"}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("verb", ["show", "verify", "pull", "read", "ask", "run", "audit"])
def test_a_name_that_no_file_can_have(command: Run, name: str, verb: str) -> None:
    code, out, err = command(verb, name, *(["x"] if verb == "ask" else []))
    assert (code, out) == (2, "") and err.splitlines()[-1].startswith("error: "), err
    assert "Traceback" not in err


@pytest.mark.parametrize("seed", ["-1", str(2**63), "9" * 30])
def test_a_seed_that_no_generator_takes(command: Run, tmp_path: Path, seed: str) -> None:
    (tmp_path / "text.txt").write_text("one two three\n" * 40)
    code, _, err = command("read", tmp_path / "text.txt", "--seed", seed)
    assert code == 2 and f"seed is {seed}" in err
    with pytest.raises(ConfigError, match="seed is"):
        gulliver.fit("catalog:no-such", size="64MB", seed=int(seed), home=tmp_path / "home")
    with pytest.raises(ConfigError, match=f"line 1: seed is {seed}"):
        recipe.parse(f"seed = {seed}\n[[step]]\nid = 'a'\nuse = 'read'\ndata = 'x'")


def test_a_number_that_no_record_holds(command: Run) -> None:
    with pytest.raises(ConfigError, match="size_bytes"):
        recipe.parse(f"[[step]]\nid = 'a'\nuse = 'plan'\nsize_bytes = {10**22}")


@pytest.mark.parametrize("value", ["[" * 2000 + "]" * 2000, "9" * 5000], ids=["2000 brackets", "5000 digits"])
def test_a_recipe_that_tomllib_gives_up_on(value: str) -> None:
    with pytest.raises(ConfigError, match="not valid TOML"):
        recipe.parse(f"name = {value}")


def test_where_a_copy_cannot_go_is_told_before_the_work(command: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("mine")
    for out, told in (("file", "is a file"), ("file/x", "cannot be made"), ("full", "is not empty and is not")):
        with pytest.raises(ArtifactError, match=told):
            gulliver.fit("catalog:no-such", size="64MB", out=tmp_path / out, home=tmp_path / "home")
        code, _, err = command("read", tmp_path / "no-such.txt", "--out", tmp_path / out)
        assert code == 2 and told in err
    assert check_target(tmp_path / "new" / "model") == tmp_path / "new" / "model"
    (tmp_path / "r.toml").write_text("[[step]]\nid = 'a'\nuse = 'read'\ndata = 'x'")
    code, _, err = command("run", tmp_path / "r.toml", "--report", tmp_path / "no-such" / "x.html")
    assert code == 2 and "must be a file in a folder that exists" in err


def test_a_reader_that_leaves_is_no_fault(tmp_path: Path) -> None:
    code = "import sys; from gulliver.cli.main import main; sys.stdin.read(); sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "list", "--home", str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stdin.close()
        assert (process.stderr.read(), process.wait(60)) == (b"", 0)


def test_a_key_of_many_parts_is_no_recipe() -> None:
    with pytest.raises(ConfigError):
        recipe.parse(".".join("a" * 1500) + " = 1")
