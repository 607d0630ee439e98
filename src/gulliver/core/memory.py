"""How much memory this process holds now and held at most, and how much it may hold."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_MMAP_THRESHOLD = -3
"""The number of this option of mallopt in <malloc.h>."""
_CLEAR = Path("/proc/self/clear_refs")


def current_rss_bytes() -> int:
    """Resident memory of this process now, in bytes (VmRSS; elsewhere the peak, which is never less)."""
    found = _status("VmRSS")
    return found if found is not None else peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Highest resident memory of this process since it started or since `reset_peak_rss`, in bytes (VmHWM)."""
    found = _status("VmHWM")
    if found is not None:
        return found
    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> bool:
    """Let the peak start again from the present memory. False where the kernel does not offer it."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def give_back_freed_memory(at_once: bool) -> None:
    """Give what is free now back to the system, and, `at_once`, what is freed from now on. Nothing outside glibc.

    glibc keeps freed blocks of up to 32 MB for later, which a limit on resident memory counts as used; to do without
    that costs time.
    """
    import ctypes

    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        if at_once:
            library.mallopt(_MMAP_THRESHOLD, 2**20)
        library.malloc_trim(0)


def total_ram_bytes() -> int:
    """Memory of the machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cgroup_ram_bytes(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """The smallest memory limit of the control groups this process is in, in bytes; None where there is no limit."""
    limits = []
    lines = membership.read_text().splitlines() if membership.is_file() else []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(base) and (group / name).is_file():
                limits.append((group / name).read_text().strip())
    found = [int(limit) for limit in limits if limit.isdigit()]
    small = [limit for limit in found if limit < total_ram_bytes()]
    return min(small, default=None)


def _status(key: str) -> int | None:
    lines = _STATUS.read_text().splitlines() if _STATUS.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
