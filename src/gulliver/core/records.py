"""Every JSON or Parquet file that crosses a stage: its name, said once, and the frozen model of what it holds.

The step that makes a file dumps the model, every other step reads it through the model (core/record.py), so neither can
drift. Files of earlier versions still open: their keys are aliases here, and `former` is the name that a file had.

`packing.json` is read by runtime/packing.py too, by hand, because a packed model opens without pydantic.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Self

from pydantic import AliasChoices, BeforeValidator, Field, PlainSerializer, StringConstraints, model_validator

from gulliver.core.calibration import Calibration
from gulliver.core.evidence.evidence import Evidence
from gulliver.core.evidence.gate import Verdict
from gulliver.core.record import Count, Record, Row
from gulliver.core.store.manifest import MAX_INTEGER, ORIGIN, PACKING, rows_of
from gulliver.core.training import Training

EXAMPLES = "examples.parquet"
"""A dataset: one row each, with the columns `split` and `source` (text) and those of the family."""
SPLITS = ("train", "eval")  # what its column `split` holds

Id = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FormatName = Annotated[str, StringConstraints(pattern=r"^(?:[uchms][1-9]g[1-9][0-9]{0,4}|I?Q[1-9]_[0-9A-Z]{1,2})$")]
"""Of a packed format: "u4g64" is uniform, 4 bits, groups of 64; artifact.md lists the others."""
_LossIncrease = Field(validation_alias=AliasChoices("loss_increase", "damage"))
"""How much the loss is predicted to rise, in the unit of the statistics (compress/statistics.py)."""


def _with_every_field(value: Any) -> Any:
    missing = [field.name for field in fields(Evidence) if isinstance(value, dict) and field.name not in value]
    if missing:
        raise ValueError(f"the field {missing[0]} is missing")
    return value


EvidenceRow = Annotated[Evidence, BeforeValidator(_with_every_field), PlainSerializer(Evidence.to_json)]
VerdictRow = Annotated[Verdict, PlainSerializer(Verdict.to_json)]


# ---- data and models from outside -----------------------------------------------------------------------------------
class SplitSource(Row):
    """Where one split of a dataset came from: its examples, and SHA-256 by the name of each file."""

    examples: Count
    files: dict[str, Id]


class Writing(Row):
    """How a model wrote a dataset: examples drawn, how many were dropped for which fault, and some that were kept."""

    drawn: Count
    dropped: dict[str, Count]
    shown: tuple[str, ...]


class Sources(Record):
    """What a dataset was made from; `writing` where a model wrote it."""

    file = "sources.json"
    remedy = "read the data again"

    train: SplitSource
    eval: SplitSource
    writing: Writing | None = None


class Origin(Record):
    """Where a model came from, and `name`, what its file calls it.

    `original_…` is what was downloaded: a file, its parts, or the folder's weight files together. `original_format` is
    that of most of its bytes, "GGUF Q4_1" or "safetensors F32"; `bfloat16_bytes` are two for each weight, which is what
    the model takes in full. Models pulled by earlier versions do not say these. `notes` says
    what of the source was left out or read as something else.
    """

    file = ORIGIN
    remedy = "pull the model again"

    source: str
    name: str | None = None
    license: str | None = None
    revision: str | None = None
    original_file: str | None = None
    original_format: str | None = None
    original_bytes: Count | None = None
    bfloat16_bytes: Count | None = None
    notes: str | None = None


class Distillation(Record):
    """Mean divergence from the parent at every step, in nats."""

    file = "distillation.json"
    remedy = "distill again"

    losses: tuple[float, ...]


# ---- compression ----------------------------------------------------------------------------------------------------
class WeightRow(Row):
    """One weight that may be packed: shape, block, and (file, moment key, rows key) of each of its uses.

    `inputs`: the dimension along which it is multiplied; None: all but the first. A weight that is a stack of several
    `matrices` [matrices, …] has one use for each.
    """

    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    block: str
    uses: tuple[tuple[str, str, str], ...] = Field(min_length=1, validation_alias=AliasChoices("uses", "views"))
    inputs: Annotated[int, Field(ge=0, le=7)] | None = None
    matrices: Annotated[int, Field(ge=1)] = 1

    @property
    def rows(self) -> int:
        """Rows of all its matrices."""
        return rows_of(self.shape, self.inputs)


class StatisticsTable(Record):
    """What a report of `calibrate` holds, beside its tensors; `blocks` are in the network's order.

    `plain`: why weights that are no vectors stay at 16 bits; `unreached`: what was made up, for those that no data
    reached; both by name. `notes` says what else went another way than usual.
    """

    file = "statistics.json"
    remedy = "calibrate again"

    format: Annotated[int, Field(ge=1, le=1)] = 1
    model: Id
    weights: dict[str, WeightRow]
    blocks: tuple[str, ...]
    sensitivity: str
    examples: Count
    plain: dict[str, str] = Field(default_factory=dict)
    unreached: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _blocks_are_known(self) -> Self:
        for name, row in self.weights.items():
            if row.block not in self.blocks:
                raise ValueError(f"{name} is in the block {row.block!r}, which is not one of the blocks")
        return self


class PartBits(Row):
    """Some rows of a weight in one format; `loss_increase` is the predicted one, None where no plan tells."""

    rows: Count
    format: FormatName
    bits_per_weight: float
    size_bytes: Count = Field(validation_alias=AliasChoices("size_bytes", "bytes"))
    loss_increase: float | None = Field(default=None, validation_alias=AliasChoices("loss_increase", "damage"))


class TensorBits(Row):
    """One weight of `shape` and the row groups it is stored in."""

    name: str
    shape: tuple[Count, ...]
    size_bytes: Count = Field(validation_alias=AliasChoices("size_bytes", "bytes"))
    parts: tuple[PartBits, ...]

    @property
    def bits_per_weight(self) -> float:
        """Mean over the rows; NaN where there are none."""
        rows = sum(part.rows for part in self.parts)
        return sum(part.bits_per_weight * part.rows for part in self.parts) / rows if rows else float("nan")

    @property
    def loss_increase(self) -> float | None:
        """Sum over the row groups; None when no plan tells."""
        known = [part.loss_increase for part in self.parts if part.loss_increase is not None]
        return sum(known) if known else None


class BlockLoss(Row):
    """The predicted loss increase of one block's weights together."""

    name: str
    loss_increase: float = _LossIncrease


