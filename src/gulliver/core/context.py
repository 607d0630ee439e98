"""What a step is given beside its config and inputs: where to write, what to record, what to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from gulliver.core.evidence.evidence import Evidence
from gulliver.core.progress import Progress
from gulliver.core.store.artifact import ArtifactWriter
from gulliver.core.store.store import Store


@dataclass(frozen=True)
class Context:
    """Filled in by `run.call` for one step.

    `work` is scratch keyed by the reuse key: it outlives a kill, so a step resumes from what it finds there, and is
    deleted after success. `max_ram_bytes` caps the peak memory of the step's process; `command` repeats the step.
    """

    store: Store
    progress: Progress
    work: Path
    seed: int = 0
    command: str = ""
    max_ram_bytes: int | None = None
    machine_name: str = ""
    step_version: int = 1

    def writer(
        self,
        *,
        kind: str,
        task: str,
        parents: Sequence[str],
        step_name: str,
        config: BaseModel | Mapping[str, Any],
    ) -> ArtifactWriter:
        """A writer in the store for what this step makes; use it in a `with` block and commit."""
        resolved = config.model_dump(mode="json") if isinstance(config, BaseModel) else dict(config)
        return self.store.writer(
            kind=kind,
            task=task,
            parents=parents,
            step={"name": step_name, "version": self.step_version},
            config=resolved,
            seed=self.seed,
        )

    def record(self, evidence: list[Evidence]) -> None:
        """Record evidence for good. Fields `machine` and `command` that are empty are filled in from this context."""
        self.store.record([item.filled(machine=self.machine_name, command=self.command) for item in evidence])
