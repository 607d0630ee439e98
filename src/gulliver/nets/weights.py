"""Giving a network its weights one by one, and taking them away: what streaming a model larger than memory needs.

A tied parameter (one tensor under several names) has one *canonical* name, the first that `named_parameters()` yields;
the helpers here accept any of its names and keep all of them tied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gulliver.core.errors import ArtifactError
from gulliver.core.foreign import foreign
from gulliver.nets.files import Stored, not_finite, stored_tensors

CODES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}
"""Type -> how a safetensors header spells it."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights as a header spells them, every value of which must be finite."""
DAMAGED = "; download or make it again"
OTHER = "the config and the weights are of different models"


@dataclass(frozen=True)
class Room:
    """The most that a network may have for the bytes of its weights: parameters, and numbers in them.

    A number takes an eighth of a byte at least, and a network gives no stored tensor more than a few names. A constant
    part is for buffers and for what is not stored. Without weights, a network is of the largest size there is.
    """

    parameters: int = 2**20
    numbers: int = 2**40

    @classmethod
    def of(cls, tensors: int, size_bytes: int) -> Self:
        """The room of so many stored tensors with so many bytes."""
        return cls(1000 + 4 * tensors, SPARE_NUMBERS + 8 * size_bytes)

    def check(self, parameters: int, numbers: int) -> None:
        """ArtifactError for a network that has more."""
        if parameters > self.parameters or numbers > self.numbers:
            raise ArtifactError(
                f"config.json describes a network of {parameters} parameters or more, with {numbers} numbers: far more "
                f"than the weight files hold; {OTHER}"
            )


def room_of(folder: Path) -> Room:
    """The room for a network by the weight files of a folder; the largest for a folder without any."""
    if not any(folder.glob("*.safetensors")):
        return Room()
    stored = stored_tensors(folder)
    return Room.of(len(stored), sum(tensor.length for tensor in stored.values()))


SPARE_NUMBERS = 2**22
MADE_NUMBERS, COUNTED_NUMBERS = 2**25, 2**21
"""The most numbers of a buffer (a causal mask of 5792 positions) and of a range that any network makes of itself."""
MADE = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye)
COUNTED = (torch.arange, torch.linspace, torch.range)


class _Bounded(TorchFunctionMode):
    """Inside, a tensor that is made from sizes alone has at most so many numbers. ArtifactError, before it is made."""

    def __init__(self, room: Room) -> None:
        super().__init__()
        self.room = room

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MADE or func in COUNTED:
            sizes = kwargs.get("size", args[0] if args and isinstance(args[0], tuple | list) else args)
            numbers = [abs(one) for one in sizes if isinstance(one, int | float)]
            if func in COUNTED:
                wanted, most = max([0, *numbers, kwargs.get("end", 0), kwargs.get("steps", 0)]), COUNTED_NUMBERS
            else:
                wanted, most = math.prod(numbers), max(MADE_NUMBERS, self.room.numbers)
                wanted = wanted**2 if func is torch.eye and len(numbers) == 1 else wanted
            if wanted > most:
                raise ArtifactError(f"config.json asks for a table of {wanted} numbers, which no file holds; {OTHER}")
        return func(*args, **kwargs)


