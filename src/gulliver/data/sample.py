"""Step `sample`: a model writes data of its own, so that no domain is favoured by calibration, nor by measurement.

The idea is that of LLM-QAT (2023, arXiv 2305.17888): what a model writes is spread over all that it learned. How it
writes is the family's affair, and what is not fit to be read; faulty examples are dropped and counted, and more are
drawn until there are enough. Each batch is kept in scratch, and an example is a pure function of the seed and its
number, so a killed run resumes with the next batch and makes the same dataset.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import partial
from typing import Any

import pyarrow
import pyarrow.parquet

from gulliver.core.context import Context
from gulliver.core.errors import DataError
from gulliver.core.progress import Bar
from gulliver.core.records import EXAMPLES, Sources, SplitSource, Writing
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.files import write_atomic
from gulliver.data.options import SampleOptions
from gulliver.tasks import get_task
from gulliver.tasks.base import Written

MOST_DRAWS = 3
"""Times the examples that are wanted; a model that writes more junk than that gives fewer."""
LEAST_SHARE = 0.25
"""Of the examples that are wanted; with fewer the model writes too badly for its text to stand for what it reads."""
USUAL_SHARE, USUAL_WEIGHT = 0.8, 8
"""Share of what a model writes that is fit, before any is known, and how many examples that guess counts for."""
SHOWN, SHOWN_CHARACTERS = 3, 400


def run(cfg: SampleOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """Write `examples.parquet`: `count` examples of the split "train", `held_out` of the split "eval", or in the same

    proportion as many as are fit. ConfigError for a family that writes nothing, DataError when too few are fit.
    """
    model, wanted, fit = inputs["model"], cfg.count + cfg.held_out, 0
    task, drawn = get_task(model.task), list[Written]()
    asked: dict[str, Any] = {"options": task.chosen(cfg.family), "max_ram_bytes": cfg.max_ram_bytes}
    with (
        ctx.progress.stage("sample", total=wanted, unit="example") as bar,
        task.author(model.path, seed=ctx.seed, work=ctx.work, **asked) as author,
    ):
        while fit < wanted and len(drawn) < MOST_DRAWS * wanted:
            file = ctx.work / f"batch-{len(drawn):06d}.json"
            found = file.is_file()
            if not found:
                missing = _missing(wanted - fit, fit, len(drawn))
                numbers = range(len(drawn), len(drawn) + min(cfg.batch_size, missing))
                batch = author.write(numbers, partial(_tell, bar, (wanted - fit) * len(numbers) / missing))
                write_atomic(file, json.dumps([[example.row, example.fault] for example in batch]) + "\n")
                ctx.check_ram("writing")
            drawn += [Written(*pair) for pair in json.loads(file.read_text(encoding="utf-8"))]
            fit = sum(not example.fault for example in drawn)
            bar.advance(min(fit, wanted) - bar.done, found=found)
    dropped = Counter(example.fault for example in drawn if example.fault)
    kept = [example.row for example in drawn if not example.fault][:wanted]
    if len(kept) < LEAST_SHARE * wanted:
        told = ", ".join(f"{count} {fault}" for fault, count in dropped.items())
        raise DataError(
            f"of {len(drawn)} examples that model {model.id[:12]} wrote, {len(kept)} are fit to calibrate on ({told}); "
            "calibrate on a dataset instead"
        )
    judging = {int(at * len(kept) / (held or 1)) for held in [cfg.held_out * len(kept) // wanted] for at in range(held)}
    rows = [
        {"source": "own", **row, "split": "eval" if number in judging else "train"} for number, row in enumerate(kept)
    ]
    shown = [str(next(iter(row.values())))[:SHOWN_CHARACTERS] for row in kept[:SHOWN]]
    sources = Sources(
        train=SplitSource(examples=len(rows) - len(judging), files={}),
        eval=SplitSource(examples=len(judging), files={}),
        writing=Writing(drawn=len(drawn), dropped=dict(dropped), shown=tuple(shown)),
    )
    with ctx.writer(kind="dataset", task=model.task, config=cfg) as writer:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), writer.path / EXAMPLES)
        sources.write(writer.path)
        return writer.commit()


def _tell(bar: Bar, expected: float, share: float) -> None:
    """Show that a share of a batch is written, of which so many examples are expected to be fit."""
    bar.advance(0, begun=expected * share)


def _missing(wanted: int, fit: int, drawn: int) -> int:
    """How many examples to draw for `wanted` that are fit, as `fit` of those drawn so far were."""
    share = (fit + USUAL_SHARE * USUAL_WEIGHT) / (drawn + USUAL_WEIGHT)
    return math.ceil(wanted / share)
