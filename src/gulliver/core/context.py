"""What a step is given beside its config and inputs: where to write, what to record, what to show, what it may hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from gulliver.core import memory
from gulliver.core.errors import BudgetError
from gulliver.core.evidence.evidence import Evidence
from gulliver.core.progress import Progress
from gulliver.core.store.artifact import ArtifactWriter, create
from gulliver.core.store.store import Store

LIMIT = "max_ram_bytes"
"""The field of a step's options that caps the resident memory of the process: of a run, not of its result."""
ROOM = 1.25
"""What is advised where a run was stopped, in what it had taken by then."""
PEAK = "peak_rss_bytes"
"""File in scratch: the most memory that the work lying there has taken."""


@dataclass(frozen=True)
class Context:
    """Filled in by `pipeline.call` for one call of `step`.

    `inputs` are ids by role. `work` is scratch keyed by the reuse key: it outlives a kill, so a step resumes from what
    it finds there, and is deleted after success. `max_ram_bytes` is the limit in the step's options, `command` repeats
    the call; `recorded` collects the ids of artifacts about which evidence was recorded. `untouched` raises
    ArtifactError when an input is no longer what it was when the call began.
    """

    store: Store
    progress: Progress
    work: Path
    step: str
    version: int = 1
    inputs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    seed: int = 0
    command: str = ""
    max_ram_bytes: int | None = None
    machine_name: str = ""
    recorded: set[str] = field(default_factory=set)
    untouched: Callable[[], None] = lambda: None

    def writer(
        self, *, kind: str, task: str, config: BaseModel | Mapping[str, Any]
    ) -> AbstractContextManager[ArtifactWriter]:
        """A writer in the store for what this step makes; use it in a `with` block and commit."""
        resolved = config.model_dump(mode="json") if isinstance(config, BaseModel) else dict(config)
        resolved.pop(LIMIT, None)
        return create(
            self.store.artifacts_folder,
            kind=kind,
            task=task,
            inputs=self.inputs,
            step={"name": self.step, "version": self.version},
            config=resolved,
            seed=self.seed,
        )

    def record(self, evidence: list[Evidence]) -> None:
        """Record evidence for good. Fields `machine` and `command` that are empty are filled in from this context."""
        self.untouched()
        self.store.record([item.filled(machine=self.machine_name, command=self.command) for item in evidence])
        self.recorded.update(item.artifact_id for item in evidence)

    def check_ram(self, where: str) -> None:
        """After each unit of work: note the peak beside the scratch; BudgetError when it is beyond the limit."""
        memory.give_back_freed_memory(at_once=self.max_ram_bytes is not None)
        peak = self.peak_rss_bytes()
        if self.max_ram_bytes is not None and memory.peak_rss_bytes() > self.max_ram_bytes:
            raise beyond(self.max_ram_bytes, peak, f"at {where}")

    def peak_rss_bytes(self) -> int:
        """The most memory that this call has held, in bytes, what it did before it was killed included."""
        before, peak = noted_peak(self.work), memory.peak_rss_bytes()
        if peak > before:
            unfinished = self.work / f"{PEAK}.new"
            unfinished.write_text(str(peak))
            unfinished.replace(self.work / PEAK)
        return max(peak, before)


def beyond(limit: int, peak: int, where: str) -> BudgetError:
    """The error of a run that took `peak` bytes of memory."""
    return BudgetError(
        f"memory reached {peak / 1e6:.0f} MB {where}; the limit is {limit / 1e6:.0f} MB. Raise it (--ram of fit, "
        f"--max-ram-bytes of a step): {ROOM * peak / 1e6:.0f}MB may do"
    )


def noted_peak(work: Path) -> int:
    """The most memory that what lies in a scratch folder has taken, in bytes; 0 where nothing was noted."""
    noted = work / PEAK
    return int(noted.read_text()) if noted.is_file() else 0
