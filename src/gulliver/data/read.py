"""Step `read`: files or a catalog entry become a dataset with a train and an eval part that share nothing.

Which part is which: with `eval_data`, all of `data` trains and all of `eval_data` judges; without it the task holds a
part of `data` out. A passage that stands in both parts is refused, because a measurement on it would be worthless.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from gulliver.core import catalog
from gulliver.core.context import Context
from gulliver.core.errors import ConfigError, DataError
from gulliver.core.overlap import excerpt, fingerprints, first_overlap
from gulliver.core.records import EXAMPLES, Sources, SplitSource
from gulliver.core.store.artifact import Artifact, hash_file
from gulliver.data.options import ReadOptions
from gulliver.tasks import get_task
from gulliver.tasks.base import Task


def run(cfg: ReadOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """Write `examples.parquet` with the column `split`. DataError when a part is empty or the parts overlap."""
    del inputs
    return make_dataset(cfg, ctx, "read")


def make_dataset(cfg: ReadOptions, ctx: Context, step_name: str) -> Artifact:
    """The dataset artifact of `cfg`, made by the step called `step_name`."""
    task = get_task(cfg.task)
    with ctx.progress.stage("read", unit="part"):
        data = locate(cfg.data, cfg.task, ctx)
        if cfg.eval_data is None:
            reader = with_options(task, {"holdout": cfg.holdout, "text_column": cfg.text_column})
            parts = {split: reader.read(data, split) for split in ("train", "eval")}
            files = {"train": _files(data), "eval": _files(data)}
        else:
            held_out = locate(cfg.eval_data, cfg.task, ctx)
            parts = {"train": _everything(task, data, cfg), "eval": _everything(task, held_out, cfg)}
            files = {"train": _files(data), "eval": _files(held_out)}
        refuse_overlap(parts["train"], parts["eval"])
    rows = [{"source": data.name, **row, "split": split} for split, part in parts.items() for row in part]
    sources = {split: SplitSource(examples=len(parts[split]), files=files[split]) for split in parts}
    with ctx.writer(kind="dataset", task=task.name, parents=(), step_name=step_name, config=portable(cfg)) as writer:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), writer.path / EXAMPLES)
        Sources(**sources).write(writer.path)
        return writer.commit()


def locate(name: str, task: str, ctx: Context) -> Path:
    """The file or folder that `name` stands for. ConfigError for a catalog entry that is no dataset of this task."""
    if not name.startswith(catalog.PREFIX):
        path = Path(name).expanduser()
        if not path.exists():
            raise DataError(f"{name} does not exist; give a file, a folder or catalog:NAME")
        return path
    entry = catalog.lookup(name)
    if entry.kind != "dataset" or entry.task != task:
        raise ConfigError(f"{name} is a {entry.kind} for {entry.task}; a dataset for {task} is needed here")
    return catalog.fetch(name, ctx.store.cache)


def with_options(task: Task, options: dict[str, Any]) -> Task:
    """The task with its reading options set: the fields of its class. ConfigError for one that it does not have."""
    fields = {field.name: field.default for field in dataclasses.fields(task)} if dataclasses.is_dataclass(task) else {}
    for name, value in options.items():
        if name not in fields and value != ReadOptions.model_fields[name].default:
            raise ConfigError(f"the {task.name} task has no option {name!r}; leave it out")
    chosen = {name: value for name, value in options.items() if name in fields}
    return dataclasses.replace(task, **chosen) if chosen else task  # type: ignore[type-var]


def _everything(task: Task, path: Path, cfg: ReadOptions) -> list[dict[str, Any]]:
    """All examples of `path`, of whichever split the task would have put them into."""
    reader = with_options(task, {"text_column": cfg.text_column})
    if dataclasses.is_dataclass(reader) and hasattr(reader, "holdout"):
        return dataclasses.replace(reader, holdout=0.0).read(path, "train")  # type: ignore[call-arg]
    return [*reader.read(path, "train"), *reader.read(path, "eval")]


def refuse_overlap(train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
    """DataError naming the first passage that stands in both parts."""
    found = first_overlap(held_out, fingerprints(train))
    if found is not None:
        raise DataError(
            f'the train and eval parts share a passage: "{excerpt(found)}". A measurement on it would prove nothing; '
            "remove it from one of them, or give other eval_data"
        )


def portable(cfg: ReadOptions) -> dict[str, Any]:
    """The config for the manifest, with the names of local files in place of their paths on this machine."""
    raw = cfg.model_dump(mode="json")
    for key in ("data", "eval_data"):
        if raw[key] and not raw[key].startswith(catalog.PREFIX):
            raw[key] = Path(raw[key]).name
    return raw


def _files(path: Path) -> dict[str, str]:
    if path.is_file():
        return {path.name: hash_file(path)}
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): hash_file(file) for file in files}
