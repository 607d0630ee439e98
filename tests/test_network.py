"""A network gets the weights that are stored: tied or not, finite, in their types, or an error of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_samples import change_config, change_tensors, write_untied
from language_samples import write_causal
from safetensors.torch import load_file, save_file
from test_checkpoints import TASK, TOKENS, answer, logits, pulled

from gulliver.core.errors import ArtifactError, GulliverError
from gulliver.core.records import Origin
from gulliver.tasks import get_task
from gulliver.tasks.text.tokenizer import write_byte_tokenizer


# ---- what transformers says ------------------------------------------------------------------------------------------
def without_description(folder: Path) -> None:
    """GPTQ's tensors, and no word of it in a config."""
    name = "model.layers.0.mlp.up_proj."
    change_tensors(folder, {f"{name}weight": None, f"{name}qweight": torch.ones(4, 48, dtype=torch.int32)})


def other_layout(folder: Path) -> None:
    """Marlin's tensors under a config that says GPTQ."""
    name = "model.layers.0.mlp.up_proj."
    change_tensors(folder, {f"{name}weight": None, f"{name}B": torch.ones(4, 48, dtype=torch.int32)})
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def other_shape(folder: Path) -> None:
    """An older checkpoint, whose names are translated, with one matrix of another model."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    renamed["transformer.model.layers.0.mlp.up_proj.weight"] = torch.ones(3, 3)
    (folder / "model.safetensors").unlink()
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change", [without_description, other_layout, other_shape])
def test_transformers_own_reports_reach_no_user(change, tmp_path, store, capfd):
    folder = write_causal(tmp_path / "model")
    change(folder)
    capfd.readouterr()
    before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    with pytest.raises(ArtifactError, match=r"no usable weights for.*download") as failure:
        pulled(folder, store)
    assert before == (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled())
    assert before == (transformers.logging.WARNING, True), "they would be written"
    assert str(failure.value).startswith(f"{folder} ") and "\n" not in str(failure.value)
    assert capfd.readouterr() == ("", "")


def test_an_encoder_without_its_decoder_is_opened_as_what_it_is(tmp_path, store):
    config = transformers.T5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(config).eval()
    model.save_pretrained(tmp_path / "model")
    write_byte_tokenizer(tmp_path / "model")
    made = pulled(tmp_path / "model", store)
    loaded: Any = get_task("encoder").load(made.path)
    assert made.task == "encoder" and type(loaded).__name__ == "T5EncoderModel"
    with torch.no_grad():
        wanted, found = (one(input_ids=TOKENS).last_hidden_state for one in (model, loaded))
    assert torch.equal(found, wanted)


# ---- tied or not -----------------------------------------------------------------------------------------------------
TIED = ["llama-untied", "qwen3", "gemma2", "phi", "mistral-sliding"]


@pytest.mark.parametrize("name", TIED)
def test_a_head_that_differs_from_the_embedding_is_kept(name, tmp_path, store):
    folder = write_untied(tmp_path / "model", name, tie_word_embeddings=False)
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    made = pulled(folder, store)
    assert json.loads(made.file("config.json").read_text())["tie_word_embeddings"] is False
    for place in (folder, made.path):
        for loaded in (TASK.load(place), TASK.load(place, empty=True)):
            assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight
        assert torch.equal(logits(TASK.load(place)), logits(expected))
    TASK.save(TASK.load(folder), tmp_path / "saved")
    assert torch.equal(logits(TASK.load(tmp_path / "saved")), logits(expected))


def test_a_head_that_is_the_embedding_is_tied(tmp_path):
    folder = write_causal(tmp_path, "llama-tied")
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(folder, {"lm_head.weight": table.clone()})
    model = TASK.load(folder)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    change_tensors(folder, {"lm_head.weight": table.to(torch.bfloat16)})
    assert TASK.load(folder).lm_head.weight is not TASK.load(folder).get_input_embeddings().weight


def test_a_head_that_is_stored_twice_is_tied(tmp_path, store):
    folder = write_causal(tmp_path / "model", "llama-untied")
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(folder, {"lm_head.weight": table.clone()})
    expected = logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    made = pulled(folder, store)
    for place in (folder, made.path):
        model: Any = TASK.load(place)
        assert model.lm_head.weight is model.get_input_embeddings().weight and torch.equal(logits(model), expected)
    assert json.loads(made.file("config.json").read_text())["tie_word_embeddings"] is True
    assert answer(folder, store) == answer(made.path, store)


def test_a_head_that_is_missing_is_named_with_the_remedy(tmp_path, store):
    folder = write_causal(tmp_path / "model", "llama-untied")
    change_tensors(folder, {"lm_head.weight": None})
    for ask in (lambda: pulled(folder, store), lambda: answer(folder, store)):
        with pytest.raises(ArtifactError, match=r"lm_head\.weight.*set tie_word_embeddings to true"):
            ask()


# ---- values ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_weight_that_is_not_finite_is_named_by_every_command(name, dtype, value, tmp_path, store):
    folder = write_causal(tmp_path / "model")
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(folder / "model.safetensors").items()}
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for ask in (
        lambda: pulled(folder, store),
        lambda: answer(folder, store),
        lambda: answer(folder, store, "reference"),
        lambda: TASK.load(folder),
    ):
        with pytest.raises(GulliverError, match=rf"{name} in .*model\.safetensors holds values that are not finite"):
            ask()


def test_each_tensor_keeps_the_precision_that_it_needs(tmp_path, store):
    """Older names are translated; a float32 vector in a bfloat16 model stays what it was."""
    folder = write_causal(tmp_path / "model", "gpt_neox")
    tensors = load_file(folder / "model.safetensors")
    kept = "gpt_neox.final_layer_norm.bias"
    change_tensors(folder, {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items() if key != kept})
    made = load_file(pulled(folder, store).file("model.safetensors"))
    assert torch.equal(made[kept], tensors[kept]) and made[kept].dtype == torch.float32
    assert {tensor.dtype for name, tensor in made.items() if name != kept} == {torch.bfloat16}


def test_tensors_without_a_place_are_named(tmp_path, store):
    folder = write_causal(tmp_path / "model")
    change_tensors(folder, {"mtp.layers.0.weight": torch.ones(3)})
    assert "no place for mtp.layers.0.weight (1 tensor left out)" in str(Origin.of(pulled(folder, store)).notes)
