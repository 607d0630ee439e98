"""The machine that a number was measured on: cores, instruction sets, memory, and what it really reaches.

Bandwidth is measured with numpy, peaks with torch's GEMM; torch is imported inside the measurement only. The record is
kept in `home/machine.json` and measured again when the CPU, the cores or a version changed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import timeit
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path

from gulliver.core.memory import cgroup_ram_bytes, total_ram_bytes
from gulliver.core.progress import plural
from gulliver.core.store.files import write_atomic
from gulliver.core.store.manifest import canonical_json

ISA = (
    "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
"""The instruction sets that kernels may use, as Linux spells them."""

_VERSIONED = ("numpy", "torch", "transformers", "scipy", "gulliver")
_REPEATS = 5
FILE = "machine.json"


@dataclass(frozen=True)
class Machine:
    """One machine as measured. Bandwidth is GB/s of reads by all cores together; peaks are 10⁹ operations per second of

    dense matrix products by all cores, None where the operation is not there. `load_average` is that of the last
    minute before measuring: above 0.5 the figures are too low.
    """

    cpu: str
    cores: int
    isa: tuple[str, ...]
    ram_bytes: int
    os: str
    python: str
    cgroup_ram_bytes: int | None = None
    bandwidth_gb_s: float | None = None
    fp32_gflop_s: float | None = None
    bf16_gflop_s: float | None = None
    int8_gop_s: float | None = None
    load_average: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def usable_ram_bytes(self) -> int:
        """What a process here may hold: the control group's limit where it is smaller than the machine's memory."""
        return min(self.ram_bytes, self.cgroup_ram_bytes or self.ram_bytes)

    @property
    def name(self) -> str:
        """One line for evidence: "AMD EPYC, 2 cores, avx512_vnni, 24 GB"."""
        ranked = ("avx512_vnni", "avx512f", "avx_vnni", "avx2", "asimddp")
        best = next((isa for isa in ranked if isa in self.isa), "plain")
        return f"{self.cpu}, {plural(self.cores, 'core')}, {best}, {self.usable_ram_bytes / 1e9:.0f} GB"


def describe(home: Path | str, *, measure: bool = True, again: bool = False) -> Machine:
    """This machine; measured once (a few seconds) and kept in `home/machine.json`.

    With `measure=False` nothing is timed: figures come from the kept record, or are None. With `again=True` the kept
    record is replaced, for instance because the machine was busy when it was made.
    """
    found = identify()
    before = kept(home)
    if before is not None and not again and _identity(before) == _identity(found):
        return before
    if not measure:
        return found
    machine = measure_machine(found)
    Path(home).mkdir(parents=True, exist_ok=True)
    write_atomic(Path(home) / FILE, canonical_json(asdict(machine)) + b"\n")
    return machine


def kept(home: Path | str) -> Machine | None:
    """The record in `home/machine.json`; None when there is none, or not one of this version."""
    try:
        row = json.loads((Path(home) / FILE).read_bytes())
        return Machine(**{**row, "isa": tuple(row["isa"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def identify() -> Machine:
    """This machine without measuring anything."""
    cpu, flags = _cpu()
    return Machine(
        cpu=cpu,
        cores=usable_cores(),
        isa=tuple(isa for isa in ISA if isa in flags),
        ram_bytes=total_ram_bytes(),
        cgroup_ram_bytes=cgroup_ram_bytes(),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions=_versions(),
    )


def measure_machine(machine: Machine, size_bytes: int = 2**27, rows: int = 1024) -> Machine:
    """`machine` with bandwidth (`size_bytes` read per core) and peaks (`rows` x `rows` products) measured now."""
    load = round(os.getloadavg()[0], 2)
    bandwidth = bandwidth_gb_s(machine.cores, min(size_bytes, machine.usable_ram_bytes // 16))
    return replace(
        machine,
        bandwidth_gb_s=round(bandwidth, 1),
        load_average=load,
        **{name: round(value, 1) for name, value in _gemm_peaks(machine.cores, rows).items()},
    )


def usable_cores() -> int:
    """Cores that this process may run on: its affinity, cut by the control group's CPU quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    words = quota.read_text().split() if quota.is_file() else []
    if len(words) == 2 and words[0].isdigit():
        count = min(count, max(1, math.ceil(int(words[0]) / int(words[1]))))
    return count


def bandwidth_gb_s(cores: int, size_bytes: int) -> float:
    """Reads per second by one thread per core, each over its own array that no cache holds."""
    import numpy

    arrays = [numpy.ones(max(1, size_bytes // 8), dtype=numpy.int64) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        seconds = _best(lambda: list(pool.map(lambda array: array.max(), arrays)))
    return sum(array.nbytes for array in arrays) / seconds / 1e9


def _gemm_peaks(cores: int, rows: int) -> dict[str, float]:
    """Operations per second (a multiply and an add are two) of square products, in 10⁹; absent where not there."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        operations = 2 * rows**3 / 1e9
        peaks: dict[str, float] = {}
        for name, dtype in (("fp32_gflop_s", torch.float32), ("bf16_gflop_s", torch.bfloat16)):
            left = torch.ones(rows, rows, dtype=dtype)
            peaks[name] = operations / _best(lambda left=left: left @ left)
        codes = torch.ones(rows, rows, dtype=torch.int8)
        # a build of torch may have no int8 product on this CPU
        with contextlib.suppress(RuntimeError, NotImplementedError):
            peaks["int8_gop_s"] = operations / _best(lambda: torch.ops.aten._int_mm(codes, codes))
        return peaks
    finally:
        torch.set_num_threads(before)


def _best(work: Callable[[], object]) -> float:
    """The shortest of several times, in seconds: other work on the machine can only make a time longer."""
    return min(timeit.repeat(work, number=1, repeat=1 + _REPEATS))


def _cpu() -> tuple[str, frozenset[str]]:
    """The CPU's name and its flags as the operating system spells them."""
    info = Path("/proc/cpuinfo")
    table: dict[str, str] = {}
    for line in info.read_text().splitlines() if info.is_file() else []:
        key, _, value = line.partition(":")
        table.setdefault(key.strip(), value.strip())
    name = table.get("model name") or platform.processor() or platform.machine() or "unknown CPU"
    return name, frozenset((table.get("flags") or table.get("Features") or "").split())


def _versions() -> dict[str, str]:
    versions = {}
    for package in _VERSIONED:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return versions


def _identity(machine: Machine) -> tuple[object, ...]:
    return machine.cpu, machine.cores, machine.isa, machine.python, tuple(sorted(machine.versions.items()))
