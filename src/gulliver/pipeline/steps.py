"""The one table of steps. The command line, the Python API, recipes and docs/steps.md are made from it.

A step is `run(cfg, inputs, ctx) -> Artifact`; `cfg` is a frozen model in its stage's options.py, which imports no
torch. This file names both as strings, so that reading the table imports no stage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from gulliver.core.errors import ConfigError
from gulliver.core.names import did_you_mean, named, unknown
from gulliver.tasks import TASKS, options_of

INPUT_KINDS = {
    "model": "model",
    "models": "model",
    "parent": "model",
    "dataset": "dataset",
    "samples": "dataset",
    "calibration": "report",
    "plan": "report",
}
"""The kind of artifact that an input of a step must be, by its role."""
FAMILY = "options of the model's family"
"""What help calls them."""


@dataclass(frozen=True)
class Step:
    """One row: Artifact(s) x config -> Artifact.

    `function` is "module:function", `options` "module:class"; `needs` and `optional` name inputs (keys of INPUT_KINDS);
    `makes` lists the kinds the step may return; `reads` names options that may hold paths of local files, whose
    contents are then part of the reuse key; `several` names inputs that may be more than one artifact. `compresses`
    says that a model it makes is judged against the one that went in, `here` that its result holds for this machine and
    the cores that may be used alone. Raise `version` whenever the same config and
    inputs would give another result.
    """

    name: str
    function: str
    options: str
    needs: tuple[str, ...]
    makes: tuple[str, ...]
    help: str
    optional: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    compresses: bool = False
    here: bool = False
    version: int = 1


class WrongKey(ConfigError):
    """A key of a step's config that is unknown, missing or has a wrong value; `key` is its name."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


STEPS = (
    Step("pull", "gulliver.data.pull:run", "gulliver.data.options:PullOptions",
         needs=(), makes=("model", "dataset"), reads=("source",), version=3,
         help="bring a model in: catalog:NAME, hf:ORG/NAME, a local folder or a GGUF file"),
    Step("read", "gulliver.data.read:run", "gulliver.data.options:ReadOptions",
         needs=(), makes=("dataset",), reads=("data", "eval_data"),
         help="make a dataset from files or the catalog, split into parts that never overlap"),
    Step("sample", "gulliver.data.sample:run", "gulliver.data.options:SampleOptions",
         needs=("model",), makes=("dataset",), version=2,
         help="let a model write data of its own, for calibration that favours no domain"),
    Step("train", "gulliver.train.train:run", "gulliver.train.options:TrainOptions",
         needs=("dataset",), makes=("model",), version=4,
         help="train a new network on a dataset"),
    Step("calibrate", "gulliver.compress.calibrate:run", "gulliver.compress.options:CalibrateOptions",
         needs=("model", "dataset"), optional=("samples",), makes=("report",), version=5,
         help="stream calibration data through a model, block by block, and keep each layer's statistics"),
    Step("plan", "gulliver.compress.plan:run", "gulliver.compress.options:PlanOptions",
         needs=("model", "calibration"), makes=("report",), version=4,
         help="choose one format per tensor: least predicted loss increase within the budget"),
    Step("quantize", "gulliver.compress.quantize:run", "gulliver.compress.options:QuantizeOptions",
         needs=("model", "calibration"), optional=("plan",), makes=("model",), compresses=True, version=3,
         help="pack a model's weights into few bits, by the plan or in one format"),
    Step("distill", "gulliver.train.distill:run", "gulliver.train.options:DistillOptions",
         needs=("model", "parent", "dataset"), optional=("samples",), makes=("model",), compresses=True, version=5,
         help="train a model, packed or dense, to answer like its parent"),
    Step("quality", "gulliver.audit.quality:run", "gulliver.audit.options:QualityOptions",
         needs=("model", "dataset"), optional=("parent",), makes=("report",), version=2,
         help="measure a model on held-out data, paired against its parent"),
    Step("harness", "gulliver.audit.harness:run", "gulliver.audit.options:HarnessOptions",
         needs=("model",), optional=("parent",), makes=("report",), reads=("include_path",),
         help="score a language model on tasks of lm-eval, paired against its parent by item"),
    Step("speed", "gulliver.audit.speed:run", "gulliver.audit.options:SpeedOptions",
         needs=("model",), makes=("report",), here=True, version=2,
         help="measure a model's speed, memory and size on this machine"),
    Step("export", "gulliver.compress.export:run", "gulliver.compress.options:ExportOptions",
         needs=("model",), makes=("model",), compresses=True, version=2,
         help="write a model in another tool's format, exactly or not at all"),
)  # fmt: skip


