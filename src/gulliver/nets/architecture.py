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
    return any(name.endswith(ENCODERS) for name in names) and not is_causal(folder, config) and not _decodes(config)


def is_causal(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether `folder` holds a causal language model; an older config without `architectures` counts as one."""
    if (folder / "modules.json").is_file():
        return False
    names = architectures(config)
    return not names or any(name.endswith(CAUSAL) for name in names)


def _decodes(config: Mapping[str, Any]) -> bool:
    """An encoder and a decoder in one: the encoder alone has a name of its own (T5EncoderModel)."""
    alone = any(name.endswith("EncoderModel") for name in architectures(config))
    return bool(config.get("is_encoder_decoder")) and not alone
