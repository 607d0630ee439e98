"""Which models are of the language family, told without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gulliver.nets.files import architectures

CAUSAL = ("ForCausalLM", "LMHeadModel")
"""How the names of networks with a language model's head end."""


def claims(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether `folder` holds a causal language model; an older config without `architectures` counts as one."""
    if (folder / "modules.json").is_file():
        return False
    names = architectures(config)
    return not names or any(name.endswith(CAUSAL) for name in names)
