"""Every causal architecture of the installed transformers, at toy size, through the whole chain: what fails, and why.

    python benchmarks/architectures.py [--only NAME …] [--out FILE]

Each is built with random weights from its own config class, shrunk by a general recipe, and goes through pull,
generate, calibrate, quantize, quality and export (safetensors). The result is benchmarks/results/architectures.json:
for each architecture the step that failed and its error, the share of the packed bytes that stays at 16 bits, and
whether the network was streamed block by block or run whole.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from gulliver.core.errors import FOREIGN, ConfigError, GulliverError, first_line
from gulliver.core.progress import Progress
from gulliver.core.records import PlainTensors, StatisticsTable
from gulliver.core.store.store import Store
from gulliver.pipeline.call import call
from gulliver.pipeline.resolve import resolve_data, resolve_model
from gulliver.tasks import get_task
from gulliver.tasks.text.tokenizer import write_byte_tokenizer

RESULTS = Path(__file__).parent / "results" / "architectures.json"
VOCABULARY = 320
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "dim", "model_dim", "width"), 64),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 128
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_ffn_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("global_head_dim", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "context_length"), 512),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
}
"""Config fields and what they are shrunk to, where a config class has them."""
PLAIN_SIZES = ("vocab_size", "vocab_size_per_layer_input")


def settable(config: Any, name: str) -> bool:
    """Whether the config has a field of this name, a whole number that is not computed from others."""
    if isinstance(getattr(type(config), name, None), property):
        return False
    try:
        return isinstance(getattr(config, name, None), int)
    except (AttributeError, ValueError):  # one that varies from layer to layer
        return False


def small(kind: str) -> Any:
    """A config of the model type at toy size: every known size that its class has, lists of layers cut."""
    known = transformers.AutoConfig.for_model(kind)
    text = known.get_text_config(decoder=True)
    sizes = SIZES | dict.fromkeys(PLAIN_SIZES, VOCABULARY)
    chosen: dict[str, Any] = {name: size for name, size in sizes.items() if settable(text, name)}
    for name in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types"):
        types = None if isinstance(getattr(type(text), name, None), property) else getattr(text, name, None)
        if isinstance(types, (list, tuple)) and types:
            kinds = list(dict.fromkeys(types))
            chosen[name] = [kinds[0], kinds[-1]]
    if "qk_rope_head_dim" in chosen:
        chosen.pop("head_dim", None)  # another name of the same
    chosen |= {name: 0 for name in ("bos_token_id", "pad_token_id") if hasattr(text, name)}
    chosen |= {"eos_token_id": 1, "is_decoder": True} if hasattr(text, "is_decoder") else {"eos_token_id": 1}
    key = next((name for name in type(known).sub_configs if getattr(known, name, None) is text), None)
    if text is known or key is None:
        return transformers.AutoConfig.for_model(kind, **chosen)
    return transformers.AutoConfig.for_model(kind, **{key: {"model_type": text.model_type, **chosen}})


def build(kind: str, folder: Path) -> None:
    """A random model of the type, with a byte tokenizer."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(small(kind), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.mul_(2.0)
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)


def streamed(folder: Path) -> bool:
    """Whether the network runs block by block. AssertionError when that gives other logits than all of it."""
    network = get_task("language").load(folder)
    batch = {"tokens": torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))}
    try:
        blocks = get_task("language").blocks(network, [batch])
    except ConfigError:
        return False
    with torch.no_grad():
        x: Any = batch
        for block in blocks:
            x = block.forward(x, 0)
        right = network(input_ids=batch["tokens"], use_cache=False).logits
    assert torch.allclose(x, right, rtol=1e-3, atol=1e-4 * float(right.abs().max())), "streamed logits are others"
    return True


def chain(kind: str, home: Path, data: Any, store: Store) -> dict[str, Any]:
    """What became of one architecture: the step that failed and why, or facts about what was made."""
    from gulliver.pipeline.generate import generate

    row: dict[str, Any] = {}
    step, quiet = "build", Progress(quiet=True)
    try:
        build(kind, home / kind)
        step = "pull"
        model = resolve_model(home / kind, store, progress=quiet)
        step = "stream"
        row["streamed"] = streamed(model.path)
        step = "generate"
        generate(model.path, "hello there", raw=True, max_tokens=4, temperature=0.0, home=store.home)
        step, given = "calibrate", {"store": store, "progress": quiet}
        options = {"examples": 4, "batch_size": 2, "gradient_examples": 2, "family": {"tokens": 64}}
        calibration = call(step, options, {"model": model, "dataset": data}, **given)
        table = StatisticsTable.of(calibration)
        row |= {"notes": list(table.notes), "packed": len(table.weights)}
        step = "quantize"
        packed = call(
            step, {"group_size": 32, "kind": "uniform"}, {"model": model, "calibration": calibration}, **given
        )
        row["share_at_16_bits"] = round(PlainTensors.of(packed).share, 4)
        step, inputs = "quality", {"model": packed, "dataset": data, "parent": model}
        call(step, {"family": {"windows": 2, "context": 64}}, inputs, **given)
        losses = [one.value for one in store.evidence(packed.id) if one.metric == "kl_divergence"]
        row["kl_divergence"] = round(losses[-1], 4)
        step = "export"
        call(step, {"format": "safetensors"}, {"model": packed}, **given)
    except (GulliverError, ImportError, StopIteration, *FOREIGN) as error:
        return row | {"failed": step, "reason": f"{type(error).__name__}: {first_line(error)}"}
    return row | {"failed": None}


def main() -> None:
    """Run the chain for all, or those named, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = json.loads(asked.out.read_text())["architectures"] if asked.only and asked.out.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        text = "".join(
            f"The {number}th fox jumps over {number * 7} lazy dogs and goes home.\n" for number in range(600)
        )
        (home / "text.txt").write_text(text)
        store = Store(home / "store")
        data = resolve_data(home / "text.txt", store)
        for kind in asked.only or NAMES:
            began = time.monotonic()
            found[kind] = chain(kind, home, data, store)
            print(kind, json.dumps(found[kind]), f"{time.monotonic() - began:.1f} s", flush=True)
            done = sum(row["failed"] is None for row in found.values())
            body = {"transformers": transformers.__version__, "passed": done, "of": len(found), "architectures": found}
            asked.out.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
