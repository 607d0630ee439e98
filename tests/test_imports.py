"""The ladder of the house: every import in every file, lazy ones and type-checking ones included, goes downwards."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "gulliver"
TOP = ("__main__", "cli", "pipeline")
STAGES = ("data", "train", "compress", "audit", "serve")
FLOORS = ("report", "learning", "tasks", "runtime", "nets", "core")
FILES = sorted(SOURCE.rglob("*.py"))


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, module or module.name) of every import in a file, at any depth, and of modules named in strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write absolute imports"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def place_of(dotted: str) -> str:
    """The file at the top or the folder that a module of ours lies in: "gulliver.core.evidence.gate" -> "core"."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def allowed(here: str, there: str) -> bool:
    """True if a file in `here` may import from `there`; both are a folder or a file at the top."""
    if here == there:
        return True
    if here == "__init__" or there in ("__version__", "__init__"):
        return here in ("__init__", *TOP)  # the public names stand at the top of the house
    if here in TOP:
        return there not in TOP or TOP.index(here) < TOP.index(there)
    if here in STAGES:
        return there in FLOORS
    return there in FLOORS and FLOORS.index(here) < FLOORS.index(there)


def broken(path: Path, source: str) -> list[str]:
    """Every edge out of a file that the house forbids."""
    relative = path.relative_to(SOURCE)
    here = relative.parts[0].removesuffix(".py")
    edges = [(line, name) for line, name in imported(ast.parse(source)) if name.split(".")[0] == "gulliver"]
    return [f"{relative}:{line} imports {name}" for line, name in edges if not allowed(here, place_of(name))]


def test_the_house_has_no_other_rooms() -> None:
    rooms = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms <= {"__init__", *TOP, *STAGES, *FLOORS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_every_import_goes_down(path: Path) -> None:
    assert broken(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("data/read.py", "from gulliver.train import pretrain"),
        ("audit/quality.py", "def f():\n    import gulliver.compress.quantize"),
        ("compress/plan.py", "from gulliver.pipeline import run"),
        ("compress/plan.py", "import gulliver"),
        ("core/store/store.py", "from gulliver.tasks.base import Task"),
        ("tasks/base.py", "from gulliver.learning.loop import run_loop"),
        ("nets/decoder.py", "from gulliver.runtime import packed"),
        ("nets/weights.py", "from gulliver.report import html"),
        ("pipeline/steps.py", "from gulliver.cli.main import main"),
        ("report/html.py", "if TYPE_CHECKING:\n    from gulliver.pipeline.fit import fit"),
    ],
)
def test_the_ladder_refuses(file: str, line: str) -> None:
    assert broken(SOURCE / file, line) != []


@pytest.mark.parametrize("path", [path for path in FILES if "core" in path.parts], ids=lambda path: path.name)
def test_core_knows_no_torch(path: Path) -> None:
    allowed_lazily = path.name == "machine.py"  # measures what torch reaches, inside a function
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {name for node in tree.body for _, name in imported(ast.Module([node], [])) if not _is_scope(node)}
    everywhere = {name for _, name in imported(tree)}
    for heavy in ("torch", "transformers"):
        assert not [name for name in top if name.split(".")[0] == heavy]
        assert allowed_lazily or not [name for name in everywhere if name.split(".")[0] == heavy]


def _is_scope(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef)


def test_nothing_unpickles() -> None:
    risky = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not {name.split(".")[0] for _, name in imported(tree)} & risky, path
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"torch.load", "eval", "exec"}, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert path.stem != "utils"
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert node.end_lineno - first < 60, f"{path.name}: {node.name} has more than 60 lines"
