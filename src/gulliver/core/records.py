"""Every JSON or Parquet file that crosses a stage: its name, said once, and the frozen model of what it holds."""

from __future__ import annotations

EXAMPLES = "examples.parquet"
SOURCES = "sources.json"
ORIGIN = "origin.json"
PACKING = "packing.json"
CALIBRATION = "calibration.json"
DAMAGE = "damage.json"
TRAINING = "training.json"
DISTILLATION = "distillation.json"

NOT_COPIED = (PACKING, DAMAGE, CALIBRATION, ORIGIN, TRAINING, DISTILLATION)
"""Records about one model that do not hold for a model made from it."""
