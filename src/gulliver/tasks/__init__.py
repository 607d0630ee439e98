"""The one place where families of models plug in: a table from a family's name to what is known of it.

Reading the table imports neither torch nor a family: rows name classes and functions as strings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gulliver.core.errors import ConfigError
from gulliver.core.foreign import foreign
from gulliver.core.names import named, unknown
from gulliver.nets.kinds import model_config, quantization, refusal
from gulliver.nets.selection import select
from gulliver.tasks.family import Converted, Family, Foreign

if TYPE_CHECKING:
    from gulliver.core.context import Context
    from gulliver.core.store.artifact import Artifact
    from gulliver.tasks.answerer import Answerer, OpenOptions
    from gulliver.tasks.base import Task
    from gulliver.tasks.options import FamilyOptions
    from gulliver.tasks.rewritten import Rewritten


TASKS: Mapping[str, Family] = {
    "language": Family(
        task="gulliver.tasks.language.task:LanguageTask",
        options="gulliver.tasks.options:LanguageOptions",
        answerer="gulliver.tasks.language.answerer:open_answerer",
        claims="gulliver.tasks.language.config:claims",
        examples="text",
        speed_metric="decode_tokens_per_s",
        can=("generate", "predict"),
        alike=("vocab_size",),
        pipeline_tag="text-generation",
        sampled={"tokens": 256},
        judged={"context": 256},
        beside={"questions": 0},
    ),
    "encoder": Family(
        task="gulliver.tasks.encoder.task:EncoderTask",
        options="gulliver.tasks.options:EncoderOptions",
        answerer="gulliver.tasks.encoder.answerer:EncoderAnswerer",
        claims="gulliver.tasks.encoder.config:claims",
        examples="text",
        speed_metric="examples_per_s",
        can=("embed", "predict"),
        alike=("vocab_size", "hidden_size"),
        pipeline_tag="feature-extraction",
        own_loss=False,
    ),
    "vision": Family(
        task="gulliver.tasks.vision.task:VisionTask",
        options="gulliver.tasks.options:FamilyOptions",
        answerer="gulliver.tasks.vision.answerer:VisionAnswerer",
        claims="gulliver.tasks.vision.config:claims",
        examples="images",
        speed_metric="examples_per_s",
        can=("predict",),
        alike=("classes", "channels", "height", "width"),
        pipeline_tag="image-classification",
    ),
}
"""The last row that claims a folder has it; what no row claims is refused."""

DEFAULT = "language"
"""The family of data that is read when neither a model nor an option says which."""

FOREIGN = (
    Foreign(
        family="language",
        find="gulliver.tasks.language.gguf.header:model_file",
        check="gulliver.tasks.language.gguf.config:files_of",
        convert="gulliver.tasks.language.gguf.read:convert_gguf",
    ),
)
"""Formats of other tools whose models become folders when they are pulled."""


def family(name: str) -> Family:
    """The row called `name`. ConfigError names the nearest when there is none."""
    if name not in TASKS:
        raise ConfigError(unknown("task", name, TASKS))
    return TASKS[name]


EXPORTS = {"gguf": ("language", "gulliver.tasks.language.gguf.write", "write_gguf", "beside_gguf")}
"""Format of one family's models -> (task, module, and two functions of it: one of (model, folder, type, context) that

writes a file and returns facts; one of a folder that returns about how many bytes a file has beside the weights, and
raises ConfigError where none of few bits holds the model).
"""


@cache
def get_task(name: str) -> Task:
    """The task of the family called `name`. ConfigError names the nearest when there is none."""
    row = family(name)
    return named(row.task)(row)


def options_of(name: str) -> type[FamilyOptions]:
    """The options class of the family called `name`; imports pydantic, no torch."""
    return named(family(name).options)


def open_model(folder: Path, task: str, name: str, options: OpenOptions) -> Answerer:
    """A model that answers, opened from its folder. ArtifactError for a damaged one, ConfigError for wrong options."""
    return named(family(task).answerer)(folder, name, options)


def same_examples(one: str, other: str) -> bool:
    """Whether data for the family `one` is data for the family `other`."""
    return family(one).examples == family(other).examples


def foreign_files(path: Path) -> tuple[Path, ...]:
    """The files of the model in another tool's format that `path` names: one of them, or the folder they are in.

    Empty when there is none. ArtifactError, before any weight is read, for one that cannot be converted.
    """
    for row in FOREIGN:
        if (found := named(row.find)(path)) is not None:
            return named(row.check)(found)
    return ()


def converter(path: Path) -> tuple[str, Callable[[Path, Path], Converted]]:
    """(family, function(file, folder)) for a model in foreign files. ConfigError for a file of another kind."""
    for row in FOREIGN:
        if named(row.find)(path) is not None:
            return row.family, named(row.convert)
    told = f"{path.name} is not a GGUF file (it does not begin with the letters GGUF) or a folder"
    raise ConfigError(f"{told}; give a .gguf file, or the folder that holds config.json")


def exporter(name: str, task: str) -> Callable[[Artifact, Path, str, Context], dict[str, Any]]:
    """The function that writes a model of `task` in the format `name`. ConfigError for a format of another family."""
    owner, module, write, _ = EXPORTS[name]
    if task != owner:
        raise ConfigError(f"format {name} is for {owner} models; this is a {task} model: use --format safetensors")
    return named(f"{module}:{write}")


def bytes_beside(name: str, task: str, folder: Path) -> int:
    """About how many bytes a file of the format `name` has beside the weights of the model in a folder.

    ConfigError when the model cannot be packed in what such a file holds.
    """
    owner, module, _, beside = EXPORTS[name]
    if task != owner:
        raise ConfigError(f"its file is for {owner} models, and this is a {task} model")
    return int(named(f"{module}:{beside}")(folder))


def detect_task(folder: Path) -> str:
    """The family of the model in a folder, from its config.json. ArtifactError when there is none that reads it."""
    config = model_config(folder)
    with foreign(f"{folder / 'config.json'} is not a usable model config"):
        for name, row in reversed(list(TASKS.items())):
            if named(row.claims)(folder, config):
                quantization(folder, config)  # which refuses what cannot be dequantized
                return name
        raise refusal(folder, config)


def rewriter(folder: Path) -> Callable[[Path, Path], Rewritten] | None:
    """The function that writes the model of a folder as a plain one; None for a folder that is plain already.

    Plain: the weights are floats, in the files where they are looked for, of a whole model and not a part of one. A
    model that Gulliver packed is plain too. ArtifactError for a folder without weights.
    """
    config = model_config(folder)
    with foreign(f"{folder / 'config.json'} is not a usable model config"):
        usual = select(folder).usual and quantization(folder, config) is None
        part = named("gulliver.tasks.language.config:is_part")(folder, config)
    return None if usual and not part else named("gulliver.tasks.text.plain:write_plain")
