"""What a model folder holds: which files are weights, which network it is, and what is refused in which words."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import (
    MULTIMODAL,
    change_config,
    change_tensors,
    write_fp8,
    write_multimodal,
)
from language_samples import write_causal, write_encoder
from safetensors.torch import load_file, save_file

from gulliver.core.errors import ArtifactError
from gulliver.core.progress import Progress
from gulliver.core.records import Origin
from gulliver.pipeline.ask import open_answerer
from gulliver.pipeline.call import call
from gulliver.pipeline.resolve import resolve_any, resolve_model
from gulliver.tasks import detect_task, get_task
from gulliver.tasks.answerer import OpenOptions

TASK = get_task("language")
TOKENS = torch.tensor([[1, 50, 7, 99, 120, 33]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def pulled(folder: Path, store: Any) -> Any:
    return call("pull", {"source": str(folder)}, {}, store=store, progress=Progress(quiet=True))


def answer(folder: Path, store: Any, backend: str = "auto") -> str:
    with open_answerer(folder, OpenOptions(backend=backend), store=lambda: store, can="generate") as answerer:
        request = answerer.request_model(prompt="hello there", raw=True, max_tokens=6, temperature=0.0)
        return answerer.answer(request).text


# ---- which files are weights -----------------------------------------------------------------------------------------
def sharded(folder: Path, names: tuple[str, str] = ("model-00001-of-00002", "model-00002-of-00002")) -> dict[str, str]:
    """The model of a folder in two files; returns which tensor is in which."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys, places = sorted(tensors), {}
    for name, part in zip(names, (keys[:4], keys[4:]), strict=True):
        save_file({key: tensors[key] for key in part}, folder / f"{name}.safetensors", metadata={"format": "pt"})
        places |= dict.fromkeys(part, f"{name}.safetensors")
    return places


def only_adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base-7b", "peft_type": "LORA"}')


def only_adapter_and_no_config(folder: Path) -> None:
    only_adapter(folder)
    (folder / "config.json").unlink()


def diffusers_adapter(folder: Path) -> None:
    rename(folder, "pytorch_lora_weights.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base-7b", "peft_type": "LORA"}')


