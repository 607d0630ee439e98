"""The text part of a multimodal model: its config, and which of the stored tensors are its own.

A vision or audio language model holds a causal language model whole, below a prefix of its own
(`model.language_model.`, `language_model.model.`, …), with the output head beside it. The prefix is found from the
stored names themselves: it is what stands before the name of the embedding. For text alone, the rotary positions of
Qwen's vision models are the same in all their sections, which is the plain rotary embedding of the language model that
they were made from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from gulliver.core.errors import ArtifactError
from gulliver.core.foreign import foreign
from gulliver.nets.kinds import SECTIONS
from gulliver.nets.quiet import quiet

EQUAL = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text"), "qwen2"),
    "qwen3_vl_text": "qwen3",
}
"""Model type of a text part without a language model of its own -> one that computes the same for text alone."""
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class TextPart:
    """The config of a causal language model inside a larger model, and the class of transformers that runs it."""

    config: Any
    architecture: str


def text_part(folder: Path, config: Mapping[str, Any]) -> TextPart | None:
    """The text part of the model in `folder`; None where transformers has no causal language model for it."""
    found = _text_config(folder, config)
    if found is None:
        return None
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(found.model_type)
    if known is None or found.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or found.is_encoder_decoder:
        return None
    found.architectures = [known]
    raw = _section(config) or {}
    for key in SPECIAL:
        if raw.get(key) is None and config.get(key) is not None:
            setattr(found, key, config[key])
    found.tie_word_embeddings = any(
        bool(part.get("tie_word_embeddings", getattr(found, "tie_word_embeddings", False))) for part in (config, raw)
    )
    return TextPart(found, known)


def _text_config(folder: Path, config: Mapping[str, Any]) -> Any:
    """The text part's config as transformers reads it, as a config of a causal language model; None without one."""
    model_type = config.get("model_type")
    with foreign(f"{folder / 'config.json'} is not a usable model config"), quiet():
        if model_type in transformers.CONFIG_MAPPING:
            whole = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
            found = whole.get_text_config(decoder=True)
            if found is whole:
                return None
        else:
            section = _section(config)
            if section is None or section.get("model_type") not in transformers.CONFIG_MAPPING:
                return None
            found = transformers.AutoConfig.for_model(**section)
        return _as_equal(found) if found.model_type in EQUAL else found


def _section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for key in SECTIONS:
        found = config.get(key)
        if isinstance(found, Mapping):
            return _section(found) or found
    return None


def _as_equal(config: Any) -> Any:
    """The same sizes as a config of the language model that computes the same."""
    raw = config.to_dict()
    raw.pop("model_type", None)
    rope = {key: value for key, value in (raw.pop("rope_parameters", None) or {}).items() if "mrope" not in key}
    if rope.get("rope_type") in ("axial", "mrope"):
        rope["rope_type"] = "default"
    return transformers.AutoConfig.for_model(EQUAL[config.model_type], **raw, rope_parameters=rope)


def names_of_part(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Name of a tensor of the language model `model` -> the name of `names` under which a larger model stores it.

    ArtifactError when its embedding is stored under no prefix.
    """
    table = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())  # type: ignore[operator]
    own = f"{table.split('.')[0]}." if "." in table else ""
    embedding = f"{table}.weight".removeprefix(own)
    wanted = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    body = [name.removeprefix(own) for name in wanted if name.startswith(own)]
    prefixes = {name.removesuffix(embedding) for name in names if f".{name}".endswith(f".{embedding}")}
    found = {prefix: sum(prefix + name in names for name in body) for prefix in sorted(prefixes)}
    if not found:
        raise ArtifactError(f"no stored tensor is the embedding of the text part (…{embedding}); download it again")
    prefix = max(found, key=lambda one: found[one])
    taken = {own + name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    for name in wanted:
        stored = next((above + name for above in _above(prefix) if above + name in names), None)
        if stored is not None and not name.startswith(own):
            taken[name] = stored
    return taken


def _above(prefix: str) -> Iterator[str]:
    """The prefixes above "language_model.model.", nearest first: "language_model.", ""."""
    parts = prefix.rstrip(".").split(".")
    for length in range(len(parts) - 1, -1, -1):
        yield "".join(f"{part}." for part in parts[:length])


def left_out(names: Collection[str], taken: Collection[str]) -> list[str]:
    """What a larger model holds beside its text part: the highest prefixes of `names` that no name in `taken` has."""
    kept = {name.rsplit(".", depth)[0] for name in taken for depth in range(1, name.count(".") + 1)}
    found = set()
    for name in set(names) - set(taken):
        parts = name.split(".")
        tops = (".".join(parts[:count]) for count in range(1, len(parts)))
        found.add(next((top for top in tops if top not in kept), name))
    return sorted(found)
