"""Step `read`: files or a catalog entry become a dataset with a train and an eval part that share nothing.

Which part is which: with `eval_data`, all of `data` trains and all of `eval_data` judges; without it the family holds a
part of `data` out. What is in both parts is refused, because a measurement on it would be worthless: one long passage,
short lines that make up most of what is held out, or as much of its text as no other text would share by chance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from gulliver.core import catalog
from gulliver.core.context import Context
from gulliver.core.errors import ConfigError, DataError
from gulliver.core.foreign import files_below
from gulliver.core.overlap import (
    KEPT_WHOLE,
    MAX_SHARED,
    excerpt,
    fingerprints,
    first_overlap,
    remember,
    shared_lines,
    shared_runs,
)
from gulliver.core.progress import Bar
from gulliver.core.records import EXAMPLES, Sources, SplitSource
from gulliver.core.store.artifact import Artifact, hash_file
from gulliver.core.store.files import named_path
from gulliver.data.options import ReadOptions
from gulliver.tasks import get_task, same_examples
from gulliver.tasks.base import Task

TOLD_SHARE = 0.1
"""Of the eval part: so many short lines that are in the train part too are told."""


def run(cfg: ReadOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """Write `examples.parquet` with the column `split`. DataError when a part is empty or the parts overlap."""
    task = get_task(cfg.task)
    options = task.chosen(cfg.family)
    with ctx.progress.stage("read", unit="example") as bar:
        data = locate(cfg.data, cfg.task, ctx)
        held_out = data if cfg.eval_data is None else locate(cfg.eval_data, cfg.task, ctx)
        whole = cfg.eval_data is not None
        parts = {"train": (data, "all" if whole else "train"), "eval": (held_out, "all" if whole else "eval")}
        _refuse_shared(task, parts, options, ctx)
        config = cfg.model_dump(mode="json")
        for key in ("data", "eval_data"):  # names of local files in place of their paths on this machine
            if config[key] and not config[key].startswith(catalog.PREFIX):
                config[key] = Path(config[key]).name
        with ctx.writer(kind="dataset", task=task.name, config=config) as writer:
            counts = _write(writer.path / EXAMPLES, task, parts, options, bar)
            sources = {split: SplitSource(examples=counts[split], files=_files(parts[split][0])) for split in parts}
            Sources(train=sources["train"], eval=sources["eval"]).write(writer.path)
            return writer.commit()


def _refuse_shared(task: Task, parts: Mapping[str, tuple[Path, str]], options: Any, ctx: Context) -> None:
    """DataError when the parts share a passage, when most of the eval part is short lines of the train part, or when

    more of its text is in that than could be by chance.
    """
    train, judging = (task.units_of(path, name, options) for path, name in parts.values())
    if (found := first_overlap(judging, fingerprints(train))) is not None:
        raise DataError(
            f'the train and eval parts share a passage: "{excerpt(found)}". A measurement on it would prove '
            "nothing; remove it from one of them, or give other eval_data"
        )
    (train_path, train), (path, name) = parts.values()
    seen = remember(task.phrases_of(train_path, train, options), KEPT_WHOLE)
    shared = shared_lines(task.phrases_of(path, name, options), seen)
    told = f"{shared.share:.0%} of the eval part repeats short lines of the train part, such as"
    told += f' "{excerpt(shared.longest)}"'
    if shared.share > MAX_SHARED:
        raise DataError(
            f"{told}. A measurement on them would prove nothing; keep each line once (sort -u), or give other eval_data"
        )
    share, least = shared_runs(remember(task.phrases_of(path, name, options), KEPT_WHOLE), seen)
    if seen.is_text_of(share, least):
        raise DataError(
            f"{share:.0%} of the eval part's text is in the train part, letter by letter; {seen.run_limit:.0%} may be. "
            "A measurement on it would prove nothing; give other eval_data, or data that do not repeat"
        )
    if shared.share >= TOLD_SHARE:
        ctx.progress.print(f"read: {told}")


def _write(file: Path, task: Task, parts: dict[str, tuple[Path, str]], options: Any, bar: Bar) -> dict[str, int]:
    """Stream the parts into one Parquet file with the columns `source` and `split`; the examples of each part."""
    counts: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        writer: Any = None
        for split, (path, name) in parts.items():
            counts[split] = 0
            for batch in task.examples(path, name, options):
                table = pyarrow.Table.from_batches([batch])
                if "source" not in table.column_names:
                    table = table.append_column("source", pyarrow.array([path.name] * len(table), pyarrow.string()))
                table = table.append_column("split", pyarrow.array([split] * len(table), pyarrow.string()))
                if writer is None:
                    writer = stack.enter_context(pyarrow.parquet.ParquetWriter(file, table.schema))
                writer.write_table(table.cast(writer.schema))
                counts[split] += len(table)
                bar.advance(len(table))
    return counts


def locate(name: str, task: str, ctx: Context) -> Path:
    """The file or folder called `name`. ConfigError for a catalog entry that is not a dataset for this task."""
    if not name.startswith(catalog.PREFIX):
        path = named_path(name)
        if not path.exists():
            raise DataError(f"{name} does not exist; give a file, a folder or catalog:NAME")
        return path
    entry = catalog.lookup(name)
    if entry.kind != "dataset" or not same_examples(entry.task, task):
        raise ConfigError(f"{name} is a {entry.kind} for {entry.task}; a dataset for {task} is needed here")
    return catalog.fetch(name, ctx.store.cache)


def _files(path: Path) -> dict[str, str]:
    base = path.parent if path.is_file() else path
    files = [path] if path.is_file() else files_below(path, DataError)
    return {file.relative_to(base).as_posix(): hash_file(file) for file in files}