def tensors_of_adapter(*names: str, file: str = "model.safetensors") -> Callable[[Path], object]:
    """The folder's weights are these tensors alone."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        save_file({name: torch.ones(2, 2) for name in names}, folder / file, metadata={"format": "pt"})

    return change


def rename(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)


def twice(folder: Path) -> None:
    rename(folder, "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


def missing_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "an adapter": (only_adapter, r"an adapter \(LORA\).*base model is org/base-7b; merge"),
    "an adapter without a config": (only_adapter_and_no_config, r"an adapter \(LORA\).*org/base-7b"),
    "an adapter as diffusers calls it": (diffusers_adapter, r"an adapter \(LORA\).*org/base-7b; merge"),
    "an adapter as model.safetensors": (
        tensors_of_adapter(*(f"base_model.model.model.layers.0.mlp.up_proj.lora_{one}.weight" for one in "AB")),
        "an adapter .*base model is not named; merge",
    ),
    "an adapter without its prefix": (
        tensors_of_adapter("layers.0.q_proj.lora_A.default.weight", "layers.0.q_proj.lora_B.default.weight"),
        "an adapter",
    ),
    "an adapter of another kind in another file": (
        tensors_of_adapter("prompt_embeddings", "model.layers.1.mlp.ia3_l", file="tuned.safetensors"),
        "an adapter",
    ),
    "the eyes of a model alone": (lambda f: rename(f, "mmproj-model.gguf"), "only mmproj-model.gguf, what a model"),
    "pickles": (lambda f: rename(f, "pytorch_model.bin"), "can run code.*safe_serialization"),
    "Mistral's layout": (
        lambda f: rename(f, "consolidated.safetensors"),
        "layout of Mistral's",
    ),
    "a GGUF file": (lambda f: rename(f, "model.gguf"), r"gulliver pull .*model\.gguf"),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), r"no \*\.safetensors"),
    "a shard is missing": (missing_shard, "lacks part 1 of 2"),
    "the same tensors twice": (twice, "duplicate tensor.*a.safetensors and b.safetensors"),
}  # fmt: skip


# ---- which kind of model ---------------------------------------------------------------------------------------------
def named(architecture: str, **more: Any) -> Callable[[Path], object]:
    return lambda folder: change_config(folder, architectures=[architecture], **more)


def whole(text: dict[str, Any]) -> Callable[[Path], object]:
    """config.json is this and nothing else."""
    return lambda folder: (folder / "config.json").write_text(json.dumps(text))


def diffusion(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "T5": (named("T5ForConditionalGeneration", model_type="t5", is_encoder_decoder=True), "from text to text"),
    "BART": (named("BartForConditionalGeneration", model_type="bart", is_encoder_decoder=True), "from text to text"),
    "Whisper": (named("WhisperForConditionalGeneration", model_type="whisper", is_encoder_decoder=True), "speech"),
    "T5 without its head": (named("T5Model", model_type="t5"), "T5Model, which no family"),
    "a speech synthesizer": (named("VitsModel", model_type="vits"), "VitsModel, which no family"),
    "a classifier of texts": (named("LlamaForSequenceClassification"), "classifier of texts"),
    "a classifier of tokens": (named("BertForTokenClassification"), "classifier of tokens"),
    "question answering": (named("BertForQuestionAnswering"), "question answerer"),
    "an image encoder": (named("ViTModel", model_type="vit"), "ViTModel, which no family"),
    "an image classifier": (named("ViTForImageClassification", model_type="vit"), "classifier of images"),
    "CLIP": (named("CLIPModel", model_type="clip"), "CLIPModel, which no family"),
    "speech": (named("Wav2Vec2ForCTC", model_type="wav2vec2"), "speech recognizer"),
    "an audio encoder": (named("Wav2Vec2Model", model_type="wav2vec2"), "Wav2Vec2Model, which no family"),
    "a draft network": (named("Gemma4AssistantForCausalLM"), "keys and values of the model it drafts for"),
    "audio codes": (named("MusicgenForCausalLM", model_type="musicgen_decoder"), "a writer of audio codes"),
    "music": (named("MusicgenForConditionalGeneration", model_type="musicgen", is_encoder_decoder=True), "of music"),
    "an unknown network": (named("InventedModel"), "InventedModel, which no family"),
    "a diffusion pipeline": (diffusion, "diffusion pipeline"),
    "a part of one": (whole({"_class_name": "UNet2DConditionModel"}), "UNet2DConditionModel"),
    "timm": (whole({"architecture": "resnet50", "num_classes": 1000}), "resnet50, an image network of timm"),
    "several kinds for the type": (whole({"model_type": "bert"}), r"'bert'.*add the key .*architectures"),
    "no type at all": (whole({"hidden_size": 3}), r"no model type.*add the key .*architectures"),
}


def modelopt(**settings: Any) -> Callable[[Path], object]:
    """As ModelOpt alone writes it: config.json says nothing."""
    text = json.dumps({"producer": {"name": "modelopt"}, "quantization": settings})
    return lambda folder: (folder / "hf_quant_config.json").write_text(text)


def quantized(**settings: Any) -> Callable[[Path], object]:
    return lambda folder: change_config(folder, quantization_config=settings)


TOOLS: dict[str, tuple[Callable[[Path], object], str]] = {
    "bitsandbytes": (quantized(quant_method="bitsandbytes", load_in_8bit=True), "bitsandbytes"),
    "older bitsandbytes": (quantized(load_in_4bit=True), "bitsandbytes"),
    "MLX": (lambda folder: change_config(folder, quantization={"group_size": 64, "bits": 4}), "MLX"),
    **{
        name: (quantized(quant_method=method), tool)
        for name, method, tool in (
            *(
                ("HQQ", "hqq", "HQQ"),
                ("quanto", "quanto", "quanto"),
                ("EETQ", "eetq", "EETQ"),
                ("AQLM", "aqlm", "AQLM"),
            ),
            *(("torchao", "torchao", "torchao"), ("exl2", "exl2", "ExLlamaV2"), ("unknown", "new-thing", "new-thing")),
        )
    },
    "AWQ gemv": (quantized(quant_method="awq", version="gemv"), "layout 'gemv'"),
    "GPTQ marlin": (quantized(quant_method="gptq", checkpoint_format="marlin"), "layout 'marlin'"),
    "NVFP4": (quantized(quant_method="modelopt", quant_algo="NVFP4"), "algorithm 'NVFP4'"),
    "NVFP4 told beside": (modelopt(quant_algo="NVFP4", kv_cache_quant_algo="FP8"), "ModelOpt.*algorithm 'NVFP4'"),
    "sparse": (quantized(quant_method="compressed-tensors", format="marlin-24"), "format 'marlin-24'"),
    "rotations": (quantized(quant_method="compressed-tensors", transform_config={"a": 1}), "rotations"),
}
REFUSED = FILES | KINDS | TOOLS


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_in_the_same_words_everywhere(name, tmp_path, store):
    change, told = REFUSED[name]
    folder = write_causal(tmp_path / "model")
    change(folder)
    words = set()
    for ask in (
        lambda: pulled(folder, store),
        lambda: open_answerer(folder, store=lambda: store, can="generate"),
        lambda: open_answerer(folder, store=lambda: store),
        lambda: resolve_model(folder, store),
    ):
        with pytest.raises(ArtifactError, match=told) as failure:
            ask()
        words.add(str(failure.value))
    assert len(words) == 1 and "\n" not in words.pop()
    assert list(store.artifacts_folder.glob("*")) == []
    if name in KINDS or name in TOOLS:
        with pytest.raises(ArtifactError, match=told):
            resolve_any(folder, store)  # what `gulliver show` asks


def test_a_folder_that_was_not_pulled_is_not_shown_but_the_remedy_is(tmp_path, store):
    folder = write_causal(tmp_path / "model")
    with pytest.raises(ArtifactError, match="gulliver pull"):
        resolve_any(folder, store)


def test_encoders_are_those_that_say_so(tmp_path):
    folder = write_encoder(tmp_path)
    assert detect_task(folder) == "encoder"  # by modules.json
    (folder / "modules.json").unlink()
    for name in ("BertModel", "BertForMaskedLM", "BertForPreTraining"):
        change_config(folder, architectures=[name])
        assert detect_task(folder) == "encoder"
    change_config(folder, architectures=None)
    with pytest.raises(ArtifactError, match="architectures"):
        detect_task(folder)


def test_a_model_type_with_one_kind_of_network_needs_no_architecture(tmp_path, store):
    folder = write_causal(tmp_path / "model")
    expected = answer(folder, store)
    change_config(folder, architectures=None)
    assert detect_task(folder) == "language" and answer(folder, store) == expected
    config = json.loads(pulled(folder, store).file("config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_code_in_a_folder_is_not_needed_where_transformers_has_the_network(tmp_path, store):
    folder = write_causal(tmp_path / "model")
    expected = answer(folder, store)
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.LlamaForCausalLM"})
    assert answer(folder, store, "reference") == expected
    change_config(folder, architectures=["NewForCausalLM"], model_type="new")
    with pytest.raises(ArtifactError, match="never does"):
        answer(folder, store)


# ---- the text part of a multimodal model -----------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", MULTIMODAL)
def test_the_text_part_computes_what_the_whole_does(architecture, tmp_path, store, capfd):
    model = write_multimodal(tmp_path / "model", architecture)
    assert detect_task(tmp_path / "model") == "language"
    made = call("pull", {"source": str(tmp_path / "model")}, {}, store=store, progress=Progress())
    loaded = TASK.load(made.path)
    assert type(loaded).__name__ == MULTIMODAL[architecture][2]
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    notes = str(Origin.of(made).notes)
    assert (
        f"text part is loaded as {MULTIMODAL[architecture][2]}; left out: " in notes and notes in capfd.readouterr().err
    )
    config = json.loads(made.file("config.json").read_text())
    assert config["architectures"] == [MULTIMODAL[architecture][2]] and "vision_config" not in config
    assert not [name for name in load_file(made.file("model.safetensors")) if "vision" in name or "visual" in name]
    assert answer(tmp_path / "model", store) == answer(made.path, store)


@pytest.mark.parametrize(
    ("body", "head"),
    [
        ("model.language_model.", "lm_head."),
        ("language_model.model.", "language_model.lm_head."),
        ("model.", "lm_head."),
        ("thinker.model.", "thinker.lm_head."),
        ("model.text_model.", "lm_head."),
    ],
)
def test_the_text_part_is_found_below_any_prefix(body, head, tmp_path, store):
    folder = tmp_path / "model"
    model = write_multimodal(folder, "LlavaForConditionalGeneration", tie_word_embeddings=False)
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        moved = re.sub(r"^language_model\.model\.", body, name)
        renamed[re.sub(r"^(language_model\.)?lm_head\.", head, moved)] = tensor
    assert head + "weight" in renamed and any(name.startswith(body) for name in renamed)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(TASK.load(pulled(folder, store).path)), logits(model))


def test_a_model_that_transformers_does_not_know_has_a_text_part_by_its_section(tmp_path, store):
    """As InternVL is published: another class, an `llm_config`, weights below `language_model.`."""
    folder = write_causal(tmp_path / "model", "qwen2")
    expected = logits(TASK.load(folder))
    config = json.loads((folder / "config.json").read_text())
    whole({"architectures": ["NewChatModel"], "model_type": "new_chat", "llm_config": config, "vision_config": {}})(
        folder
    )
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(
        {**tensors, "vision_model.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    assert torch.equal(logits(TASK.load(pulled(folder, store).path)), expected)


def test_a_multimodal_model_in_fp8(tmp_path, store):
    write_multimodal(tmp_path / "model", "Mistral3ForConditionalGeneration")
    meant = write_fp8(tmp_path / "model", "language_model.model.")
    made = load_file(pulled(tmp_path / "model", store).file("model.safetensors"))
    assert meant
    for name, tensor in meant.items():
        assert torch.equal(made[name.removeprefix("language_model.")], tensor), name


def test_a_text_part_without_its_head_is_refused(tmp_path, store):
    write_multimodal(tmp_path / "model", "LlavaForConditionalGeneration", tie_word_embeddings=False)
    change_tensors(tmp_path / "model", {"language_model.lm_head.weight": None})
    with pytest.raises(ArtifactError, match=r"lm_head.weight"):
        pulled(tmp_path / "model", store)


# ---- quantized by another tool ---------------------------------------------------------------------------------------
def test_a_dequantized_folder_answers_from_every_command(tmp_path, store):
    folder = write_causal(tmp_path / "model")
    meant = write_fp8(folder)
    made = pulled(folder, store)
    stored = load_file(made.file("model.safetensors"))
    assert all(torch.equal(stored[name], tensor) for name, tensor in meant.items()) and meant
    assert "quantization_config" not in json.loads(made.file("config.json").read_text())
    assert "quantized by fp8" in str(Origin.of(made).notes)
    assert answer(folder, store) == answer(made.path, store) == answer(folder, store, "reference")


def test_what_modelopt_says_beside_the_config_is_read(tmp_path, store):
    folder = write_causal(tmp_path / "model")
    meant = write_fp8(folder)
    tensors = load_file(folder / "model.safetensors")
    scales = {name: tensor.reshape(()) for name, tensor in tensors.items() if name.endswith("_scale_inv")}
    change_tensors(folder, dict.fromkeys(scales))
    change_tensors(folder, {name.removesuffix("_inv"): tensor for name, tensor in scales.items()})
    change_tensors(folder, {"model.layers.0.self_attn.k_proj.k_scale": torch.ones(())})
    change_config(folder, quantization_config=None)
    modelopt(quant_algo="FP8", kv_cache_quant_algo="FP8", exclude_modules=["lm_head"])(folder)
    made = pulled(folder, store)
    stored = load_file(made.file("model.safetensors"))
    assert meant and all(torch.equal(stored[name], tensor) for name, tensor in meant.items())
    assert "quantized by modelopt" in str(Origin.of(made).notes) and "hf_quant_config.json" not in made.files


def test_a_cache_alone_that_is_quantized_changes_no_weight(tmp_path, store):
    folder = write_causal(tmp_path / "model")
    expected = logits(TASK.load(folder))
    modelopt(quant_algo=None, kv_cache_quant_algo="FP8")(folder)
    assert torch.equal(logits(TASK.load(pulled(folder, store).path)), expected)
