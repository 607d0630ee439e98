"""What a config.json says that a folder holds, and in which words it is refused. Knows no torch.

The kind of a model is what `architectures` names. A config without it is read by its model type, where transformers
has one kind of network for that type alone. Nothing is guessed by elimination.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from gulliver.core.errors import ArtifactError
from gulliver.core.foreign import check_folder, foreign, read_bytes
from gulliver.nets.selection import holds_adapter, without_weights

CAUSAL = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead", "GenerationDecoder")
"""How the names of networks with a language model's head end."""
MODULES = "modules.json"
"""The file by which sentence-transformers says that a folder is a text encoder."""
SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where the config of a multimodal model describes the part that writes text."""
WORDS = {
    **{"ForSequenceClassification": "a classifier of texts (or a reward model)", "RewardModel": "a reward model"},
    **{"ForTokenClassification": "a classifier of tokens", "ForQuestionAnswering": "an extractive question answerer"},
    **{"ForMultipleChoice": "a multiple-choice classifier", "ForNextSentencePrediction": "a classifier of sentences"},
    **{"ForCTC": "a speech recognizer", "ForSpeechSeq2Seq": "a speech recognizer", "ForRNNT": "a speech recognizer"},
    **{"ForAudioClassification": "a classifier of audio", "ForXVector": "an encoder of voices"},
    **{"ForAudioFrameClassification": "a classifier of audio", "ForTextToWaveform": "a speech synthesizer"},
    **{"ForTextToSpeech": "a speech synthesizer", "ForImageClassification": "a classifier of images"},
    **{"ForVideoClassification": "a classifier of videos", "Segmentation": "a segmenter of images"},
    **{"ObjectDetection": "a detector of objects", "ForDepthEstimation": "an estimator of depth"},
    **{"ForImageTextRetrieval": "a ranker of images and texts", "ForMaskedImageModeling": "an encoder of images"},
    **{"LMHeadModelEagle3": "a draft head for speculative decoding"},
    **{
        "AssistantForCausalLM": "a draft network that cannot run without the keys and values of the model it drafts for"
    },
    **{"MusicgenForCausalLM": "a writer of audio codes", "MusicgenMelodyForCausalLM": "a writer of audio codes"},
}
"""How the name of an architecture ends -> what it is."""
ENCODER_DECODERS = {
    **dict.fromkeys(("whisper", "speech_to_text", "speecht5", "moonshine"), "a speech recognizer or synthesizer"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "a writer of music"),
    **dict.fromkeys(("vision-encoder-decoder", "trocr", "florence2", "pix2struct", "donut"), "a reader of images"),
}
"""Model type of a network of an encoder and a decoder -> what it is, where that is not text to text."""


@dataclass(frozen=True)
class Quantization:
    """How another tool stored the weights: the method's name and its section of config.json."""

    method: str
    settings: Mapping[str, Any]


READ = ("fp8", "fbgemm_fp8", "modelopt", "compressed-tensors", "gptq", "awq", "mxfp4")
"""What `quant_method` may say for the weights to be dequantized while they are loaded."""
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""File in which a tool describes what config.json does not -> `quant_method`."""
TOOLS = {
    **{"bitsandbytes": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes", "bitsandbytes_4bit": "bitsandbytes"},
    **{"hqq": "HQQ", "quanto": "quanto", "eetq": "EETQ", "aqlm": "AQLM", "torchao": "torchao", "exl2": "ExLlamaV2"},
    **{"exl3": "ExLlamaV3", "bitnet": "BitNet", "vptq": "VPTQ", "spqr": "SpQR", "higgs": "HIGGS", "quark": "Quark"},
    **{"fp_quant": "FP-Quant", "auto-round": "AutoRound", "mlx": "MLX", "nvfp4": "NVFP4", "metal": "Metal"},
    "modelopt": "ModelOpt",
}
"""`quant_method` -> the tool's name, of those that are refused."""


