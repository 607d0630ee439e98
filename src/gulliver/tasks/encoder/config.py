"""Which models are of the encoder family, told without torch unless the architecture's name may be an encoder's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gulliver.nets.kinds import CAUSAL, MODULES, architectures

ENCODERS = ("Model", "ForMaskedLM", "ForPreTraining")
"""How the names of networks end whose last hidden states are used."""


def claims(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether `folder` holds an encoder: sentence-transformers' modules.json says so, or the architecture does."""
    if (folder / MODULES).is_file():
        return True
    return any(
        name.endswith(ENCODERS) and not name.endswith(CAUSAL) and _reads_text(name, config)
        for name in architectures(config)
    )


def _reads_text(name: str, config: Mapping[str, Any]) -> bool:
    """Whether transformers has a network of this name that reads text alone and has no decoder beside its encoder."""
    import transformers  # slow, and a language model's folder never comes here
    from transformers.models.auto import modeling_auto as auto

    kinds = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "TEXT_TO_SPECTROGRAM", "TEXT_TO_WAVEFORM")
    writes = any(config.get("model_type") in getattr(auto, f"MODEL_FOR_{kind}_MAPPING_NAMES") for kind in kinds)
    if (writes or config.get("is_encoder_decoder")) and not name.endswith("EncoderModel"):
        return False
    network = getattr(transformers, name, None)
    modalities = getattr(network, "input_modalities", None)
    return modalities in ("text", ("text",), ["text"]) and getattr(network, "main_input_name", "") == "input_ids"
