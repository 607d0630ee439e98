"""Model folders as people have them: multimodal checkpoints, other tools' configs, folders that are no model's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from language_samples import SMALL, write_causal
from safetensors.torch import load_file, save_file
from torch import Tensor

from gulliver.tasks.text.tokenizer import write_byte_tokenizer

TEXT = SMALL | {"vocab_size": 320, "hidden_size": 64, "head_dim": 16, "bos_token_id": 258, "pad_token_id": 257}
EYE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
LINEAR = {
    **{"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN = {
    **{"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303},
    "vision_config": {
        **{"hidden_size": 32, "embed_dim": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2},
        "out_hidden_size": 64,
    },
}


def _llava(model_type: str, size: int = 28) -> dict[str, Any]:
    vision = {**EYE, "model_type": "siglip_vision_model", "image_size": size, "patch_size": 14}
    return {"text_config": {**TEXT, "model_type": model_type}, "vision_config": vision, "image_token_index": 300}


MULTIMODAL: dict[str, tuple[str, dict[str, Any], str]] = {
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", {"text_config": TEXT | LINEAR, **QWEN}, "Qwen3_5ForCausalLM"),
    "Qwen3VLForConditionalGeneration": (
        "qwen3_vl",
        {"text_config": TEXT | {"rope_parameters": SECTIONS}, **QWEN},
        "Qwen3ForCausalLM",
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "qwen2_5_vl",
        {"text_config": TEXT | {"rope_parameters": SECTIONS}, **QWEN},
        "Qwen2ForCausalLM",
    ),
    "Gemma3ForConditionalGeneration": ("gemma3", _llava("gemma3_text"), "Gemma3ForCausalLM"),
    "Mistral3ForConditionalGeneration": ("mistral3", _llava("mistral"), "MistralForCausalLM"),
    "LlavaForConditionalGeneration": ("llava", _llava("llama"), "LlamaForCausalLM"),
    "PaliGemmaForConditionalGeneration": ("paligemma", _llava("gemma"), "GemmaForCausalLM"),
    "Idefics3ForConditionalGeneration": (
        "idefics3",
        {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": {**EYE, "image_size": 28, "patch_size": 14}},
        "LlamaForCausalLM",
    ),
    "VoxtralForConditionalGeneration": (
        "voxtral",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "audio_config": {**EYE, "num_mel_bins": 8},
            "audio_token_id": 304,
        },
        "LlamaForCausalLM",
    ),
}
"""Architecture -> (model type, its config, the architecture of its text part)."""


def write_multimodal(folder: Path, architecture: str, **changes: Any) -> Any:
    """A random tiny multimodal model with a byte tokenizer. Returns the network."""
    model_type, options, _ = MULTIMODAL[architecture]
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(transformers.CONFIG_MAPPING[model_type](**(options | changes))).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return model


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; None takes one away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_tensors(folder: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Set tensors of model.safetensors; None takes one away."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | dict(changes)
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata={"format": "pt"})


def write_fp8(folder: Path, prefix: str = "model.") -> dict[str, Tensor]:
    """Make the projections of the plain model in `folder` FP8 with a scale each; returns what they then mean."""
    meant: dict[str, Tensor] = {}
    changes: dict[str, Tensor | None] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "proj.weight" in name and tensor.dim() == 2 and name.startswith(prefix):
            scale = (tensor.abs().max() / 448).reshape(1, 1)
            changes[name] = (tensor / scale).to(torch.float8_e4m3fn)
            changes[f"{name}_scale_inv"] = scale
            meant[name] = (tensor / scale).to(torch.float8_e4m3fn).float() * scale
    change_tensors(folder, changes)
    change_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    return meant


def write_untied(folder: Path, name: str = "llama-untied", **changes: Any) -> Path:
    """A model whose config says that the head is the embedding, and whose file holds another head."""
    write_causal(folder, name, **changes)
    change_config(folder, tie_word_embeddings=True)
    return folder
