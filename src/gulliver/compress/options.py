"""The options of the steps that make weights smaller."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from gulliver.core.errors import ConfigError
from gulliver.core.options import MaxRam, Options
from gulliver.runtime.formats import Format
from gulliver.runtime.packing import weight_shapes
from gulliver.tasks import family

BACKWARD_BYTES = 1_200_000_000
"""Room for the process, and activations and gradients of one batch in one block, beside the block's weights."""


class CalibrateOptions(Options):
    """Options of `calibrate`."""

    examples: int = Field(64, ge=1, le=65536, description="calibration examples (windows of text, images)")
    batch_size: int = Field(4, ge=1, description="examples in memory at once")
    family: dict[str, Any] = Field(default_factory=dict, description="options of the model's family")
    moments: Literal["full", "diagonal"] = Field("full", description="keep H, or only its diagonal (no GPTQ then)")
    sensitivity: Literal["auto", "gradient", "power"] = Field(
        "auto", description="what outputs count by: the loss's gradient, or their own power; auto: by memory"
    )
    gradient_examples: int = Field(16, ge=1, le=65536, description="examples of the backward pass")
    max_ram_bytes: MaxRam = None

    def resolved(self, inputs: Mapping[str, Any]) -> Self:
        """Outputs count by the loss's gradient where the family has one and the memory limit allows a backward pass."""
        if self.sensitivity != "auto":
            return self
        model = inputs["model"]
        gradient = family(model.task).own_loss
        if gradient and self.max_ram_bytes is not None:
            largest = max(math.prod(shape) for shape in weight_shapes(model.path).values())
            gradient = 4 * largest + BACKWARD_BYTES <= self.max_ram_bytes
        return self.model_copy(update={"sensitivity": "gradient" if gradient else "power"})


class PlanOptions(Options):
    """Options of `plan`."""

    size_bytes: int = Field(ge=1, description="most bytes of all weight files together")
    kind: Literal["any", "codebook", "uniform"] = Field("any", description="which formats may be chosen")
    target: Literal["native", "gguf", "vllm", "transformers"] = Field(
        "native", description="what must hold the weights exactly: this engine, or another's file of the planned size"
    )
    min_bits: int = Field(2, ge=2, le=8, description="fewest bits of a code")
    probe_rows: int = Field(32, ge=1, description="rows of each weight on which the loss increase is predicted")
    gptq: bool = Field(True, description="predict for GPTQ, as quantize does by default; else for rounding to nearest")
    max_ram_bytes: MaxRam = None


class QuantizeOptions(Options):
    """Options of `quantize`. `bits`, `group_size` and `kind` are for a run without a plan."""

    bits: int = Field(4, ge=2, le=8, description="bits of a code: 2, 3, 4, 5, 6 or 8; not used with a plan")
    group_size: int = Field(64, description="weights that share a scale: 32, 64 or 128; not used with a plan")
    kind: Literal["codebook", "uniform"] = Field(
        "codebook", description="values learned per tensor, or evenly spaced with a zero point; not used with a plan"
    )
    method: Literal["gptq", "rtn"] = Field(
        "gptq", description="gptq passes rounding errors on to later weights; rtn rounds each to nearest, the baseline"
    )
    sweeps: int = Field(2, ge=0, le=64, description="times that gptq's codes are chosen again, each given all others")
    max_ram_bytes: MaxRam = None

    @model_validator(mode="after")
    def _is_a_format(self) -> Self:
        try:
            Format(self.bits, self.group_size, self.kind)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self


class ExportOptions(Options):
    """Options of `export`."""

    format: Literal["safetensors", "compressed-tensors", "gguf", "onnx"] = Field(
        description="what to write; onnx is refused, this version cannot write it"
    )
    widen: bool = Field(
        default=False,
        description="compressed-tensors: store values that do not fit their own bits in wider codes (exact, larger)",
    )
    type: Literal["exact", "f32", "bf16", "f16", "q8_0"] = Field(
        default="exact",
        description="gguf: how matrices are stored; exact takes the smallest type that holds each bit for bit",
    )

    @model_validator(mode="after")
    def _can_be_written(self) -> Self:
        if self.format == "onnx":
            raise ValueError("onnx cannot be written yet; use safetensors, compressed-tensors or gguf")
        if self.widen and self.format != "compressed-tensors":
            raise ValueError(f"widen is for compressed-tensors; {self.format} holds no codes, so leave it out")
        if self.type != "exact" and self.format != "gguf":
            raise ValueError(f"type is for gguf; {self.format} has one way to store weights, so leave it out")
        return self
