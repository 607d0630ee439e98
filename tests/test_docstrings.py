"""A public function that takes or gives arrays says their shapes: "[batch, tokens, vocab]", "a scalar", "any shape"."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "gulliver"
FILES = sorted(SOURCE.rglob("*.py"))
ARRAY = re.compile(r"\b(Tensor|NDArray|ndarray|PackedTensor|Batch|StepBatch)\b")
_SIZE = r"[\w…][\w …·/+×*^()-]*"
SHAPE = re.compile(rf"\[{_SIZE}(, {_SIZE})*\]|\b(scalars?|any shape|any shapes)\b")


def undocumented(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of the public functions, methods and records of arrays that state no shape.

    A record states the shapes of its fields in its docstring or beside them; `forward` may leave them to its class.
    """
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _function(node, "")
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        described = ast.get_docstring(node) or ""
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and ARRAY.search(ast.unparse(part.annotation)):
                beside = "\n".join(lines[part.lineno - 1 : part.end_lineno]).partition("#")[2]
                if not SHAPE.search(described) and not SHAPE.search(beside):
                    yield part.lineno, f"{node.name}.{ast.unparse(part.target)}"
            if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _function(part, described if part.name == "forward" else "")


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, also: str) -> Iterator[tuple[int, str]]:
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    annotations = [node.returns, *(one.annotation for one in every if one is not None)]
    arrays = any(ARRAY.search(ast.unparse(one)) for one in annotations if one is not None)
    if arrays and not node.name.startswith("_") and not SHAPE.search((ast.get_docstring(node) or "") + also):
        yield node.lineno, node.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_functions_of_arrays_state_their_shapes(path: Path) -> None:
    assert list(undocumented(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('def f(x: Tensor) -> None:\n    """Does it."""', ["f"]),
        ('def f() -> NDArray[np.int8]:\n    """int8 [rows, columns]."""', []),
        ('def f(x: dict[str, Tensor]) -> None:\n    """Of any shape."""', []),
        ("def f(*, x: PackedTensor | None) -> None: ...", ["f"]),
        ("def _f(x: Tensor) -> None: ...", []),
        ('def f(x: int) -> list[int]:\n    """[x]."""', []),
        ('class A:\n    """Holds."""\n    x: Tensor\n    y: Tensor  # int8 [rows]', ["A.x"]),
        ('class A:\n    """x [batch, …] -> [batch]."""\n    def forward(self, x: Tensor) -> Tensor: ...', []),
        ('class A:\n    """x [batch, …] -> [batch]."""\n    def step(self, x: Tensor) -> Tensor: ...', ["step"]),
    ],
)
def test_what_the_rule_sees(source: str, found: list[str]) -> None:
    assert [name for _, name in undocumented(source)] == found
