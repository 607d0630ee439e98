"""The models that the runtime is measured on besides the fitted one, made by gulliver's own commands."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

from compress_common import gulliver
from compress_llama import Shape, write_llama
from runtime_large import write_packed_llama

CALIBRATION = "wikitext-2.valid.txt"
HELD_OUT = "wikitext-2.test.txt"
EIGHT_BITS = ("--bits", 8, "--group-size", 64, "--kind", "uniform", "--method", "rtn")
LARGE_SHAPE = Shape(layers=16)


def eight_bit_model(args: argparse.Namespace) -> Path:
    """The parent in 8 bits with groups of 64, about the work that Q8_0 does; made once.

    It is rounded to nearest, so the calibration that `gulliver quantize` asks for may be as short as can be.
    """
    out = args.home / "models" / "8-bit"
    if not (out / "config.json").exists():
        if args.data_folder is None:
            raise SystemExit(f"--data-folder is needed to make {out}: a folder with {CALIBRATION} and {HELD_OUT}")
        home, partial = args.home / "models" / "home", out.with_name(out.name + ".partial")
        texts = [args.data_folder / CALIBRATION, "--eval-data", args.data_folder / HELD_OUT]
        data = gulliver("read", *texts, home=home).document["id"]
        pulled = gulliver("pull", args.parent, home=home).document["id"]
        short = ("--examples", 1, "--tokens", 64, "--moments", "diagonal", "--sensitivity", "power")
        calibrated = gulliver("calibrate", pulled, "--data", data, *short, home=home).document["id"]
        shutil.rmtree(partial, ignore_errors=True)
        gulliver("quantize", pulled, "--calibration", calibrated, *EIGHT_BITS, "--out", partial, home=home)
        partial.rename(out)
        shutil.rmtree(home)
    return out


def large_parent(args: argparse.Namespace) -> Path:
    """A Llama of random weights in bf16, for the peers to quantize; written once."""
    folder = args.home / "models" / "large-bf16"
    write_llama(folder, args.parent, LARGE_SHAPE)
    return folder


def large_model(args: argparse.Namespace) -> Path:
    """A Llama of the same shape with random codes, 4 bits, groups of 64: 478 MB, beyond any last-level cache."""
    folder = args.home / "models" / "large"
    write_packed_llama(folder, args.parent, LARGE_SHAPE)
    return folder


# ---- what a model asks of the machine -------------------------------------------------------------------------------
def bytes_per_token(folder: Path) -> int:
    """Bytes of weights that one decoding step reads: all but an embedding that is not the head as well."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tied = config.get("tie_word_embeddings", False)
    sizes = _tensor_bytes(folder)
    return sum(size for name, size in sizes.items() if tied or not name.startswith("model.embed_tokens."))


def prefill_operations(folder: Path, tokens: int) -> int:
    """Multiplications and additions of a prompt: the linear layers and causal attention; `folder` is not packed."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shapes = {name: shape for path in sorted(folder.glob("*.safetensors")) for name, shape in _shapes(path).items()}
    inside = [shape for name, shape in shapes.items() if len(shape) == 2 and ".layers." in name]
    heads = config["num_attention_heads"]
    width = heads * (config.get("head_dim") or config["hidden_size"] // heads)
    return 2 * tokens * sum(map(math.prod, inside)) + 2 * tokens**2 * width * config["num_hidden_layers"]


def _header(path: Path) -> dict[str, dict]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: row for name, row in header.items() if name != "__metadata__"}


def _shapes(path: Path) -> dict[str, list[int]]:
    return {name: row["shape"] for name, row in _header(path).items()}


def _tensor_bytes(folder: Path) -> dict[str, int]:
    rows = [item for path in sorted(folder.glob("*.safetensors")) for item in _header(path).items()]
    return {name: row["data_offsets"][1] - row["data_offsets"][0] for name, row in rows}
