"""At most five of our frames between a command and the arithmetic, for every step that computes.

A dispatch mode sees every operation on a torch tensor, forward and backward, and looks at the stack at that moment.
Opening a model's files does not count: unpacking is reading, not the arithmetic that a command is for.
The step `speed` is not here: it measures in a process of its own, which this one cannot see into.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gulliver

SOURCE = str(Path(gulliver.__file__).parent)
COMMAND = "cli/step.py:run_step"
"""The function that is the command of every step."""
MAX_HOPS = 5
ARITHMETIC = ("mm", "bmm", "addmm", "matmul", "convolution", "cholesky", "softmax", "round", "linalg", "sub", "mul")


class Hops(TorchDispatchMode):
    """Remembers the deepest stack of our frames, from the command to the frame that runs the operation."""

    def __init__(self, root: str = SOURCE) -> None:
        super().__init__()
        self.root = root
        self.deepest: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in ARITHMETIC):
            self.operations += 1
            found = self.between(sys._getframe(1))
            if len(found) > len(self.deepest):
                self.deepest = found
        return func(*args, **(kwargs or {}))

    def between(self, frame: FrameType | None) -> list[str]:
        """Our frames strictly between the command and the innermost of ours, outermost first."""
        names: list[str] = []
        while frame is not None:
            code = frame.f_code
            # A comprehension or a lambda is a line of the function it stands in, not another place to look up.
            if code.co_filename.startswith(self.root) and not code.co_name.startswith("<"):
                place = Path(code.co_filename).relative_to(self.root).as_posix()
                names.append(f"{place}:{code.co_name}")
            frame = frame.f_back
        names.reverse()
        if "tasks/base.py:load" in names:
            return []  # opening a model's files, which has a depth of its own, is not the arithmetic
        commands = [index for index, name in enumerate(names) if name == COMMAND]
        return names[commands[0] + 1 : -1] if commands else names[:-1]


def test_a_stack_that_is_too_deep_is_seen() -> None:
    def deep(levels: int) -> torch.Tensor:
        return deep(levels - 1) if levels else torch.ones(2, 2) @ torch.ones(2, 2)

    with Hops(str(Path(__file__).parent)) as hops:
        deep(MAX_HOPS + 1)
    assert hops.operations > 0
    assert len(hops.deepest) > MAX_HOPS


def test_every_step_that_computes_is_near_its_command(command: Callable[..., tuple[int, str, str]]) -> None:
    import json

    def run(*words: str) -> str:
        with Hops() as hops:
            code, out, err = command(*words, "--json", "--quiet")
        assert code == 0, err
        assert hops.operations > 0 or words[0] in ("read", "plan"), f"{words[0]} computed nothing that was seen"
        shown = "\n  ".join(hops.deepest)
        assert len(hops.deepest) <= MAX_HOPS, f"{words[0]} has {len(hops.deepest)} frames in between:\n  {shown}"
        return json.loads(out)["id"]

    digits = run("read", "catalog:digits", "--task", "vision")
    model = run("train", digits, "--size", "1", "--steps", "2", "--batch-size", "8", "--warmup-steps", "1")
    statistics = run("calibrate", model, "--data", digits)
    plan = run("plan", model, "--calibration", statistics, "--size-bytes", "50kB")
    small = run("quantize", model, "--calibration", statistics, "--plan", plan)
    run("distill", small, "--parent", model, "--data", digits, "--steps", "1")
    run("quality", small, "--data", digits, "--parent", model)


def test_the_command_is_where_the_stack_is_cut() -> None:
    place, _, function = COMMAND.partition(":")
    assert f"def {function}(" in Path(SOURCE, place).read_text(encoding="utf-8")
