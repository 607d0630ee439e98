"""Which models are of the encoder family, told without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gulliver.nets.files import architectures, is_causal

ENCODERS = ("Model", "ForMaskedLM", "ForPreTraining")
"""How the names of networks end whose last hidden states are used."""


def claims(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether `folder` holds an encoder: sentence-transformers' modules.json says so, or the architecture's name."""
    if (folder / "modules.json").is_file():
        return True
    names = architectures(config)
    alone = any(name.endswith("EncoderModel") for name in names)  # of an encoder and a decoder in one (T5EncoderModel)
    whole = bool(config.get("is_encoder_decoder")) and not alone
    return any(name.endswith(ENCODERS) for name in names) and not is_causal(folder, config) and not whole
