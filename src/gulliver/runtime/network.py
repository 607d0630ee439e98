"""Networks that transformers knows, from a Hugging Face layout folder, plain or packed: with or without weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights

from gulliver.core.errors import ArtifactError
from gulliver.core.foreign import foreign
from gulliver.nets.files import Stored, same_bytes, stored_tensors
from gulliver.nets.kinds import model_config
from gulliver.nets.quiet import quiet
from gulliver.nets.selection import select
from gulliver.nets.weights import (
    aliases,
    assign,
    canonical_names,
    empty_parameters,
    read_tensor,
    room_of,
    unfilled,
    untie,
)
from gulliver.runtime.packing import is_packed, read_packing
from gulliver.runtime.reference import read_tensors

COMPUTED = re.compile(
    r"(^|\.)(inv_freq|(cos|sin)_cached|(position|token_type)_ids|relative_position_index|embed_positions\.weights|"
    r"masked_bias|causal_mask|(attn|attention)\.bias)$|^(model\.)?mtp\."
)
"""How the names of buffers end that older files store, and networks compute; and how those of layers begin that predict

further tokens beside the next one, which is the same without them.
"""


def read_config(folder: Path) -> transformers.PretrainedConfig:
    """The config in `folder`. ArtifactError when there is none or transformers does not know the architecture."""
    raw = model_config(folder)
    with foreign(f"{folder / 'config.json'} is not a usable model config"), quiet():
        if "auto_map" in raw and not _known(raw):
            raise ValueError("it asks to run code from the folder (auto_map), which Gulliver never does")
        return transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)


def _known(raw: Mapping[str, Any]) -> bool:
    """Whether transformers itself has the network that a config names, so that no code from its folder is needed."""
    names = raw.get("architectures") or ()
    return raw.get("model_type") in transformers.CONFIG_MAPPING and any(
        hasattr(transformers, str(one)) for one in names
    )


def network_of(config: Any, folder: Path, auto: Any = transformers.AutoModelForCausalLM) -> Any:
    """The network that a config of transformers describes, parameters on meta, buffers real.

    `folder` is named in the ArtifactError for a config that describes none.
    """
    with foreign(f"{folder / 'config.json'} describes no network"), quiet(), no_init_weights():
        # one expert after another: no faster way of a CPU is as exact, and calibration sees each one's products
        options = {"dtype": torch.float32, "experts_implementation": "eager"}
        with empty_parameters(room_of(folder)):
            named = _named(config, auto)
            model = named._from_config(config, **options) if named else auto.from_config(config, **options)
            model.tie_weights()
    return model.eval()


def _named(config: Any, auto: Any) -> Any:
    """The class that `architectures` names, where `auto` has no network for the config, or one with a decoder too.

    That is a part of a larger model: of a multimodal one, or the encoder alone. None elsewhere.
    """
    found = [getattr(transformers, str(name), None) for name in config.architectures or ()]
    named = next((one for one in found if getattr(one, "config_class", None) is type(config)), None)
    encoder = auto is transformers.AutoModel and getattr(named, "__name__", "").endswith("EncoderModel")
    return named if encoder or type(config) not in auto._model_mapping else None


def empty_network(folder: Path, auto: Any) -> nn.Module:
    """The network `config.json` describes, parameters on meta, buffers real, `source_folder` set.

    Weights are tied as the files say: two that differ are two, whatever the config says, and equal ones are one.
    """
    model = network_of(read_config(folder), folder, auto)
    _tie_as_stored(model, folder)
    model.source_folder = str(folder)
    return model


def _tie_as_stored(model: Any, folder: Path) -> None:
    """Give every name of a tied parameter its own where the files hold different tensors under these names.

    And tie the head to the embedding where the files hold the same tensor twice.
    """
    if not any(folder.glob("*.safetensors")):
        return
    stored, packing = stored_tensors(folder), read_packing(folder) if is_packed(folder) else {}
    for names in aliases(model).values():
        there = [name for name in names if name in stored or name in packing]
        if len(there) > 1 and (any(name in packing for name in there) or not _equal(stored, there)):
            untie(model, there)
            model.config.tie_word_embeddings = False
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    table, head = (getattr(end, "weight", None) for end in ends)
    if head is None or table is None or head is table or not getattr(model, "_tied_weights_keys", None):
        return
    names = [name for name, parameter in model.named_parameters() if parameter is head or parameter is table]
    if len(names) == 2 and all(name in stored for name in names) and same_bytes(stored[names[0]], stored[names[1]]):
        model.config.tie_word_embeddings = True
        model.tie_weights()


def _equal(stored: Mapping[str, Stored], names: Sequence[str]) -> bool:
    """Whether the stored tensors are the same, of whatever types."""
    first, *others = (stored[name] for name in names)
    if all(one.dtype == first.dtype for one in others):
        return all(same_bytes(first, one) for one in others)
    values = [read_tensor(stored, name) for name in names]
    return all(one.shape == values[0].shape and bool((one == values[0]).all()) for one in values)


def settled(raw: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A config.json as it describes a loaded network: with its architecture, and tied as its weights are."""
    config = getattr(model, "config", None)
    changed = dict(raw)
    if isinstance(config, transformers.PretrainedConfig):
        if not raw.get("architectures"):
            changed["architectures"] = [type(model).__name__]
        tied = getattr(config, "tie_word_embeddings", None)
        written = type(config).from_dict(type(config)._decode_special_floats(changed))  # infinities are words in JSON
        if tied != getattr(written, "tie_word_embeddings", None):
            changed["tie_word_embeddings"] = tied
    return changed


