"""How an encoder's token vectors become one vector: the one rule for what is trained, measured and served.

What sentence-transformers' files say is done: modules.json (does a Normalize follow?), 1_Pooling/config.json (mean,
first token or maximum; Sentence-BERT, 2019, arXiv 1908.10084), sentence_bert_config.json (the longest text). torch is
imported when vectors are pooled, not when the rule is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gulliver.core.errors import ArtifactError
from gulliver.core.foreign import foreign, read_bytes
from gulliver.nets.kinds import MAX_CONFIG_BYTES

if TYPE_CHECKING:
    from torch import Tensor, nn

POOLINGS = {"pooling_mode_cls_token": "first", "pooling_mode_max_tokens": "maximum", "pooling_mode_mean_tokens": "mean"}
POSITIONS = 512
"""The longest text where no file says how long it may be."""


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one: "mean", "first" or "maximum"; `longest` in tokens."""

    kind: str
    normalize: bool
    longest: int


def read_pooling(folder: Path) -> Pooling:
    """What the folder's files say; mean and normalized where they say nothing. ArtifactError for what is not known."""
    modules = _read(folder / "modules.json")
    if not isinstance(modules or [], list) or not all(isinstance(row, dict) for row in modules):
        raise ArtifactError(f"{folder / 'modules.json'} is not a list of modules; it is damaged")
    normalize = not modules or any(str(row.get("type", "")).endswith("Normalize") for row in modules)
    settings = _object(folder / "1_Pooling" / "config.json")
    modes = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on is True]
    unknown = [name for name in modes if name not in POOLINGS]
    if unknown or len(modes) > 1:
        told = f"{folder / '1_Pooling'} asks for {', '.join(modes)}"
        raise ArtifactError(f"{told}; one at a time is supported, of {', '.join(POOLINGS)}")
    positions = _positive(_object(folder / "config.json").get("max_position_embeddings"), POSITIONS)
    longest = _positive(_object(folder / "sentence_bert_config.json").get("max_seq_length"), positions)
    return Pooling(POOLINGS[modes[0]] if modes else "mean", normalize, min(longest, positions))


def _positive(value: Any, default: int) -> int:
    return value if type(value) is int and value > 0 else default


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one when there is no file."""
    found = _read(path)
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} is not a JSON object; it is damaged")
    return found


def _read(path: Path) -> Any:
    """A JSON file; an empty object when there is none."""
    if not path.is_file():
        return {}
    with foreign(f"{path} is not JSON", remedy="; it is damaged"):
        return json.loads(read_bytes(path, MAX_CONFIG_BYTES))


def cut(tokens: Sequence[int], longest: int) -> Sequence[int]:
    """At most `longest` tokens: the last one, the mark that ends every text, stays."""
    return tokens if len(tokens) <= longest else [*tokens[: longest - 1], tokens[-1]]


def pool(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Vectors float32 [batch, width] of token vectors `hidden` [batch, tokens, width]; `mask` [batch, tokens] is 1 for

    real tokens and 0 for padding.
    """
    import torch

    hidden = hidden.float()
    real = mask.unsqueeze(-1).to(hidden.dtype)
    if pooling.kind == "first":
        pooled = hidden[:, 0]
    elif pooling.kind == "maximum":
        pooled = hidden.masked_fill(real == 0, -torch.inf).amax(1)
    else:
        pooled = (hidden * real).sum(1) / real.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(pooled, dim=-1) if pooling.normalize else pooled


def encode(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Vectors float32 [batch, width] of a padded batch, pooled as the model's folder says (`model.pooling`)."""
    hidden = model(input_ids=batch["tokens"], attention_mask=batch["mask"]).last_hidden_state
    return pool(hidden, batch["mask"], model.pooling)  # type: ignore[arg-type]
