"""The ladder of the house: every import in every file, lazy ones and type-checking ones included, goes downwards."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from gulliver.tasks import TASKS

SOURCE = Path(__file__).parent.parent / "src" / "gulliver"
TOP = ("__main__", "cli", "pipeline")
STAGES = ("data", "train", "compress", "audit", "serve")
FLOORS = ("report", "learning", "tasks", "runtime", "nets", "core")
FILES = sorted(SOURCE.rglob("*.py"))


NAMED = re.compile(r"(?:.* )?(gulliver(?:\.\w+)+)(?::\w+)?", re.DOTALL)
"""A string that is a module of ours: "gulliver.x.y", "gulliver.x.y:attribute", "python -m gulliver.x"."""


FAMILIES = [["tasks", name] for name in TASKS]
"""What no room but tasks/ may name: others ask the contract."""


def module_name(path: Path) -> str:
    """The dotted name of a file: core/errors.py -> gulliver.core.errors."""
    return ".".join(("gulliver", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, module or module.name) of every import in a file, at any depth, and of modules named in strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = NAMED.fullmatch(node.value)
            if found and found[1] in MODULES and MODULES[found[1]].name != "__init__.py":
                yield node.lineno, found[1]
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
    return [
        f"{relative}:{line} imports {name}"
        for line, name in edges
        if not allowed(here, place_of(name)) or (here != "tasks" and name.split(".")[1:3] in FAMILIES)
    ]


def test_the_house_has_no_other_rooms() -> None:
    rooms = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms <= {"__init__", *TOP, *STAGES, *FLOORS}
    assert {path.name for path in FILES if path.parent == SOURCE} == {"__init__.py", "__main__.py"}
    served = {path.relative_to(SOURCE / "serve").parts[0] for path in FILES if SOURCE / "serve" in path.parents}
    assert len(served - {"__init__.py"}) <= 15, sorted(served)


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
        ("data/read.py", "STEP = 'gulliver.train.train'"),
        ("tasks/__init__.py", "TABLE = {'x': 'gulliver.learning.loop:run_loop'}"),
        ("compress/plan.py", "subprocess.run([sys.executable, '-m', 'gulliver.audit.measure'])"),
        ("core/store/store.py", "os.system('python -m gulliver.audit.measure')"),
        ("audit/measure.py", "from gulliver.tasks.language import text"),
        ("pipeline/ask.py", "ANSWERER = 'gulliver.tasks.vision.answerer:open_answerer'"),
    ],
)
def test_the_ladder_refuses(file: str, line: str) -> None:
    assert broken(SOURCE / file, line) != []


def nearest_module(dotted: str, known: Mapping[str, object]) -> str:
    """The longest beginning of a dotted name that is a module."""
    while dotted not in known:
        dotted = dotted.rpartition(".")[0]
    return dotted


def circle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a circle, lazily, for types and by name included; [] when there are none."""
    graph = {
        name: {
            nearest_module(target, sources)
            for _, target in imported(ast.parse(text))
            if target.split(".")[0] == "gulliver"
        }
        - {name}
        for name, text in sources.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other() -> None:
    assert circle({name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}) == []


def test_a_circle_is_seen() -> None:
    root, decode, tasks = "gulliver", "gulliver.runtime.decode", "gulliver.tasks"
    chain = {root: "", decode: "from gulliver.tasks import get_task", tasks: ""}
    assert circle(chain) == []
    for back in ("def f():\n    from gulliver.runtime.decode import a", "T = {'a': 'gulliver.runtime.decode:a'}"):
        assert set(circle(chain | {tasks: back})) == {decode, tasks}


@pytest.mark.parametrize(
    "path", [path for path in FILES if SOURCE / "core" in path.parents], ids=lambda path: path.name
)
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


MOST_LINES = {ast.Module: 400, ast.ClassDef: 200, ast.FunctionDef: 60, ast.AsyncFunctionDef: 60}


def too_long(source: str) -> list[str]:
    """Every function, class and file in a source that has more lines than the house allows."""
    found = ["the file"] if source.count("\n") > MOST_LINES[ast.Module] else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if (node.end_lineno or first) - first >= MOST_LINES[type(node)]:
                found.append(node.name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_files_and_functions_stay_small(path: Path) -> None:
    assert path.stem != "utils"
    assert too_long(path.read_text(encoding="utf-8")) == []


def test_what_is_too_long_is_seen() -> None:
    for opening, most in (("def f():", 60), ("async def f():", 60), ("@a\nclass f:", 200)):
        body = "\n" + "    x = 1\n" * (most - opening.count("\n") - 1)
        assert (too_long(opening + body), too_long(opening + body + "    x = 1\n")) == ([], ["f"])
    assert (too_long("\n" * 400), too_long("\n" * 401)) == ([], ["the file"])
