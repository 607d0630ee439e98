"""Numbers of GGUF's tensor types: blocks of bytes to values, a share at a time on every core.

The gguf package knows most types' arithmetic; two that ternary models use are here (ggml-quants.c). A block of n
weights has a float16 scale d and codes q of few bits, the first code in the lowest bits:

    Q1_0 (n = 128)        1 bit     value = d · (2 q - 1)
    Q2_0 (n = 64 or 128)  2 bits    value = d · (q - 1)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import gguf.quants
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gulliver.core.errors import ArtifactError
from gulliver.nets.weights import all_finite
from gulliver.tasks.language.gguf.header import TensorInfo

Bytes = NDArray[np.uint8]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float32}
"""Types that keep their own precision (float64 has no network); all others become bfloat16 unless they are packed."""
_PLAIN: Mapping[str, type] = {
    **{"F32": np.float32, "F16": np.float16, "F64": np.float64},
    **{"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64},
}
SHARE = 2**19
"""Numbers that are decoded at a time: few enough that what lies between the steps stays in the cache."""
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def dtype_of(info: TensorInfo) -> torch.dtype:
    """The dtype that a tensor's values become."""
    return DTYPES.get(info.type.name, torch.bfloat16)


def raw_blocks(info: TensorInfo) -> Bytes:
    """A tensor's blocks where they lie in the file, uint8 [blocks, bytes of one]; read from the disk when used."""
    mapped = np.memmap(info.path, np.uint8, "r", info.offset, (info.length,))
    return mapped.reshape(-1, info.type.size_bytes)


def decode(info: TensorInfo, dtype: torch.dtype) -> Tensor:
    """The values of a tensor of any shape. ArtifactError when one is not finite."""
    name, blocks = info.type.name, raw_blocks(info)
    if name == "BF16":
        whole = torch.from_numpy(np.array(blocks).view(np.int16).reshape(info.shape)).view(torch.bfloat16)
        return _finite(info, whole.to(dtype))
    out = torch.empty(len(blocks), info.type.block, dtype=dtype)
    decoder, step = decoder_of(name), max(1, SHARE // info.type.block)

    def share(start: int) -> bool:
        values = torch.from_numpy(np.ascontiguousarray(decoder(blocks[start : start + step]), dtype=np.float32))
        out[start : start + step] = values
        return all_finite(values)

    if not all(in_shares(share, range(0, len(blocks), step))):
        raise not_finite(info)
    return out.reshape(info.shape)


def in_shares(work: Callable[[int], bool], starts: range) -> list[bool]:
    """`work` of every start, on all cores."""
    if len(starts) == 1:
        return [work(starts[0])]
    with ThreadPoolExecutor(CORES) as pool:
        return list(pool.map(work, starts))


def not_finite(info: TensorInfo) -> ArtifactError:
    """The error of a tensor with a value that is no number."""
    return ArtifactError(f"{info.path}: {info.name} holds values that are not finite; the file is damaged")


def _finite(info: TensorInfo, values: Tensor) -> Tensor:
    if not all_finite(values):
        raise not_finite(info)
    return values


def decoder_of(name: str) -> Callable[[Bytes], NDArray[np.float32]]:
    """A function from blocks uint8 [n, bytes of one] to their values [n, numbers of one]."""
    if name in _PLAIN:
        return lambda blocks: np.ascontiguousarray(blocks).view(_PLAIN[name]).astype(np.float32)
    if name in OWN:
        return OWN[name]
    kind = getattr(gguf.quants, name)
    if hasattr(kind, "init_grid"):
        kind.init_grid()
    return kind.dequantize_blocks


def _scale(blocks: Bytes) -> NDArray[np.float32]:
    return np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)


def q1_0_levels(blocks: Bytes) -> NDArray[np.int8]:
    """-1 or 1 for every weight, int8 [blocks, 128], from blocks uint8 [blocks, 18]."""
    return np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").view(np.int8) * 2 - 1


def q2_0_levels(blocks: Bytes) -> NDArray[np.int8]:
    """-1, 0, 1 or 2 for every weight, int8 [blocks, n], from blocks uint8 [blocks, 2 + n / 4]."""
    codes = blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
    return codes.reshape(len(blocks), -1).view(np.int8) - 1


OWN: Mapping[str, Callable[[Bytes], NDArray[np.float32]]] = {
    "Q1_0": lambda blocks: q1_0_levels(blocks) * _scale(blocks),
    "Q2_0": lambda blocks: q2_0_levels(blocks) * _scale(blocks),
}
