"""Which models are of the language family, told without torch unless the model is multimodal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gulliver.nets.kinds import MODULES, SECTIONS, architectures, is_causal

SENSES = ("vision_config", "audio_config", "vit_config", "speech_config", "vision_tower", "image_token_id")
"""What only the config of a multimodal model has, one whose text part is described at the top included."""
WRITES = ("ForConditionalGeneration", "ForVisionText2Text", "ForImageTextToText")
"""How the names of multimodal networks of transformers end that write text."""


def is_part(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the language model in `folder` is a part of a larger model."""
    return not is_causal(folder, config) and not (folder / MODULES).is_file() and is_multimodal(config)


def claims(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether `folder` holds a causal language model, or a multimodal one that has such a model as its text part."""
    if is_causal(folder, config):
        return True
    if not is_part(folder, config):
        return False
    from gulliver.tasks.language.text_part import text_part  # imports transformers

    return text_part(folder, config) is not None


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether a config describes a larger model, a part of which may be a causal language model."""
    if config.get("is_encoder_decoder"):
        return False
    sections = any(isinstance(config.get(key), Mapping) for key in SECTIONS)
    if any(name.endswith(WRITES) for name in architectures(config)):
        return sections or any(key in config for key in SENSES)
    return sections and not _known(config)


def _known(config: Mapping[str, Any]) -> bool:
    """Whether transformers has the network: then its name says what it does."""
    import transformers

    return any(hasattr(transformers, name) for name in architectures(config))
