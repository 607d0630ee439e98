"""What is known of a family of models before any of it is imported: its row in the table of tasks/__init__.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Family:
    """One row. `task`, `options`, `answerer` and `claims` are "module:attribute", imported when asked for.

    `answerer` opens a model: (folder, name, OpenOptions) -> Answerer; `options` is a FamilyOptions; `claims` says
    whether a folder with this config.json is a model of the family. `examples` names what examples are: datasets of
    families that read the same kind are interchangeable. `speed_metric` is what `--speed` limits. `can` lists what its
    answerers do, and `pipeline_tag` is Hugging Face's word for that; `alike` names what must be equal in two networks'
    configs, so that one can be judged by the other's answers. `own_loss` says whether a model has a loss without a
    parent to be close to. `sampled` are its options for data that a model writes itself in `fit`, `judged` those for
    measuring on them, and `beside` further ones where the user's own data are measured on too.
    """

    task: str
    options: str
    answerer: str
    claims: str
    examples: str
    speed_metric: str
    can: tuple[str, ...]
    alike: tuple[str, ...] = ()
    pipeline_tag: str = ""
    own_loss: bool = True
    sampled: Mapping[str, Any] = field(default_factory=dict)
    judged: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Converted:
    """What a converter says of a model in foreign files: the format of most of its bytes, the files, what they call it.

    `weights` is how many the network has; `note` is a sentence for the user, "" when there is nothing to say.
    """

    format: str
    files: tuple[Path, ...]
    name: str | None
    weights: int
    note: str = ""


@dataclass(frozen=True)
class Foreign:
    """A format of other tools, as "module:attribute"s: `find` (path) -> the file that is meant, or None;

    `check` (file) -> all files of its model, an error when it cannot be read, importing no torch; `convert`
    (file, folder) -> Converted writes it as a folder.
    """

    family: str
    find: str
    check: str
    convert: str
