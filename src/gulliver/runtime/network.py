"""Networks that transformers knows, from a Hugging Face layout folder, plain or packed: with or without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.initialization import no_init_weights

from gulliver.core.errors import ArtifactError
from gulliver.nets.files import stored_tensors
from gulliver.nets.weights import assign, canonical_names, empty_parameters, unfilled
from gulliver.runtime.packing import is_packed
from gulliver.runtime.reference import read_tensors


def read_config(folder: Path) -> transformers.PretrainedConfig:
    """The config in `folder`. ArtifactError when there is none or transformers does not know the architecture."""
    path = folder / "config.json"
    if not path.is_file():
        raise ArtifactError(f"{folder} has no config.json; give a Hugging Face layout folder (or a .gguf file)")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it is not a JSON object")
        if "auto_map" in raw:
            raise ValueError("it asks to run code from the folder (auto_map), which Gulliver never does")
        return transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ArithmeticError) as error:
        raise ArtifactError(f"{path} is not a usable model config: {str(error).splitlines()[0]}") from error


def empty_network(folder: Path, auto: Any) -> nn.Module:
    """The network `config.json` describes, parameters on meta, buffers real, `source_folder` set."""
    config = read_config(folder)
    try:
        with empty_parameters(), no_init_weights():
            model = auto.from_config(config, dtype=torch.float32)
            model.tie_weights()
    except (ValueError, TypeError, RuntimeError, ArithmeticError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{folder / 'config.json'} describes no network: {str(error).splitlines()[0]}") from error
    model.source_folder = str(folder)
    return model.eval()


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
    try:
        loaded, report = auto.from_pretrained(
            str(folder), dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    missing = sorted(report["missing_keys"])
    spare = [name for name in missing if auto is transformers.AutoModel and name.startswith("pooler.")]
    wrong = [name for name in missing if name not in spare] + [str(key) for key in report["mismatched_keys"]]
    if wrong:
        raise ArtifactError(f"{folder} holds no usable weights for {wrong[0]} ({len(wrong)} in all)")
    for name in spare:
        torch.nn.init.zeros_(loaded.get_parameter(name))
    loaded.source_folder = model.source_folder
    return loaded.eval()