def load_network(folder: Path, empty: bool, auto: Any = transformers.AutoModelForCausalLM) -> nn.Module:
    """The network with float32 weights from `folder` (plain or packed); without them when `empty`.

    `auto`: the class of transformers that knows its kind, AutoModel for the bare network.
    """
    model = empty_network(folder, auto)
    if empty:
        return model
    packed = is_packed(folder)
    known = {*canonical_names(model), *(name for name, _ in model.named_buffers())}
    if not packed and not known.issuperset(stored_tensors(folder)):
        return _translated(model, folder, auto)
    assign(model, read_tensors(folder))
    missing = unfilled(model)
    if missing and packed:
        raise ArtifactError(f"{folder} holds no weights for {missing[0]} ({len(missing)} tensors missing)")
    return _translated(model, folder, auto) if missing else model


def _translated(model: nn.Module, folder: Path, auto: Any) -> nn.Module:
    """Load through transformers, which knows the names that older or re-packed checkpoints use.

    Weights that are missing are an error; a pooler, which mean pooling never reads, is filled with zeros.
    """
    options = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    with foreign(f"{folder} cannot be loaded", remedy="; download it again, with all its .json files"), quiet():
        loaded, report = (_named(model.config, auto) or auto).from_pretrained(
            str(folder), ignore_mismatched_sizes=True, **options
        )
    missing = sorted(report["missing_keys"])
    spare = [name for name in missing if auto is transformers.AutoModel and name.startswith("pooler.")]
    wrong = [name for name in missing if name not in spare] + sorted(key[0] for key in report["mismatched_keys"])
    left_out = sorted(map(str, report["unexpected_keys"]))
    head, table = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    unused = _unused(loaded, left_out, folder, auto)
    if wrong:
        of_head = head is not None and wrong == [name for name in missing if loaded.get_parameter(name) is head.weight]
        raise ArtifactError(_unusable(folder, wrong, left_out, of_head))
    if unused:
        listed = ", ".join(name[:200] for name in unused[:3]) + (" …" if unused[3:] else "")
        raise ArtifactError(
            f"a {type(loaded).__name__} as config.json describes it has no place for {listed} "
            f"({len(unused)} of {len(stored_tensors(folder))} tensors of {folder}): the config is of another model, or "
            "they are of another tool; download config.json again, or write the weights without them"
        )
    for name in spare:
        torch.nn.init.zeros_(loaded.get_parameter(name))
    if head is not None and table is not None and head.weight is not table.weight:
        loaded.config.tie_word_embeddings = False
    loaded.source_folder = model.source_folder
    loaded.left_out = left_out
    return loaded.eval()


def _unused(model: Any, left_out: Sequence[str], folder: Path, auto: Any) -> list[str]:
    """Of the stored tensors that a network has no place for, those that may change what it computes.

    Not those that it computes itself, and not those of the heads on top of an encoder, whose last hidden state is used:
    they are outside the prefix that its other tensors have.
    """
    unused = [name for name in left_out if not COMPUTED.search(name)]
    prefix = f"{model.base_model_prefix}."
    if auto is transformers.AutoModel and any(name.startswith(prefix) for name in stored_tensors(folder)):
        return [name for name in unused if name.startswith(prefix)]
    return unused


def _unusable(folder: Path, wrong: Sequence[str], left_out: Sequence[str], of_head: bool) -> str:
    """What to say of weights that are missing or of another shape; `left_out` has no place in the network."""
    told = f"{folder} holds no usable weights for {wrong[0]} ({len(wrong)} in all)"
    if of_head:
        return f"{told}; if the embedding is the head too, set tie_word_embeddings to true in config.json"
    if aside := select(folder).told():
        told += f"; {aside}"
    if left_out:
        told += (
            f"; {left_out[0]} ({len(left_out)} such) has no place in the network: it is of another model, or stored "
        )
        told += "by a tool that config.json does not name"
    return f"{told}; download the folder again, with all its .json files"