class PlannedPoint(Row):
    """The best plan's predicted loss increase at one size."""

    size_bytes: Count
    loss_increase: float = _LossIncrease


class Plan(Record):
    """One format for each weight (or class of its rows), and what other sizes cost; why others stay `plain`."""

    file = "plan.json"
    remedy = "plan again"

    budget_bytes: Count
    size_bytes: Count
    loss_increase: float = _LossIncrease
    tensors: tuple[TensorBits, ...]
    blocks: tuple[BlockLoss, ...]
    frontier: tuple[PlannedPoint, ...] = Field(validation_alias=AliasChoices("frontier", "menu"))
    plain: dict[str, str] = Field(default_factory=dict)


class LossIncrease(Record):
    """The loss increase of each packed weight, predicted from the values that are stored."""

    file = "loss_increase.json"
    former = "damage.json"
    remedy = "quantize again"

    weights: dict[str, float]

    @model_validator(mode="before")
    @classmethod
    def _bare_before(cls, body: Any) -> Any:
        """Earlier versions wrote the weights alone."""
        return {"weights": body} if isinstance(body, dict) and "weights" not in body else body


class PackedPart(Row):
    """Some rows of a packed weight."""

    format: FormatName
    rows: Annotated[int, Field(ge=1, le=MAX_INTEGER)]


