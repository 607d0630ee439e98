"""Which products of a network take place with which weight, seen as torch computes them.

A weight is recognised by where its numbers lie in memory, not by the module that owns it. So a linear, a transposed
matrix, a table of which rows are looked up, a convolution and one matrix of a stack of experts are all seen, however a
network wraps them, and a weight that several modules share is one weight.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CUT = "only parts of its rows are multiplied, which cannot be told apart"


@dataclass(frozen=True)
class Call:
    """A call of torch: `weight` (a view of one) summed over its dimension `inputs` (None: all but the first) with `x`.

    `x` [..., columns] as rows; for a batched product [matrices, ..., columns]. `channel` is the output's dimension of
    the weight's rows. `table`: rows of the weight are looked up by `x` (whole numbers).
    """

    weight: Tensor  # [rows, columns] or another order, or [matrices, …]
    x: Tensor  # [positions, columns] with any dimensions in front, or [matrices, positions, columns]
    inputs: int | None
    channel: int = -1
    table: bool = False


@dataclass(frozen=True)
class Product:
    """A call with a watched weight: its name, the dimension of the weight that is summed over, and which rows.

    `weighed`: only some rows of the weight, from `first_row`, are summed, each times a number of `x`. They are like
    rows that are looked up: one counts as much as those numbers are large.
    `matrices`: the numbers of the matrices of a stack, of which x and the output have one each (`batched`) or which is
    one; empty for a weight that is one matrix. `first_row` is None where the rows are not known.
    """

    name: str
    call: Call
    inputs: int | None
    matrices: tuple[int, ...] = ()
    batched: bool = False
    first_row: int | None = 0
    weighed: bool = False


class Watch(TorchFunctionMode):
    """While it is entered, `seen(product, output)` is told of every product with one of `weights` (name -> tensor).

    What it returns takes the output's place, unless None. `odd` collects weights that are used in a way that cannot be
    packed, with the reason.
    """

    def __init__(self, weights: Mapping[str, Tensor], seen: Callable[[Product, Tensor], Tensor | None]) -> None:
        super().__init__()
        self.odd: dict[str, str] = {}
        self._seen = seen
        held = [(weight.data_ptr(), name, weight) for name, weight in weights.items() if not weight.is_meta]
        self._held = sorted(held, key=lambda row: row[0])
        self._starts = [start for start, _, _ in self._held]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        reader = READERS.get(func)
        if reader is None or not isinstance(output, Tensor):
            return output
        try:
            call = reader(self._find, *args, **(kwargs or {}))
        except (TypeError, ValueError):  # arguments under names that no reader knows: as if it were no product
            call = None
        product = self._product(call) if call is not None else None
        changed = self._seen(product, output) if product is not None else None
        return output if changed is None else changed

    def _find(self, tensor: Any) -> tuple[str, Tensor] | None:
        """The watched weight that `tensor` is, or is a view of."""
        if not isinstance(tensor, Tensor) or tensor.is_meta or not self._held or not tensor.numel():
            return None
        place = bisect_right(self._starts, tensor.data_ptr()) - 1
        if place < 0:
            return None
        start, name, weight = self._held[place]
        inside = tensor.data_ptr() < start + weight.nbytes and tensor.dtype == weight.dtype
        return (name, weight) if inside else None

    def _product(self, call: Call) -> Product | None:
        name, whole = self._find(call.weight) or ("", call.weight)
        view, at = call.weight, (call.weight.data_ptr() - whole.data_ptr()) // whole.element_size()
        if call.inputs is None:
            return Product(name, call, None)
        size, stride = view.shape[call.inputs], view.stride(call.inputs)
        dims = [dim for dim in range(whole.dim()) if (whole.shape[dim], whole.stride(dim)) == (size, stride)]
        if not dims:
            if whole.dim() == 2 and _some_rows(view, call.inputs, whole):
                return Product(name, call, 1, first_row=at // whole.stride(0), weighed=True)
            self.odd[name] = CUT
            return None
        inputs, first = dims[-1], whole.stride(0)
        if whole.dim() == 2:
            other = 1 - inputs
            known = view.dim() == 2
            return Product(name, call, inputs, first_row=at // whole.stride(other) if known else None)
        if whole.dim() > 3 or inputs == 0:
            whole_view = view.numel() == whole.numel()
            return Product(name, call, inputs, first_row=0 if whole_view and view.dim() == 2 else None)
        number, rest = divmod(at, first)
        if view.dim() == 2:
            return Product(name, call, inputs, (number,), first_row=rest // whole.stride(3 - inputs))
        if view.stride(0) != first:
            return Product(name, call, inputs, first_row=None)
        return Product(name, call, inputs, tuple(range(number, number + view.shape[0])), True, 0 if not rest else None)


def _some_rows(view: Tensor, inputs: int, whole: Tensor) -> bool:
    """Whether the sum over a dimension of `view` is one over some of the rows of the matrix `whole`, in a row."""
    other = 1 - inputs % 2
    columns = view.dim() == 2 and (view.shape[other], view.stride(other)) == (whole.shape[1], whole.stride(1))
    return columns and view.stride(inputs) == whole.stride(0)


# ---- how the arguments of a call are read ---------------------------------------------------------------------------
Find = Callable[[Any], Any]


def _linear(find: Find, input: Tensor, weight: Tensor, bias: Any = None) -> Call | None:
    return Call(weight, input, weight.dim() - 1) if find(weight) and weight.dim() == 2 else None


def _matmul(find: Find, left: Tensor, right: Tensor, **options: Any) -> Call | None:
    if find(right) and _for_each_example(right, left):
        return Call(right[:, 0], left, 1)
    if find(left) and _for_each_example(left, right):
        return Call(left[:, 0], right.transpose(-1, -2), 2, channel=-2)
    if find(right) and right.dim() in (2, 3):
        return Call(right, left, right.dim() - 2)
    if find(left) and left.dim() in (2, 3):
        columns = right.transpose(-1, -2) if right.dim() > 1 else right[None]
        return Call(left, columns, left.dim() - 1, channel=-2 if right.dim() > 1 else -1)
    return None


def _for_each_example(stack: Tensor, x: Tensor) -> bool:
    """Whether a stack of matrices [matrices, 1, …, …] is repeated for `x` [matrices, examples, …, …]."""
    return stack.dim() == x.dim() == 4 and stack.shape[1] == 1 and stack.shape[0] == x.shape[0]


def _reversed(find: Find, right: Tensor, left: Tensor) -> Call | None:
    return _matmul(find, left, right)


def _added(find: Find, input: Any, *factors: Tensor, **options: Any) -> Call | None:
    named = [options[name] for name in ("mat1", "batch1", "mat2", "batch2") if name in options]
    left, right = (*factors, *named)
    return _matmul(find, left, right)


def _embedding(find: Find, input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Call | None:
    return Call(weight, input, 1, table=True) if find(weight) and weight.dim() == 2 else None


def _looked_up(find: Find, weight: Tensor, indices: Tensor, *args: Any, **options: Any) -> Call | None:
    return _embedding(find, indices, weight)


def _conv(
    find: Find,
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Call | None:
    if not find(weight) or groups != 1 or isinstance(padding, str) or input.dim() != weight.dim():
        return None
    flat = weight.dim() == 3  # along one dimension: as a picture of height 1
    x = input[:, :, None] if flat else input

    def pair(value: Any, height: int) -> tuple[int, int]:
        sizes = (value,) * (weight.dim() - 2) if isinstance(value, int) else tuple(value)
        return (height, sizes[0]) if flat else (sizes[0], sizes[1])

    kernel = (1, weight.shape[2]) if flat else (weight.shape[2], weight.shape[3])
    patches = nn.functional.unfold(x.float(), kernel, pair(dilation, 1), pair(padding, 0), pair(stride, 1))
    return Call(weight, patches.transpose(1, 2), None, channel=1)


def _einsum(find: Find, equation: Any, *operands: Any) -> Call | None:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    places = [place for place in (1, 0) if find(operands[place])]
    if not places:
        return None
    left, output = equation.replace(" ", "").split("->")
    letters = left.split(",")
    weight, x = operands[places[0]], operands[1 - places[0]]
    ours, theirs = letters[places[0]], letters[1 - places[0]]
    summed = [one for one in ours if one in theirs and one not in output]
    rows = [one for one in ours if one not in theirs]
    both = [one for one in ours if one in theirs and one in output]
    if len(summed) != 1 or len(rows) != 1 or both not in ([], [ours[0]]) or len(set(theirs)) != x.dim():
        return None
    x = x.movedim(theirs.index(summed[0]), -1)
    if both:
        kept = theirs.replace(summed[0], "")
        x = x.movedim(kept.index(both[0]), 0)
        if output[0] != both[0]:
            return Call(weight, x, ours.index(summed[0]))  # rows are not known: the stack is not in front
    return Call(weight, x, ours.index(summed[0]), channel=output.index(rows[0]))


_T = torch.Tensor
READERS: Mapping[Any, Callable[..., Call | None]] = {
    **dict.fromkeys((nn.functional.linear,), _linear),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, _T.matmul, _T.mm, _T.bmm, _T.__matmul__), _matmul),
    **dict.fromkeys((_T.__rmatmul__,), _reversed),
    **dict.fromkeys((torch.addmm, torch.baddbmm, _T.addmm, _T.baddbmm), _added),
    **dict.fromkeys((nn.functional.embedding,), _embedding),
    **dict.fromkeys((torch.embedding,), _looked_up),
    **dict.fromkeys((nn.functional.conv1d, nn.functional.conv2d, torch.conv1d, torch.conv2d), _conv),
    **dict.fromkeys((torch.einsum, torch.functional.einsum), _einsum),
}
"""Function of torch -> how its arguments are read: the weight among them, and what it is multiplied with."""
