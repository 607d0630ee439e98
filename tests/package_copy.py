"""A copy of the package that a test may change, and a Python that imports it and not the installed package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import gulliver
from gulliver.runtime import _native

PACKAGE = Path(gulliver.__file__).parent
TESTS = Path(__file__).parent
SITECUSTOMIZE = """\
# An editable installation puts its own finder, which knows where every module was, before the path.
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable_")]
"""


def copy_package(folder: Path) -> Path:
    """Copy the package into `folder` (with the native module, wherever it is installed), give the copy's root."""
    package = folder / "gulliver"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "native"))
    shutil.copy2(_native.__file__, package / "runtime")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return package


def python(folder: Path, *words: str, cwd: Path, expected: int = 0, **environment: str) -> str:
    """Run a Python that imports from `folder` and tests/: its stdout, or its stderr where it is to fail."""
    given = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(TESTS)]),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        **environment,
    }
    done = subprocess.run([sys.executable, *words], env=given, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == expected, done.stderr[-4000:]
    return done.stdout if expected == 0 else done.stderr
