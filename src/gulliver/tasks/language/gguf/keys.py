"""A GGUF file's keys below its architecture's name: each is used, known to change nothing, or refused by name.

A key that was skipped could be a scale, a window or a bias, and the model would be another one without a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gulliver.core.errors import ArtifactError
from gulliver.tasks.language.gguf.header import Header, Texts

MAX_SIZE = 2**31 - 1

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("expert_count", "expert_used_count", "expert_shared_count", "nextn_predict_layers"), (0,)),
    **dict.fromkeys(("leading_dense_block_count", "n_deepstack_layers", "pooling_type"), (0,)),
    **dict.fromkeys(("expert_group_count", "expert_group_used_count", "interleave_moe_layer_step"), (0, 1)),
    **dict.fromkeys(("expert_weights_scale", "logit_scale", "residual_scale", "embedding_scale"), (0, 1)),
    **dict.fromkeys(("attention.scale", "attn_logit_softcapping", "final_logit_softcapping"), (0,)),
    **dict.fromkeys(("attention.max_alibi_bias", "attention.clamp_kqv", "attention.sliding_window"), (0,)),
    **dict.fromkeys(("rope.scaling.attn_factor", "rope.scaling.alpha", "rope.scaling.yarn_attn_factor"), (0, 1)),
    **{"rope.scaling.yarn_log_multiplier": (0,), "rope.scaling.yarn_ext_factor": (-1, 1)},
    **{"attention.causal": (True,), "use_parallel_residual": (False,), "moe_every_n_layers": (0, 1)},
}
"""Keys that change nothing where they have one of these values, in an architecture that does not read them."""
HARMLESS = ("rope.scaling.finetuned", "tensor_data_layout", "vocab_size")
"""Keys that no arithmetic depends on; the vocabulary is as long as the embedding."""

NO_MODELS = {
    "adapter": "an adapter (LoRA), not a whole model; merge it into its base model with llama.cpp's llama-export-lora",
    "mmproj": "what a model sees or hears with (mmproj), not the model; give the model's own file",
    "imatrix": "an importance matrix, not a model; give the model's own file",
}
"""What `general.type` may say instead of "model" -> what the file holds, and the remedy."""


def refuse_parts(header: Header) -> None:
    """ArtifactError for a file that is an addition to a model (adapter, projector, importance matrix), not a model."""
    kind = header.metadata.get("general.type")
    if isinstance(kind, str) and kind in NO_MODELS:
        raise ArtifactError(f"{header.path} holds {NO_MODELS[kind]}")


class Metadata:
    """The keys of a header, checked as they are read; `left` are those below the architecture's name not read yet."""

    def __init__(self, header: Header, architecture: str) -> None:
        self.header, self.architecture = header, architecture
        prefix = f"{architecture}."
        self.values = {key: value for key, value in header.metadata.items() if not key.startswith(prefix)}
        self.left = {key[len(prefix) :]: value for key, value in header.metadata.items() if key.startswith(prefix)}
        self.read: dict[str, Any] = {}

    def wrong(self, key: str, value: Any, wanted: str) -> ArtifactError:
        told = f"{self.header.path}: {self.architecture}.{key} is {str(value)[:60]!r}; it must be {wanted}"
        return ArtifactError(f"{told}: the file is damaged, or converted by a tool that is not known here")

    def value(self, key: str, default: Any = ...) -> Any:
        """The value of a key below the architecture's name; ArtifactError when it is missing without a default."""
        if key in self.left:
            self.read[key] = self.left.pop(key)
        found = self.read.get(key, default)
        if found is ...:
            told = f"{self.header.path} does not say {self.architecture}.{key}"
            raise ArtifactError(f"{told}; the file is damaged or too old")
        return found

    def whole(self, key: str, default: Any = ..., least: int = 1, most: int = MAX_SIZE) -> Any:
        """A whole number; a list that repeats one number counts as it."""
        found = self.value(key, default)
        if isinstance(found, list) and found and found.count(found[0]) == len(found):
            found = found[0]
        if found is None or (type(found) is int and least <= found <= most):
            return found
        raise self.wrong(key, found, f"a whole number from {least} to {most}")

    def number(self, key: str, default: Any = ..., least: float = 0.0) -> Any:
        """A finite number as the config file would have it: the shortest decimal with this float32."""
        found = self.value(key, default)
        if found is None:
            return None
        if type(found) not in (int, float) or not math.isfinite(found) or found < least:
            raise self.wrong(key, found, f"a number from {least:g}")
        return float(f"{found:.7g}")

    def truth(self, key: str, default: bool) -> bool:
        """A yes or no."""
        found = self.value(key, default)
        if found not in (True, False):
            raise self.wrong(key, found, "true or false")
        return bool(found)

    def refuse_left(self) -> None:
        """ArtifactError for the first key that was not used and is not known to change nothing."""
        for key, value in self.left.items():
            single = not isinstance(value, (list, Texts, str))
            if key not in HARMLESS and not (single and value in NEUTRAL.get(key, ())):
                told = f"{self.header.path}: {self.architecture}.{key} is {str(value)[:60]!r}, unknown here"
                raise ArtifactError(f"{told} and may change the arithmetic; use the original model in safetensors")
