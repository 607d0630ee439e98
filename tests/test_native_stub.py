"""The type stub of the native module is what nanobind makes of the module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from needed import needed_module

import gulliver

needed_module("gulliver.runtime._native", "the native engine is not built: no compiler was found")
needed_module("nanobind", "nanobind is not installed; pip install 'gulliver[dev]'")

STUB = Path(gulliver.__file__).parent / "runtime" / "_native.pyi"
MAKE = [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "gulliver.runtime._native", "-o"]
FORMAT = [sys.executable, "-m", "ruff", "format", "-q", "--line-length", "120", "--isolated"]


def test_the_stub_is_what_stubgen_makes(tmp_path: Path) -> None:
    made = tmp_path / "_native.pyi"
    subprocess.run([*MAKE, made], check=True)
    subprocess.run([*FORMAT, made], check=True)
    again = f"python -m nanobind.stubgen -q -m gulliver.runtime._native -o {STUB} && ruff format {STUB}"
    assert STUB.read_text() == made.read_text(), f"bind.cpp changed; make the stub again: {again}"
