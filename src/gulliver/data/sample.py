"""Step `sample`: a model writes data of its own, so that calibration does not favour the domain of a user's data.

The idea is that of LLM-QAT (2023, arXiv 2305.17888): what a model writes is spread over all that it learned. How it
writes is the family's affair. Each finished batch of texts is kept in scratch, and its randomness is a pure function of
the seed and its number, so a killed run resumes with the next batch and makes the same dataset.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from gulliver.core.context import Context
from gulliver.core.errors import ConfigError, DataError
from gulliver.core.progress import Bar
from gulliver.core.records import EXAMPLES, Sources, SplitSource
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.files import write_atomic
from gulliver.data.options import SampleOptions
from gulliver.tasks import get_task
from gulliver.tasks.base import Task


def run(cfg: SampleOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """Write `examples.parquet`, all of it split "train". ConfigError for a family or a model that writes nothing."""
    model = inputs["model"]
    task = get_task(model.task)
    if not task.generates:
        raise ConfigError(f"{task.name} models write no data of their own; calibrate on a dataset")
    files = [ctx.work / f"batch-{number:05d}.json" for number in range(-(-cfg.count // cfg.batch_size))]
    with ctx.progress.stage("sample", total=cfg.count, unit="example") as bar:
        network = None if all(file.is_file() for file in files) else task.load(model.path)
        for number, file in enumerate(files):
            if not file.is_file():
                _write_batch(task, network, model.path, cfg, ctx.seed, number, file, bar)
            bar.advance(min((number + 1) * cfg.batch_size, cfg.count) - bar.done)
    written = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    rows = [{"source": "own", **row, "split": "train"} for batch in written for row in batch]
    if not rows:
        raise DataError(f"all {cfg.count} examples of model {model.id[:12]} are empty; calibrate on a dataset instead")
    sources = Sources(train=SplitSource(examples=len(rows), files={}), eval=SplitSource(examples=0, files={}))
    with ctx.writer(kind="dataset", task=task.name, config=cfg) as writer:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), writer.path / EXAMPLES)
        sources.write(writer.path)
        return writer.commit()


def _write_batch(
    task: Task, network: Any, folder: Path, cfg: SampleOptions, seed: int, number: int, file: Path, bar: Bar
) -> None:
    """Examples of batch `number` into `file`, whole or not at all."""
    generator = torch.Generator().manual_seed(int(np.random.default_rng([seed, number]).integers(2**63)))
    count = min(cfg.batch_size, cfg.count - number * cfg.batch_size)

    def advance(share: float) -> None:
        bar.advance(number * cfg.batch_size + int(share * count) - bar.done)

    rows = task.generate(
        network, count, folder=folder, options=task.chosen(cfg.family), generator=generator, advance=advance
    )
    write_atomic(file, json.dumps(rows) + "\n")
