"""The kernels under the address and undefined-behaviour sanitizers: random packed tensors, a few thousand.

`make -C tests/native run COUNT=1000000` runs as many as one likes. Objects are kept between runs of the tests.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from needed import missing

SOURCE = Path(__file__).parent / "native"
TENSORS = 5000
FAULT = "int main(int count, char**) { int* all = new int[1]; return all[count]; }"
"""A program that reads one number past the end of its memory."""


def sanitized(folder: Path) -> bool:
    """Whether g++ builds for an x86 processor here, and its sanitizers find a fault."""
    if platform.machine() not in ("x86_64", "AMD64") or not shutil.which("g++") or not shutil.which("make"):
        return False
    program = folder / "fault.cpp"
    program.write_text(FAULT)
    command = [
        "g++",
        "-fsanitize=address,undefined",
        "-mavx512vnni",
        "-mavxvnni",
        str(program),
        "-o",
        str(folder / "fault"),
    ]
    if subprocess.run(command, capture_output=True).returncode:
        return False
    return subprocess.run([folder / "fault"], capture_output=True).returncode != 0


@pytest.fixture(scope="module")
def programs(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built programs; make builds again what changed."""
    if not sanitized(tmp_path_factory.mktemp("fault")):
        missing("no g++ for x86 with sanitizers")
    assert pytestconfig.cache is not None
    out = pytestconfig.cache.mkdir("native-" + hashlib.sha256((SOURCE / "Makefile").read_bytes()).hexdigest()[:12])
    targets = [str(out / name) for name in ("operations", "fuzz")]
    built = subprocess.run(
        ["make", "-C", str(SOURCE), "CXX=g++", f"OUT={out}", *targets], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-4000:]
    return out


def test_random_packed_tensors_agree_with_the_reference_under_the_sanitizers(programs: Path) -> None:
    done = subprocess.run([programs / "fuzz", str(TENSORS), "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{TENSORS} tensors on" in done.stdout and "agree with the reference" in done.stdout


def test_operations_agree_with_the_reference_under_the_sanitizers(programs: Path) -> None:
    done = subprocess.run([programs / "operations"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "agree with the reference" in done.stdout
