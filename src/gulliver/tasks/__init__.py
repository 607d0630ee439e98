"""The one place where families of models plug in: a table from a task's name to its class."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.names import unknown

if TYPE_CHECKING:
    from gulliver.core.context import Context
    from gulliver.core.store.artifact import Artifact
    from gulliver.tasks.base import Task

TASKS = {
    "language": "gulliver.tasks.language.task:LanguageTask",
    "vision": "gulliver.tasks.vision.task:VisionTask",
}
"""Task name -> "module:Class"; imported only when asked for."""

OWN_MODEL_TYPES = {"gulliver_inception": "vision"}
"""`model_type` in config.json of the networks in `nets/` -> task; every other model is one of transformers'."""

FOREIGN = {".gguf": ("language", "gulliver.tasks.language.gguf.read:convert_gguf")}
"""Suffix of a single-file model -> (task, function that writes it as a Hugging Face layout folder; see `converter`)."""

EXPORTS = {"gguf": ("language", "gulliver.tasks.language.gguf.write:write_gguf")}
"""Format of one family's models -> (task, function(model, folder, type, context) that writes it and returns facts)."""


@cache
def get_task(name: str) -> Task:
    """The task called `name`. ConfigError names the nearest when there is none."""
    if name not in TASKS:
        raise ConfigError(unknown("task", name, TASKS))
    return _named(TASKS[name])()


def converter(path: Path) -> tuple[str, Callable[[Path, Path], str]]:
    """(task, function(file, folder) -> format) for a model in one file. ConfigError for a file of another kind."""
    if path.suffix not in FOREIGN:
        known = ", ".join(sorted(FOREIGN))
        raise ConfigError(f"{path.name} is no {known} file and no folder; give the folder that holds config.json")
    task, function = FOREIGN[path.suffix]
    return task, _named(function)


def exporter(name: str, task: str) -> Callable[[Artifact, Path, str, Context], dict[str, Any]]:
    """The function that writes a model of `task` in the format `name`. ConfigError for a format of another family."""
    owner, function = EXPORTS[name]
    if task != owner:
        raise ConfigError(f"format {name} is for {owner} models; this is a {task} model: use --format safetensors")
    return _named(function)


def _named(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def detect_task(folder: Path) -> str:
    """The task of the model in a folder, from its config.json. ArtifactError when there is none."""
    path = folder / "config.json"
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} has no config.json; give a Hugging Face layout folder") from error
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is not a JSON object: {error}") from error
    return OWN_MODEL_TYPES.get(model_type, "language") if isinstance(model_type, str) else "language"
