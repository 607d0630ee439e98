"""The machine record: what it finds, that it is measured once, and the memory of this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from gulliver.core import machine as machine_file
from gulliver.core import memory
from gulliver.core.machine import Machine, describe, identify, measure_machine, usable_cores


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Machine]:
    """Measuring costs nothing and is written down here."""
    calls: list[Machine] = []

    def measure(found: Machine) -> Machine:
        calls.append(found)
        return replace(found, bandwidth_gb_s=float(len(calls)), fp32_gflop_s=1.0, load_average=0.1)

    monkeypatch.setattr(machine_file, "measure_machine", measure)
    return calls


def test_this_machine_is_found() -> None:
    found = identify()
    assert found.cpu and found.os and found.python.startswith("3.")
    assert 1 <= found.cores <= (os.cpu_count() or 1) and found.cores == usable_cores()
    assert found.ram_bytes > 2**28 and found.usable_ram_bytes <= found.ram_bytes
    assert set(found.isa) <= set(machine_file.ISA)
    assert found.versions["numpy"] == np.__version__
    assert found.bandwidth_gb_s is found.bf16_gflop_s is None
    assert f"{found.cores} core" in found.name and "GB" in found.name


def test_a_measurement_gives_every_figure_and_leaves_torch_as_it_was() -> None:
    import torch

    threads = torch.get_num_threads()
    found = measure_machine(identify(), size_bytes=2**16, rows=32)
    for figure in (found.bandwidth_gb_s, found.fp32_gflop_s, found.bf16_gflop_s):
        assert figure is not None and figure >= 0
    assert torch.get_num_threads() == threads


def test_it_is_measured_once_and_again_when_something_changed(tmp_path: Path, counted: list[Machine]) -> None:
    first = describe(tmp_path)
    assert describe(tmp_path) == first and len(counted) == 1
    assert describe(tmp_path, measure=False) == first and len(counted) == 1
    row = json.loads((tmp_path / "machine.json").read_bytes())
    assert row == json.loads(json.dumps(asdict(first)))
    row["versions"]["torch"] = "0.1"
    (tmp_path / "machine.json").write_text(json.dumps(row))
    assert describe(tmp_path).bandwidth_gb_s == 2.0
    assert describe(tmp_path, again=True).bandwidth_gb_s == 3.0
    assert describe(tmp_path).bandwidth_gb_s == 3.0


@pytest.mark.parametrize("content", [b"", b"[]", b'{"isa": 3}', b'{"isa": [], "colour": "red"}', b"\xff"])
def test_a_record_that_cannot_be_read_is_measured_again(tmp_path: Path, counted: list[Machine], content: bytes) -> None:
    (tmp_path / "machine.json").write_bytes(content)
    assert describe(tmp_path).bandwidth_gb_s == 1.0 and describe(tmp_path).bandwidth_gb_s == 1.0


def test_nothing_is_timed_when_asked_not_to(tmp_path: Path, counted: list[Machine]) -> None:
    assert describe(tmp_path, measure=False).bandwidth_gb_s is None
    assert counted == [] and not (tmp_path / "machine.json").exists()


def test_core_imports_no_torch() -> None:
    script = (
        "import sys, pkgutil, importlib, gulliver.core as c\n"
        "[importlib.import_module('gulliver.core.' + m.name) for m in pkgutil.iter_modules(c.__path__)]\n"
        "bad = [n for n in sys.modules if n.split('.')[0] in ('torch', 'transformers')]\n"
        "assert not bad, bad[:3]"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# ---- memory -------------------------------------------------------------------------------------------------------
def test_memory_is_that_of_this_process() -> None:
    before = memory.current_rss_bytes()
    block = np.ones(64 * 2**20, dtype=np.uint8)
    during = memory.current_rss_bytes()
    assert during - before > 48 * 2**20 and memory.peak_rss_bytes() >= during - 2**20
    del block


def test_the_peak_can_start_again() -> None:
    block = np.ones(64 * 2**20, dtype=np.uint8)
    high = memory.peak_rss_bytes()
    del block
    if not memory.reset_peak_rss():
        pytest.skip("this kernel does not let a process reset its peak")
    assert memory.peak_rss_bytes() < high - 32 * 2**20


def _group(folder: Path, name: str, limit: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(limit + "\n")


@pytest.mark.parametrize(
    ("lines", "limits", "expected"),
    [
        ("0::/a/b\n", {"a/memory.max": "300", "a/b/memory.max": "max"}, 300),
        ("0::/a/b\n", {"a/memory.max": "300", "a/b/memory.max": "200"}, 200),
        ("0::/a\n", {"a/memory.max": "max"}, None),
        ("4:cpu,memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": "500"}, 500),
        ("4:memory:/x\n", {"memory/x/memory.limit_in_bytes": str(2**63 - 4096)}, None),
        ("3:cpu:/x\n", {"memory/x/memory.limit_in_bytes": "500"}, None),
        ("0::/../../other\n", {}, None),
    ],
)
def test_the_smallest_limit_of_the_control_groups_counts(
    tmp_path: Path, lines: str, limits: dict[str, str], expected: int | None
) -> None:
    membership = tmp_path / "membership"
    membership.write_text(lines)
    for path, limit in limits.items():
        _group((tmp_path / "root" / path).parent, path.rsplit("/", 1)[-1], limit)
    assert memory.cgroup_ram_bytes(tmp_path / "root", membership) == expected
    assert memory.cgroup_ram_bytes(tmp_path / "root", tmp_path / "absent") is None
