"""Running a network a block at a time: its weights come from the folder before a block runs, and go right after."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from gulliver.core import memory
from gulliver.core.errors import ArtifactError
from gulliver.nets.weights import assign, canonical_names, release, unfilled
from gulliver.runtime.packed import PackedTensor
from gulliver.runtime.reference import read_stored

HALF = {torch.bfloat16, torch.float16}


def narrow_weights(network: nn.Module) -> set[str]:
    """Canonical names of the weights that only products under bfloat16 autocast read.

    Those of linears and lookup tables, and stacks of matrices outside convolutions.
    """
    canonical, found = canonical_names(network), set()
    for name, module in network.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            own = leaf == "weight" and isinstance(module, nn.Linear | nn.Embedding)
            if own or (parameter.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd)):
                found.add(canonical[f"{name}.{leaf}" if name else leaf])
    return found


@contextmanager
def filled(network: nn.Module, folder: Path, prefixes: tuple[str, ...], narrow: Collection[str]) -> Iterator[None]:
    """While the block runs, the parameters under `prefixes` hold their weights from a folder, plain or packed.

    `narrow` names (canonically) weights that only products under bfloat16 autocast read: they keep the 16 bits they are
    stored in, or have bfloat16 where they are packed. All others become float32. A network that has its weights keeps
    them as they are. ArtifactError when the folder lacks one.
    """
    if not any(name.startswith(prefixes) for name in unfilled(network)):
        yield
        return
    canonical = canonical_names(network)
    weights: list[tuple[str, Tensor]] = []
    for name, tensor in read_stored(folder, lambda name: canonical.get(name, name).startswith(prefixes)):
        half = canonical.get(name, name) in narrow
        if isinstance(tensor, PackedTensor):
            weights.append((name, tensor.dequantize(torch.bfloat16 if half else torch.float32)))
        elif tensor.is_floating_point() and not (half and tensor.dtype in HALF):
            weights.append((name, tensor.float()))
        else:
            weights.append((name, tensor))
        del tensor  # so that what was stored is not in memory while the block runs
    assign(network, weights, None)
    missing = [name for name in unfilled(network) if name.startswith(prefixes)]
    if missing:
        raise ArtifactError(f"{folder} holds no weights for {missing[0]}; bring the model in with `gulliver pull`")
    memory.give_back_freed_memory(at_once=False)  # of stored forms, and of what passed through the block before
    try:
        yield
    finally:
        release(network, prefixes)
