"""A folder of transformers' layout that is not plain, written as a plain one: dequantized, the text part alone.

What is plain: float weights under names that transformers translates, in the files that it looks for, of a network
whose architecture a family reads. Tensors are read and written one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gulliver.core.errors import ArtifactError
from gulliver.core.foreign import foreign, read_bytes
from gulliver.nets.dequantize import Recipe, read, recipes
from gulliver.nets.files import copy_companions, plain_files, stored_tensors
from gulliver.nets.kinds import MAX_CONFIG_BYTES, model_config, quantization
from gulliver.nets.selection import NAMED, select
from gulliver.runtime.network import network_of
from gulliver.runtime.packing import order_of_use
from gulliver.runtime.shards import ShardWriter
from gulliver.tasks.language.config import is_part
from gulliver.tasks.language.text_part import TextPart, left_out, names_of_part, text_part
from gulliver.tasks.rewritten import Rewritten
from gulliver.tasks.text.network import write_config

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OF_STORED = ("quantization_config", "compression_config", NAMED)
"""Keys of config.json that say how and where the weights were stored."""
NOT_PLAIN = (
    *("config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json", "recipe.yaml"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json"),
    *("params.json", "origin.json"),
)
"""Files beside the weights that say something of the folder as it was, and would be wrong of the plain one."""


def write_plain(source: Path, folder: Path) -> Rewritten:
    """Write the model in `source` into `folder` as a plain one. ArtifactError for what is damaged or cannot be read."""
    config, notes = model_config(source), []
    scheme = quantization(source, config)
    stored = stored_tensors(source)
    plan = recipes(stored, scheme)
    raw = {key: value for key, value in config.items() if key not in OF_STORED}
    part = text_part(source, raw) if is_part(source, config) else None
    if part is None:
        names = {name: name for name in plan}
    else:
        names, told = _text_part_alone(part, source, plan)
        notes.append(told)
    dtype = DTYPES.get(str(_dtype(config)), torch.bfloat16)
    with ShardWriter(folder) as shards:
        for name in sorted(names, key=order_of_use):
            shards.add({name: read(plan[names[name]], stored, scheme, dtype)})
    if part is None:
        text = json.dumps(raw, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    else:
        write_config(part.config, folder, dtype)
    copy_companions(plain_files(source), folder, NOT_PLAIN)
    _keep_chat_template(source, folder)
    if scheme is not None:
        notes.append(f"the weights were quantized by {scheme.method}; they were dequantized")
    selected = select(source).told()
    return Rewritten(scheme.method if scheme else "safetensors", (*notes, *([selected] if selected else [])))


def _dtype(config: Mapping[str, Any]) -> object:
    """The type of numbers that a config names, at the top or in the config of its text part."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), None)


def _text_part_alone(part: TextPart, source: Path, plan: Mapping[str, Recipe]) -> tuple[dict[str, str], str]:
    """(name in the language model -> name in the larger model, a sentence about what is left out)."""
    model = network_of(part.config, source)
    names = names_of_part(model, plan)
    head = model.get_output_embeddings()  # type: ignore[operator]
    heads = [name for name, module in model.named_modules() if module is head]
    tied = part.config.tie_word_embeddings or any(f"{name}.weight" in names for name in heads)
    if head is not None and not tied:
        raise ArtifactError(
            f"{source} holds no {heads[0]}.weight, and its config says that it is not the embedding; download it again"
        )
    rest = left_out(plan, list(names.values()))
    told = f"the text part is loaded as {part.architecture}"
    return names, f"{told}; left out: {', '.join(rest[:6])}{' …' if len(rest) > 6 else ''}" if rest else told


def _keep_chat_template(source: Path, folder: Path) -> None:
    """A multimodal processor's chat template as a file of its own, where the tokenizer has none."""
    path = source / "chat_template.json"
    if not path.is_file() or (folder / "chat_template.jinja").is_file():
        return
    with foreign(f"{path} is not a chat template"):
        template = json.loads(read_bytes(path, MAX_CONFIG_BYTES))["chat_template"]
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