class PackedWeight(Row):
    """One packed weight: 2 to 8 sizes, and the dimension of its inputs (None: all but the first)."""

    shape: tuple[Annotated[int, Field(ge=1, le=MAX_INTEGER)], ...] = Field(min_length=2, max_length=8)
    parts: tuple[PackedPart, ...] = Field(min_length=1, max_length=16)
    inputs: Annotated[int, Field(ge=0, le=7)] | None = Field(None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        rows = [part.rows for part in self.parts]
        if sum(rows) != rows_of(self.shape, self.inputs):
            raise ValueError(f"its parts have {rows} rows, the weight has {rows_of(self.shape, self.inputs)}")
        return self


class Packing(Record):
    """Which weights of a model folder are packed, and how."""

    file = PACKING
    remedy = "quantize the model again, or get its folder again"

    format: Annotated[int, Field(ge=1, le=1)] = 1
    tensors: dict[str, PackedWeight]


class PlainTensor(Row):
    """A tensor that is not packed, and why."""

    size_bytes: Count
    reason: str


class PlainTensors(Record):
    """What of a packed model stays at 16 bits; `share` of all bytes of weights, 0 to 1."""

    file = "plain.json"
    remedy = "quantize again"

    share: Annotated[float, Field(ge=0, le=1)]
    tensors: dict[str, PlainTensor]


# ---- measuring and fitting ------------------------------------------------------------------------------------------
class Measured(Record):
    """The evidence of one measurement, and the ids of what was measured."""

    remedy = "measure again"

    model: Id
    dataset: Id | None = None
    parent: Id | None = None
    evidence: tuple[EvidenceRow, ...]


class QualityReport(Measured):
    """What `quality` measured."""

    file = "quality.json"


class HarnessReport(Measured):
    """What `harness` measured."""

    file = "harness.json"


class SpeedReport(Measured):
    """What `speed` measured."""

    file = "speed.json"


class Asked(Row):
    """The budget, as stated by the user; None where nothing was asked."""

    size_bytes: Count | None = None
    max_ram_bytes: Count | None = None
    min_tokens_per_s: float | None = None
    max_drop: float | None = None


class Point(Row):
    """One point of the size-quality plane; drops are fractions of quality given up."""

    size_bytes: Count
    predicted_drop: float | None = None
    measured_drop: float | None = None

    @property
    def drop(self) -> float | None:
        """The measured drop; the predicted one where nothing was measured."""
        return self.predicted_drop if self.measured_drop is None else self.measured_drop


class AnswerPair(Row):
    """What the parent and the model answer to the same request, as people read it."""

    prompt: str
    parent: str
    model: str


class FitResult(Record):
    """What a run of `fit` asked, tried and found.

    `memory` is (seconds, stage, resident bytes); `nearest` is the nearest feasible point of an infeasible budget, None
    where none is known; `artifact_id` is the model that was made, absent where none was, and `reason` says why. A dry
    run has `expected_seconds` by stage instead.
    """

    file = "fit.json"
    remedy = "fit again"

    budget: Asked = Asked()
    effort: str = ""
    frontier: tuple[Point, ...] = ()
    rounds: tuple[Point, ...] = ()
    memory: tuple[tuple[float, str, Count], ...] = ()
    verdicts: tuple[VerdictRow, ...] = ()
    seconds: float | None = None
    expected_seconds: dict[str, float] = Field(default_factory=dict)
    artifact_id: Id | None = None
    nearest: Point | None = None
    reason: str | None = None
    answers: tuple[AnswerPair, ...] = ()
    broad: Writing | None = None

    @property
    def infeasible(self) -> bool:
        """Whether no model met the budget."""
        return self.nearest is not None or (self.artifact_id is None and bool(self.reason))


RECORDS: tuple[type[Record], ...] = (
    *(Sources, Origin, Training, Distillation, Calibration, StatisticsTable, Plan, LossIncrease, Packing, PlainTensors),
    *(QualityReport, HarnessReport, SpeedReport, FitResult),
)

NOT_COPIED = tuple(
    name
    for record in (Packing, PlainTensors, LossIncrease, Calibration, Origin, Training, Distillation)
    for name in (record.file, record.former)
    if name is not None
)
"""Records about one model that do not hold for a model made from it."""
