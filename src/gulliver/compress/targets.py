"""What other engines' files hold exactly: which formats, of which weights, and which weights must share one.

vLLM and transformers read compressed-tensors: integers of a Linear with a float16 scale for each group. transformers
opens tensors of several widths together, none of which is an embedding; vLLM has kernels for 4 and 8 bits, and joins
the matrices of a module that read the same input (query, key and value; gate and up), which must be packed alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from gulliver.compress.statistics import Statistics
from gulliver.core.errors import ConfigError
from gulliver.nets.weights import aliases
from gulliver.runtime.formats import BLOCK_TYPES, CODEBOOK_BITS, GROUP_SIZES, PLANES, TILE_ROWS, Format

COMPRESSED = {"transformers": tuple(PLANES), "vllm": (4, 8)}
"""Engine that reads compressed-tensors -> bits of the codes that it has."""


def menu(kind: str, min_bits: int) -> list[Format]:
    """All formats of a kind with at least `min_bits`, by falling bits; codebooks end at 6 bits, 8 is uniform."""
    kinds = ("codebook", "uniform") if kind == "any" else (kind,)
    found = [Format(bits, size, one) for one in kinds for bits in PLANES for size in GROUP_SIZES if bits >= min_bits
             and not (one == "codebook" and bits not in CODEBOOK_BITS)
             and not (kind == "any" and one == "uniform" and bits in CODEBOOK_BITS)]  # fmt: skip
    return sorted(found, key=lambda fmt: -fmt.packed_bytes(TILE_ROWS, 128 * 64))


def formats_of(target: str, min_bits: int) -> list[Format]:
    """The formats that files for `target`, another engine, hold exactly, by falling bytes."""
    if target not in COMPRESSED:
        found = [Format.of_block(name) for name in BLOCK_TYPES]
        return [fmt for fmt in reversed(found) if fmt.bits >= min_bits]
    found = [Format(bits, size, "symmetric") for bits in COMPRESSED[target] for size in GROUP_SIZES if bits >= min_bits]
    return sorted(found, key=lambda fmt: -fmt.packed_bytes(1024, 1024))


def stays_plain(target: str, statistics: Statistics, network: nn.Module) -> dict[str, str]:
    """Why weights have no packed form in a file for `target`, by name. ConfigError where GGUF would need it."""
    found = {}
    groups = aliases(network)
    head = network.get_output_embeddings() if isinstance(network, PreTrainedModel) else None
    for name, row in statistics.weights.items():
        odd = row.matrices > 1 or row.inputs not in (None, 1)
        if target not in COMPRESSED:
            if odd and target == "gguf":
                raise ConfigError(
                    f"{name} holds several matrices or a transposed one, which are not packed for GGUF yet"
                )
            continue
        modules = [network.get_submodule(alias.rpartition(".")[0]) for alias in groups.get(name) or (name,)]
        columns = row.shape[-1]
        if odd or not all(isinstance(module, nn.Linear | nn.Embedding) for module in modules):
            found[name] = "compressed-tensors packs the weight of a Linear alone"
        elif any(isinstance(module, nn.Embedding) for module in modules):
            found[name] = f"{target} reads an embedding, and a head that shares it, at 16 bits"
        elif target == "vllm" and head in modules:
            found[name] = "vLLM reads the head at 16 bits"
        elif columns % min(GROUP_SIZES):
            found[name] = f"its rows of {columns} fill no group of {min(GROUP_SIZES)}"
    return found


def joined_with(target: str, statistics: Statistics) -> dict[str, str]:
    """Weight -> a name that it shares with those that a file for `target` must pack like it."""
    if target != "vllm":
        return {}
    return {
        name: f"{name.rpartition('.')[0].rpartition('.')[0]} {row.uses[0][:2]}"
        for name, row in statistics.weights.items()
    }


def holding(formats: Sequence[Format], name: str, columns: int) -> list[Format]:
    """The formats that hold rows of so many columns. ConfigError when there is none."""
    held = [fmt for fmt in formats if fmt.holds(columns)]
    if not held:
        raise ConfigError(f"that engine has no type of few bits for {name}, whose rows of {columns} fill no block")
    return held