def find(name: str) -> Step:
    """The row called `name`; ConfigError naming the nearest when there is none."""
    for step in STEPS:
        if step.name == name:
            return step
    raise ConfigError(unknown("step", name, [step.name for step in STEPS]))


def fields_of(config: type[Any]) -> dict[str, Any]:
    """Name -> pydantic field of all that users may write: in place of the field `family` the options of every family.

    The description of a family's option names the families that have it. Imports pydantic, no torch.
    """
    own = dict(config.model_fields)
    if own.pop("family", None) is None:
        return own
    rows = [(name, field, task) for task in TASKS for name, field in options_of(task).model_fields.items()]
    for name, field, _ in rows:
        if name not in own:
            families = ", ".join(task for other, _, task in rows if other == name)
            own[name] = copy(field)
            own[name].description, own[name].json_schema_extra = f"{families}: {field.description}", {"group": FAMILY}
    return own


def checked_config(step: Step, values: Mapping[str, Any], also: tuple[str, ...] = ()) -> Any:
    """The step's frozen options made from `values`; text is read as sizes where the field is in bytes.

    WrongKey (a ConfigError) names the key or value that is wrong, the nearest key, and the remedy; `also` are keys that
    may be meant where an unknown one is written.
    """
    from pydantic import ValidationError  # here, because `gulliver --help` has no use for it

    config = named(step.options)
    try:
        values = _folded(config, {key: _with_units(key, value) for key, value in values.items()})
        return config(**values)
    except ValidationError as failure:
        raise _explained(step, fields_of(config), failure, also) from None


def _folded(config: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a model's family, given beside the step's own, checked and put into its field `family`."""
    from pydantic import create_model

    family = {name: info for name, info in fields_of(config).items() if name not in config.model_fields}
    own = {key: value for key, value in values.items() if key not in family}
    if not isinstance(own.get("family", {}), Mapping):
        return own
    given = {**own.get("family", {}), **{key: value for key, value in values.items() if key in family}}
    fields: Any = {name: (info.annotation, info) for name, info in family.items() if name in given}
    checked = create_model("Family", **fields)(**given).model_dump()
    return {**own, "family": {**given, **checked}} if given else own


def _with_units(key: str, value: Any) -> Any:
    """ "84MB" for a field in bytes, "5%" for a number; every other value as it is."""
    from gulliver.core.quantities import parse_fraction, parse_size

    try:
        if isinstance(value, str) and key.endswith("_bytes"):
            return parse_size(value, key)
        if isinstance(value, str) and re.fullmatch(r"[\d.]+\s*%", value):
            return parse_fraction(value, key)
    except ConfigError as failure:
        raise WrongKey(str(failure), key) from None
    return value


def _explained(step: Step, fields: Mapping[str, Any], failure: Any, also: tuple[str, ...]) -> WrongKey:
    """The first problem that pydantic found, as one sentence with its remedy."""
    problem = failure.errors(include_url=False)[0]
    key = str(problem["loc"][0]) if problem["loc"] else ""
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if problem["type"] == "extra_forbidden":
        message = f"step {step.name!r} has no key {key!r}{did_you_mean(key, (*also, *fields))}"
    elif problem["type"] == "missing":
        message = f"step {step.name!r} needs the key {key!r}{_described(fields.get(key))}"
    elif key:
        value = problem["input"]
        message = f"step {step.name!r}: {key} = {value!r} is not valid: {message}{_described(fields.get(key))}"
    else:
        message = f"step {step.name!r}: {message}"
    return WrongKey(message, key)


def _described(field: Any) -> str:
    """What a field is for and what it takes, as the end of an error message."""
    if field is None:
        return ""
    default = "" if field.is_required() else f", default {field.default!r}"
    about = f" ({field.description})" if field.description else ""
    return f"; it takes {type_name(field.annotation)}{default}{about}"


def type_name(annotation: Any) -> str:
    """A type as users write about it: int, 'fast' | 'normal', float | None."""
    if isinstance(annotation, type) and not get_args(annotation):
        return "none" if annotation is type(None) else annotation.__name__
    if get_origin(annotation) is Literal:
        return " | ".join(repr(value) for value in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return type_name(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(type_name(part) for part in get_args(annotation))
    return str(annotation).replace("typing.", "")
