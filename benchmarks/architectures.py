"""Every causal architecture of the installed transformers, at toy size, through the whole chain: what fails, and why.

    python benchmarks/architectures.py [--only NAME …] [--out FILE]

Each is built with random weights from its own config class, shrunk by a general recipe, and goes through pull,
generate, calibrate, quantize, quality and export (safetensors). The result is benchmarks/results/architectures.json:
for each architecture the step that failed and its error, the share of the packed bytes that stays at 16 bits, and
whether the network was streamed block by block or run whole. The table in docs/models.md is drawn from it.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import resource
import shutil
import signal
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto as auto

from gulliver.core.errors import ConfigError, first_line
from gulliver.core.progress import Progress
from gulliver.core.records import PlainTensors, StatisticsTable
from gulliver.core.store.store import Store
from gulliver.pipeline.call import call
from gulliver.pipeline.resolve import resolve_data, resolve_model
from gulliver.tasks import get_task
from gulliver.tasks.text.tokenizer import write_byte_tokenizer

RESULTS = Path(__file__).parent / "results" / "architectures.json"
PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- table: architectures -->", "<!-- end table -->"
VOCABULARY = 320
LIMIT_S = 40
"""Seconds of processor time for one architecture, so that a busy machine gives the same rows."""
LIMIT_WALL_S = 400
"""Seconds after which one that does not compute is ended."""
TEXT = "".join(f"The {number}th fox jumps over {number * 7} lazy dogs and goes home.\n" for number in range(600))
SIZES: dict[str, int] = {
    **dict.fromkeys(
        (
            "hidden_size",
            "hidden_size_global",
            "adapter_in_dim",
            "adapter_input_size",
            "adapter_out_dim",
            "n_embd",
            "d_model",
            "embed_dim",
            "dim",
            "model_dim",
            "width",
        ),
        64,
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size"), 128
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_ffn_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_kv_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "attention_head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16
    ),
    **dict.fromkeys(("global_head_dim", "linear_head_dim", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "context_length"), 512),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "depth"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "encoder_hash_byte_group_vocab"), VOCABULARY),
    **dict.fromkeys(("rotary_dim", "mamba_d_state", "state_size", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_d_ssm",), 128),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 64),
}
"""Config fields and what they are shrunk to, where a config class has them."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
QWEN4_EXP = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "hc_lowrank": 16,
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 100,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "eos_token_id": 1,
}
DOTS3_NOTE = {
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "index_n_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("kv_lora_rank", "swa_kv_lora_rank", "swa_q_lora_rank"), 32),
    **{"head_dim": 24, "qk_nope_head_dim": 16, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16},
    **{"index_topk": 16, "index_head_dim": 16, "shared_experts_intermediate_size": 64},
}
GEMMA3N = {
    **{"intermediate_size": [128, 128], "activation_sparsity_pattern": [0.95, 0.0]},
    **{"hidden_size_per_layer_input": 16, "laurel_rank": 16},
}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "dots3_note": {"text_config": DOTS3_NOTE},
    "dots3_note_text": DOTS3_NOTE,
    "gemma3n": {"text_config": GEMMA3N},
    "gemma3n_text": GEMMA3N,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen4_exp": {"text_config": QWEN4_EXP},
    "qwen4_exp_text": QWEN4_EXP,
    "zamba": {
        "num_hidden_layers": 3,
        **dict.fromkeys(("layer_types", "layers_block_type"), ["linear_attention", "hybrid", "hybrid"]),
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""Model types whose config needs more: fields that are empty by default, or that hang together."""


def settable(config: Any, name: str) -> bool:
    """Whether the config has a field of this name, a whole number that is not computed from others."""
    if isinstance(getattr(type(config), config.attribute_map.get(name, name), None), property):
        return False
    try:
        return isinstance(getattr(config, name, None), int)
    except (AttributeError, ValueError, RuntimeError):  # one that varies from layer to layer
        return False


def small(kind: str) -> Any:
    """A config of the model type at toy size."""
    known = transformers.AutoConfig.for_model(kind)
    return transformers.AutoConfig.for_model(kind, **joined(shrunk(known), OWN.get(kind, {})))


def joined(chosen: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Fields with the model type's own laid over them, config inside config."""
    inner = {name: joined(chosen[name], one) for name, one in own.items() if isinstance(one, dict) and name in chosen}
    return {**chosen, **own, **inner}


def shrunk(config: Any) -> dict[str, Any]:
    """Every known size that a config's class has, lists of layers cut; so for each config inside it."""
    chosen: dict[str, Any] = {name: size for name, size in SIZES.items() if settable(config, name)}
    for name in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types"):
        own = getattr(type(config), config.attribute_map.get(name, name), None)
        types = None if isinstance(own, property) else getattr(config, name, None)
        if isinstance(types, (list, tuple)) and types:
            kinds = list(dict.fromkeys(types))
            chosen[name] = [kinds[0], kinds[-1]]
    for name in (
        "num_key_value_heads",
        "n_shared_experts",
        "n_routed_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
    ):
        if vars(config).get(name, 0) is None:
            chosen[name] = SIZES[name]
    if "num_kv_shared_layers" in vars(config):
        chosen["num_kv_shared_layers"] = 0
    if "rope_parameters" in vars(config) and not config.rope_parameters:
        chosen["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    if "qk_rope_head_dim" in chosen:
        if "head_dim" in chosen:
            chosen["head_dim"] = SIZES["qk_rope_head_dim"]  # another name of the same
        if "num_key_value_heads" in chosen:
            chosen["num_key_value_heads"] = SIZES["num_attention_heads"]
    if hasattr(config, "eos_token_id"):
        chosen |= {name: 0 for name in ("bos_token_id", "pad_token_id") if hasattr(config, name)}
        chosen |= {"eos_token_id": 1} | ({"is_decoder": True} if hasattr(config, "is_decoder") else {})
    if "expand" in vars(config) and "head_dim" in chosen:  # heads of a state space
        chosen["head_dim"] = SIZES["hidden_size"] * config.expand // SIZES["num_heads"]
    if getattr(config, "layer_types", ()) is None:
        chosen["layer_types"] = ["full_attention"] * SIZES["num_hidden_layers"]
    if getattr(config, "attention_types", None):
        chosen["attention_types"] = [[["global", "local"], 1]]
    if vars(config).get("head_dim", 0) is None and "head_dim" not in chosen and "qk_rope_head_dim" not in chosen:
        chosen["head_dim"] = SIZES["head_dim"]
    for name in type(config).sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, transformers.PreTrainedConfig):
            chosen[name] = {"model_type": inner.model_type, **shrunk(inner)}
    return chosen


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
    except Exception as error:
        return row | {"failed": step, "reason": f"{type(error).__name__}: {first_line(error).replace(str(home), '…')}"}
    return row | {"failed": None}


def apart(kind: str, home: Path, data: Any, store: Store) -> dict[str, Any]:
    """The chain in a child process, so that one that crashes or hangs is a row, not the end."""
    context = multiprocessing.get_context("fork")
    there, here = context.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S))
        row = chain(kind, home, data, store)
        here.send(row | {"processor_s": round(time.process_time(), 1)})

    child = context.Process(target=work, daemon=True)
    child.start()
    here.close()
    try:
        return there.recv() if there.poll(LIMIT_WALL_S) else {"failed": "time", "reason": "it does not end"}
    except EOFError:
        child.join()
        if child.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
            return {"failed": "time", "reason": f"not done after {LIMIT_S} s of processor time"}
        return {"failed": "process", "reason": f"the process ended with {child.exitcode}"}
    finally:
        child.kill()
        child.join()
        shutil.rmtree(home / kind, ignore_errors=True)


