"""The valid files that the fuzz of the readers changes: tiny, made here, a folder each."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pyarrow
import pyarrow.parquet

from gulliver.tasks import get_task
from gulliver.tasks.text.tokenizer import write_byte_tokenizer

TEMPLATE = """{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages if m.role != 'system' %}
{%- if loop.first and m['role'] == 'assistant' %}{{ raise_exception('no') }}{% endif %}
{%- set ns.last = loop.index0 %}
<|{{ m.role }}|>{{ (m.content | trim)[:1000] ~ eos_token }}
{%- for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}
{%- endfor %}
{%- macro end(n) %}{{ '-' * n }}{{ strftime_now('%Y') }}{% endmacro %}
{{- end(3) if add_generation_prompt else '' }}{# done #}
"""
RECIPE = """# a recipe
name = "small"
seed = 3

[[step]]
id = "parent"
use = "pull"
source = "catalog:smollm2-135m-instruct"

[[step]]
id = "data"
use = "read"
data = "texts.txt"
family = { holdout = 0.1, text_column = "text" }

[[step]]
id = "statistics"
use = "calibrate"
inputs = { model = "parent", dataset = "data" }
examples = 16

[[step]]
id = "small"
use = "quantize"
inputs = { model = "parent", calibration = "statistics" }
bits = 4

[[gate]]
on = "small"
metric = "quality_loss"
at_most = 0.05
"""


def write_models(root: Path) -> list[Path]:
    """A language model, an encoder and an image network, as plain folders."""
    folders = []
    for name in ("language", "encoder", "vision"):
        task = get_task(name)
        task.save(task.build(1), root / name)
        folders.append(root / name)
    return folders


def write_tokenizers(root: Path) -> list[Path]:
    """A byte-level tokenizer, and one with every part that a tokenizer.json can have."""
    write_byte_tokenizer(root / "bytes")
    body = json.loads((root / "bytes" / "tokenizer.json").read_text())
    body["model"]["merges"] = [["a", "b"], ["ab", "c"]]
    body["model"]["vocab"] |= {"ab": 257, "abc": 258}
    body["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\s+|."}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    body["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    single = [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<|end|>": {"id": "<|end|>", "ids": [256], "tokens": ["<|end|>"]}}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    body["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    write_byte_tokenizer(root / "parts")
    (root / "parts" / "tokenizer.json").write_text(json.dumps(body))
    return [root / "bytes", root / "parts"]


def write_ggufs(root: Path) -> list[Path]:
    """A tiny Llama in one file, with each kind of tokenizer that is read."""
    folders = []
    for kind in ("gpt2", "llama"):
        (root / kind).mkdir(parents=True)
        folders.append(root / kind)
        writer = gguf.GGUFWriter(root / kind / "model.gguf", "llama")
        words = [f"<0x{byte:02X}>" for byte in range(256)] if kind == "llama" else _alphabet()
        words += ["<s>", "ab"]
        kinds = [6 if kind == "llama" else 1] * 256 + [3, 1]
        for key, value in {"context_length": 64, "embedding_length": 32, "block_count": 1}.items():
            getattr(writer, f"add_{key}")(value)
        writer.add_feed_forward_length(32)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(16)
        writer.add_tokenizer_model(kind)
        writer.add_token_list(words)
        writer.add_token_types(kinds)
        writer.add_bos_token_id(256)
        writer.add_chat_template("{{ messages }}")
        if kind == "gpt2":
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_merges(["a b"])
        else:
            writer.add_token_scores([0.0] * len(words))
        _tensors(writer, len(words))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return folders


def _tensors(writer: gguf.GGUFWriter, words: int) -> None:
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (words, 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_output", "ffn_gate", "ffn_up", "ffn_down")}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32) * 0.1
        if name == "blk.0.ffn_up":
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", values.astype(np.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))


def _alphabet() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def write_texts(root: Path) -> list[Path]:
    """Data of text: lines of JSON, and Parquet in the encodings and compressions that writers choose."""
    texts = [f"This is text {number}; it says a thing or two, 漢字 too." for number in range(60)] + [
        "again and again"
    ] * 40
    folders = [root / "jsonl"]
    folders[0].mkdir(parents=True)
    rows = [json.dumps({"text": text, "n": number}) for number, text in enumerate(texts)]
    (folders[0] / "data.jsonl").write_text("\n".join(rows) + "\n")
    ways = {
        "plain": {"use_dictionary": False, "compression": "none"},
        "dictionary": {"compression": "zstd", "row_group_size": 40},
        "delta": {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}, "compression": "gzip"},
        "second": {"data_page_version": "2.0", "compression": "snappy"},
    }
    for name, how in ways.items():
        (root / name).mkdir()
        table = pyarrow.table({"text": texts} | ({} if name == "delta" else {"n": list(range(100))}))
        pyarrow.parquet.write_table(table, root / name / "data.parquet", **how)
        folders.append(root / name)
    return folders


def write_text(root: Path, name: str, text: str) -> list[Path]:
    """One text file in a folder."""
    root.mkdir(parents=True)
    (root / name).write_text(text)
    return [root]