# ---- config.json ----------------------------------------------------------------------------------------------------
MAX_CONFIG_BYTES = 4 * 2**20
"""Several times what the names of twenty thousand classes take."""
MOST = (
    (re.compile(r"(.*_)?(layers?|blocks?|depths?|stages?)"), 10_000),
    (re.compile(r"(.*_)?(experts|heads)"), 65_536),
    (re.compile(r"(.*_)?(labels|classes)|id2label|label2id"), 32_768),
    (re.compile(r".*(positions?|position_embeddings|seq_len|seq_length|sequence_length|context_length)"), 2**24),
)
"""How keys end that say how often or for how many a library builds something, before it looks at any weight -> the most

that is read. What the numbers come to is held against the weights where the network is built (`nets.weights.Room`).
"""


def model_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, whose files are plain files and whose counts can be built.

    ArtifactError that says what the folder holds where there is none.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder with a config.json; give a Hugging Face layout folder")
    check_folder(folder)
    if not path.exists():
        raise ArtifactError(_without_config(folder))
    with foreign(f"{path} is not a JSON object"):
        config = json.loads(read_bytes(path, MAX_CONFIG_BYTES))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}")
        for key, value in _numbers(config):
            most = next((most for name, most in MOST if name.fullmatch(key)), None)
            if most is not None and value > most:
                raise ArtifactError(f"{path}: {key[:80]} is {str(value)[:40]}; at most {most} can be read")
    return config