def encoders() -> set[str]:
    """Model types that transformers also has as a network of another kind: an encoder, or one with a decoder."""
    return {*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}


def table(found: dict[str, Any]) -> list[str]:
    """The lines of Markdown that say what became of each model type."""
    lines = []
    for title, kinds in (("decoders", sorted(set(found) - encoders())), ("others", sorted(set(found) & encoders()))):
        rows = {kind: found[kind] for kind in kinds}
        passed = {kind: row for kind, row in rows.items() if row["failed"] is None}
        lines += [f"{len(passed)} of the {len(rows)} {title} that were tried pass.", ""] if rows else []
        plain = sorted((row["share_at_16_bits"], kind) for kind, row in passed.items())
        if plain:
            lines += [
                f"Share of the bytes at 16 bits: median {plain[len(plain) // 2][0]:.1%}; above a tenth: "
                + (", ".join(f"{kind} {share:.0%}" for share, kind in plain if share > 0.1) or "none") + ".", ""
            ]  # fmt: skip
        if len(passed) < len(rows):
            lines += ["| type | step | reason |", "| --- | --- | --- |"]
            lines += [
                f"| {kind} | {row['failed']} | {row['reason'].replace('|', '/')} |"
                for kind, row in rows.items()
                if row["failed"] is not None
            ]
            lines.append("")
    return lines[:-1]


def draw(found: dict[str, Any], page: Path = PAGE) -> None:
    """Put the table between its marks in the page."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END, 1)
    page.write_text(f"{before}{BEGIN}\n{chr(10).join(table(found))}\n{END}{after}", encoding="utf-8")


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
        (home / "text.txt").write_text(TEXT)
        store = Store(home / "store")
        data = resolve_data(home / "text.txt", store)
        for kind in asked.only or auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            began = time.monotonic()
            found[kind] = apart(kind, home, data, store)
            print(kind, json.dumps(found[kind]), f"{time.monotonic() - began:.1f} s", flush=True)
            done = sum(row["failed"] is None for row in found.values())
            body = {"transformers": transformers.__version__, "passed": done, "of": len(found), "architectures": found}
            asked.out.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    if asked.out == RESULTS:
        draw(found)


if __name__ == "__main__":
    main()
