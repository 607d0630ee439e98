"""What a model is calibrated or trained on, remembered so that it is never measured on it."""

from __future__ import annotations

from collections.abc import Sequence

from gulliver.core.calibration import Calibration, SeenRow
from gulliver.core.overlap import fingerprints, remember
from gulliver.core.store.artifact import Artifact
from gulliver.tasks.base import Task


def calibration_of(task: Task, datasets: Sequence[Artifact]) -> Calibration:
    """The record of the train parts of these datasets; of families without text their units alone."""
    known = fingerprints(unit for part in datasets for unit in task.units_of(part.path, "train"))
    seen = (remember(task.phrases_of(part.path, "train")) for part in datasets)
    kept = tuple(SeenRow.of(one) for one in seen if len(one.lines.hashes))
    return Calibration(dataset=datasets[0].id, fingerprints=tuple(known), seen=kept)