def _numbers(config: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """(key, number) of every number in a config, in its parts and its lists; of a part the number of its keys, too."""
    for name, value in config.items() if isinstance(config, dict) else ((key, one) for one in config):
        if isinstance(value, dict | list):
            yield name, len(value)
            yield from _numbers(value, name)
        elif isinstance(value, int | float):
            yield name, value


def _without_config(folder: Path) -> str:
    if (folder / "model_index.json").is_file():
        return f"{folder} holds a diffusion pipeline (model_index.json); {_READ_HERE}"
    if holds_adapter(folder) or any(folder.glob("consolidated*")) or any(folder.glob("*.gguf")):
        return without_weights(folder)
    return f"{folder} has no config.json; give a Hugging Face layout folder"


def architectures(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names under `architectures`; where there are none, that of the only kind of network of the model type."""
    names = config.get("architectures") or ()
    if isinstance(names, list | tuple) and names:
        return tuple(str(name) for name in names)
    return _of_model_type(config.get("model_type"))


def _of_model_type(model_type: object) -> tuple[str, ...]:
    """The network that transformers has for a model type, when it is of one kind alone; () otherwise."""
    if not isinstance(model_type, str):
        return ()
    auto: Any = import_module("transformers.models.auto.modeling_auto")  # slow, and most configs name what they are
    kinds = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT")
    tables = [getattr(auto, f"MODEL_FOR_{kind}_MAPPING_NAMES") for kind in kinds]
    found = {str(table[model_type]) for table in tables if model_type in table}
    return tuple(found) if len(found) == 1 else ()


def is_causal(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether `folder` holds a causal language model as its architecture is named."""
    names = architectures(config) if not (folder / MODULES).is_file() else ()
    return any(name.endswith(CAUSAL) and not name.endswith(tuple(WORDS)) for name in names)


# ---- what is refused ------------------------------------------------------------------------------------------------
_READ_HERE = "Gulliver reads causal language models (…ForCausalLM), the text part of multimodal ones, and text encoders"


def refusal(folder: Path, config: Mapping[str, Any]) -> ArtifactError:
    """The error for a model that no family reads: what it is, and what would be read."""
    names = config.get("architectures")
    if not names:
        return _nameless(folder, config)
    name = str(names[0] if isinstance(names, list | tuple) else names)
    what = next((words for end, words in WORDS.items() if name.endswith(end)), None)
    if what is None and config.get("is_encoder_decoder"):
        what = ENCODER_DECODERS.get(str(config.get("model_type")), "an encoder and a decoder from text to text")
    section = next((config[key] for key in SECTIONS if isinstance(config.get(key), Mapping)), None)
    if what is None and section is not None:
        what = f"whose text part ({section.get('model_type')}) is not a language model that transformers has"
    described = f"{name}, {what}" if what else name
    return ArtifactError(f"{folder} holds {described}, which no family of models here reads; {_READ_HERE}")


def _nameless(folder: Path, config: Mapping[str, Any]) -> ArtifactError:
    if "_class_name" in config:
        return ArtifactError(f"{folder} holds a part of a diffusion pipeline ({config['_class_name']}); {_READ_HERE}")
    if "architecture" in config and ("pretrained_cfg" in config or "num_classes" in config):
        return ArtifactError(f"{folder} holds {config['architecture']}, an image network of timm; {_READ_HERE}")
    kind = config.get("model_type")
    known = f"of the model type {kind!r}, which has several kinds of networks" if kind else "of no model type"
    return ArtifactError(
        f"{folder / 'config.json'} is {known} and names no architecture; add the key "
        f'"architectures", for example ["LlamaForCausalLM"]'
    )


def quantization(folder: Path, config: Mapping[str, Any]) -> Quantization | None:
    """How another tool quantized the weights, None when none did. ArtifactError for a way that is not read here."""
    settings = _settings(folder, config)
    if settings is None:
        return None
    method = str(settings.get("quant_method") or _unnamed(settings)).lower()
    if method == "modelopt":
        inner = settings.get("quantization")
        settings = {**settings, **(inner if isinstance(inner, dict) else {})}
        if not settings.get("quant_algo"):
            return None  # the cache alone would be quantized
    if method == "auto-round":
        packing = str(settings.get("packing_format", ""))
        method = next((one for one in ("gptq", "awq") if one in packing), method)
    reason = "" if method in READ else "which is not read here"
    if method in READ:
        reason = _unread(method, settings)
    if reason:
        tool = TOOLS.get(method, method or "a tool that quantization_config does not name")
        raise ArtifactError(
            f"{folder} holds a model that is quantized already, by {tool}, {reason}; pull the original in full "
            "precision, or its FP8, compressed-tensors, AWQ (gemm), GPTQ or GGUF version"
        )
    return Quantization(method, settings)


def _settings(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section of config.json (or the file of an older tool) that says how the weights are stored."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            if isinstance(part.get(key), dict):
                return part[key]
        if isinstance(part.get("quantization"), dict) and "bits" in part["quantization"]:
            return {**part["quantization"], "quant_method": "mlx"}
    for name, method in BESIDE.items():
        if (folder / name).is_file():
            with foreign(f"{folder / name} is not a JSON object"):
                found = json.loads(read_bytes(folder / name, MAX_CONFIG_BYTES))
            if isinstance(found, dict):
                return {"quant_method": method, **found}
    return None


def _unnamed(settings: Mapping[str, Any]) -> str:
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    if "config_groups" in settings:
        return "compressed-tensors"
    return "mlx" if set(settings) >= {"group_size", "bits"} else ""


def _unread(method: str, settings: Mapping[str, Any]) -> str:
    """Why a known method's variant is not read, "" when it is."""
    if method == "awq" and str(settings.get("version", "gemm")).lower() != "gemm":
        return f"in the layout {settings['version']!r}, which is not read here"
    if method == "gptq" and str(settings.get("checkpoint_format", "gptq")).lower() not in ("gptq", "gptq_v2"):
        return f"in the layout {settings['checkpoint_format']!r}, which is not read here"
    if method == "modelopt" and str(settings.get("quant_algo")).upper() != "FP8":
        return f"with the algorithm {settings.get('quant_algo')!r}, which is not read here"
    if method == "compressed-tensors":
        if settings.get("transform_config"):
            return "with rotations that are computed while it runs (transform_config), which are not read here"
        groups = settings.get("config_groups")
        rows = groups.values() if isinstance(groups, dict) else ()
        formats = {str(row.get("format") or "") for row in rows if isinstance(row, dict)}
        formats.add(str(settings.get("format") or ""))
        read = {"", "dense", "mixed-precision", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"}
        if formats - read:
            return f"in the format {min(formats - read)!r}, which is not read here"
    return ""
