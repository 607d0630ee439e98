"""What kind of network a config.json describes, read from `architectures` and the files beside it. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CAUSAL = ("ForCausalLM", "LMHeadModel")
"""How the names of networks with a language model's head end."""
ENCODERS = ("Model", "ForMaskedLM", "ForPreTraining")
"""How the names of networks end whose last hidden states are used."""


def architectures(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in `architectures`; empty where there are none."""
    names = config.get("architectures") or ()
    return tuple(str(name) for name in names) if isinstance(names, list | tuple) else ()


def is_encoder(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether `folder` holds an encoder: sentence-transformers' modules.json says so, or the architecture's name."""
    if (folder / "modules.json").is_file():
        return True
    names = architectures(config)
    alone = any(name.endswith("EncoderModel") for name in names)  # of an encoder and a decoder in one (T5EncoderModel)
    whole = bool(config.get("is_encoder_decoder")) and not alone
    return any(name.endswith(ENCODERS) for name in names) and not is_causal(folder, config) and not whole


def is_causal(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether `folder` holds a causal language model; an older config without `architectures` counts as one."""
    if (folder / "modules.json").is_file():
        return False
    names = architectures(config)
    return not names or any(name.endswith(CAUSAL) for name in names)