@contextmanager
def empty_parameters(room: Room | None = None) -> Iterator[None]:
    """Networks built inside have parameters on the meta device (no data), while their buffers are real.

    Buffers hold what a constructor computes (rotary frequencies, position ids) and what no file contains. ArtifactError
    as soon as what is built does not fit into `room`, or is larger than any network.
    """
    most = room or Room()
    register = nn.Module.register_parameter
    parameters = numbers = 0

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal parameters, numbers
        if parameter is not None:
            parameters, numbers = parameters + 1, numbers + parameter.numel()
            most.check(parameters, numbers)
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    try:
        with _Bounded(most):
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Canonical parameter name -> all names of that parameter, itself first."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {names[0]: tuple(names) for names in groups.values()}


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Any name of a parameter -> its canonical name."""
    return {name: first for first, names in aliases(model).items() for name in names}


def assign(
    model: nn.Module, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = torch.float32
) -> set[str]:
    """Give `model` the named parameters and persistent buffers, of any shape; floating tensors become `dtype`

    unless it is None. Returns the canonical names filled. Unknown names and wrong shapes raise ArtifactError.
    """
    canonical, groups = canonical_names(model), aliases(model)
    buffers = dict(model.named_buffers())
    filled: set[str] = set()
    for name, tensor in tensors:
        if name not in canonical and name not in buffers:
            raise ArtifactError(f"unexpected tensor {name!r} for this architecture")
        place = buffers[name] if name in buffers else model.get_parameter(name)
        if place.shape != tensor.shape:
            raise ArtifactError(
                f"{name} has shape {list(tensor.shape)}, but config.json makes it {list(place.shape)}; {OTHER}"
            )
        value = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        if name in buffers:
            owner, leaf = _owner(model, name)
            owner._buffers[leaf] = value
        else:
            _replace(model, groups[canonical[name]], value, place.requires_grad and value.is_floating_point())
        filled.add(canonical.get(name, name))
    return filled


def release(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Take the data of every parameter whose canonical name starts with one of `prefixes`; it returns to meta."""
    for first, names in aliases(model).items():
        if first.startswith(tuple(prefixes)):
            old = model.get_parameter(first)
            _replace(model, names, old.data.to("meta"), old.requires_grad)


def _replace(model: nn.Module, names: Iterable[str], value: Tensor, requires_grad: bool) -> None:
    """One new parameter under all of `names`."""
    parameter = nn.Parameter(value, requires_grad=requires_grad)
    for name in names:
        owner, leaf = _owner(model, name)
        owner._parameters[leaf] = parameter


def untie(model: nn.Module, names: Iterable[str]) -> None:
    """Give each of `names`, which are one parameter, a parameter of its own with the same data."""
    for name in names:
        old = model.get_parameter(name)
        _replace(model, (name,), old.data, old.requires_grad)


def unfilled(model: nn.Module) -> list[str]:
    """Canonical names of the parameters that hold no data."""
    return [name for name, parameter in model.named_parameters() if parameter.is_meta]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def all_finite(tensor: Tensor) -> bool:
    """Whether every number of a tensor of any shape is finite. Its ends tell, which are found in one pass."""
    return not tensor.numel() or all(math.isfinite(float(end)) for end in torch.aminmax(tensor))


def read_safetensors(
    folder: Path, dtype: torch.dtype | None = None, only: Callable[[str], bool] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a plain folder, of any shape, one at a time; floating ones become `dtype` when given.

    With `only`, tensors whose name it refuses are not read. ArtifactError for a damaged file, a name in two files, and
    a value that is not finite.
    """
    files: dict[Path, list[str]] = {}
    for name, place in (stored := stored_tensors(folder)).items():
        if only is None or only(name):
            files.setdefault(place.path, []).append(name)
    for path, names in files.items():
        with foreign(f"{path} is damaged", remedy=DAMAGED), safe_open(path, framework="pt") as file:
            for name in names:
                tensor = file.get_tensor(name)
                if stored[name].dtype in FLOATS and not all_finite(tensor):
                    raise not_finite(name, path)
                yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def read_tensor(stored: Mapping[str, Stored], name: str) -> Tensor:
    """One stored tensor, of any shape. ArtifactError for one that is missing, damaged, or not finite."""
    if name not in stored:
        raise ArtifactError(f"the weight files lack {name}; the model is damaged: download or make it again")
    path = stored[name].path
    with foreign(f"{path} is damaged", remedy=DAMAGED), safe_open(path, framework="pt") as file:
        tensor = file.get_tensor(name)
    # as `all_finite`, without a frame more below the steps
    ends = torch.aminmax(tensor) if stored[name].dtype in FLOATS and tensor.numel() else ()
    if not all(math.isfinite(float(end)) for end in ends):
        raise not_finite(name, path)
    return tensor


def owners(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """(name, module) of every module that uses the weight whose first name is `name`, in the order of its names."""
    return [(alias, model.get_submodule(alias.rpartition(".")[0])) for alias in aliases(model)[name]]
