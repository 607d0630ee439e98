"""What the documents say is what the code does: commands parse, generated pages are fresh, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from gulliver.cli.commands import COMMANDS as COMMANDS_TABLE
from gulliver.cli.parser import parsed
from gulliver.core.errors import GulliverError
from gulliver.pipeline import steps

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".ci").glob("*.md")])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands_in(text: str) -> Iterator[str]:
    """Every `gulliver …` line of the code blocks, and every inline `gulliver …` that is a whole command."""
    for block in re.findall(r"^```(?:bash|sh|console|shell)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        joined = re.sub(r"\\\n\s*", " ", block)
        for line in joined.splitlines():
            line = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
            if line.startswith("gulliver "):
                yield line.split(" #")[0].split(" | ")[0].split(" > ")[0].strip()


COMMANDS = [(path, line) for path in PAGES for line in commands_in(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("path", "line"), COMMANDS, ids=lambda value: value.name if isinstance(value, Path) else value)
def test_every_command_in_a_document_parses(path: Path, line: str) -> None:
    words = shlex.split(re.sub(r"[…]|\.\.\.", "x", line))[1:]
    if words and set(words) <= {"-h", "--help", "--version"}:
        return
    if "--help" in words:
        assert words[0] in {row.name for row in (*steps.STEPS, *COMMANDS_TABLE)}
        return
    try:
        parsed(words)
    except GulliverError as failure:
        pytest.fail(f"{name_of(path)}: `{line}`: {failure}")


def test_the_readme_shows_the_main_commands() -> None:
    shown = {line.split()[1] for path, line in COMMANDS if path.name == "README.md"}
    assert {"fit", "run", "audit", "export"} <= shown


def _maker() -> object:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "docs" / "make_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILES = _maker().files()  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_is_made_from_the_tables_is_fresh(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == FILES[path], "run `make docs`"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        found = (path.parent / place) if place else path
        assert found.exists(), f"{name_of(path)} links to {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found.read_text(encoding="utf-8")), f"{name_of(path)} links to {target}"


def anchors(text: str) -> set[str]:
    """What a heading is called in a link: lower case, words joined by dashes."""
    titles = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_files_that_documents_name_exist(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for named in re.findall(r"`((?:src/gulliver|docs|tests|recipes|benchmarks|\.ci)/[\w./-]+)`", text):
        assert (ROOT / named).exists(), f"{name_of(path)} names {named}"


def test_the_makefile_has_the_promised_targets() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", text, re.MULTILINE))
    assert {"quickstart", "venv", "test", "check", "docs", "bench"} <= targets
    for line in re.findall(r"\$\(BIN\)/(gulliver .+)", text):
        parsed(shlex.split(line.replace("$(SMALL)", "out/small"))[1:])


def test_the_changelog_names_this_version() -> None:
    from gulliver import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_no_unfinished_words() -> None:
    words = ("TO" + "DO", "FIX" + "ME", "place" + "holder", "for " + "now")
    for path in [*PAGES, *(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in words if word in text], name_of(path)
