#!/usr/bin/env python3
"""Size and perplexity of one model as packed by auto-round or GPTQModel on a CPU: peers beside llama.cpp.

    python benchmarks/peers_quantizers.py make --tool auto-round|gptqmodel --model HF_DIR --text wikitext-2.valid.txt \
        --folder SCRATCH/ar
    python benchmarks/peers_quantizers.py measure --folder SCRATCH/ar --model HF_DIR --text wikitext-2.test.txt \
        --out benchmarks/results/peers.json

`make` needs the tool (own virtual environment: their requirements differ), packs the linear layers of the blocks into
4 bits with groups of 64 in the tool's default way (symmetric) from 64 x 512 calibration tokens, and leaves the tied
embedding as the tool stores it (16 bits). auto-round gets 50 rounds instead of its 200: a cheap setting. `measure`
needs torch and transformers only: it unpacks the GPTQ layout that both tools write, and scores in the same way and
engine as peers_llama_cpp.py. Size is that of all *.safetensors.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

from peers_common import Book, circumstances, perplexity, windows

BITS = 4
GROUP_SIZE = 64
SAMPLES, SAMPLE_TOKENS = 64, 512
ROUNDS = 50
CALIBRATION = f"{SAMPLES} x {SAMPLE_TOKENS} tokens"
HOW = {
    "auto-round": f"4 bits, group {GROUP_SIZE}, symmetric, {ROUNDS} rounds of sign rounding, {CALIBRATION}",
    "gptqmodel": f"4 bits, group {GROUP_SIZE}, symmetric, GPTQ, {CALIBRATION}",
}


def make(args: argparse.Namespace) -> None:
    """Run the tool, and note its version, settings and seconds in made.json."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(args.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    ids = ids[: SAMPLES * SAMPLE_TOKENS].view(SAMPLES, SAMPLE_TOKENS)
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    start = time.monotonic()
    (_auto_round if args.tool == "auto-round" else _gptqmodel)(args, tokenizer, samples)
    made = {"tool": args.tool, "version": version(args.tool), "seconds": round(time.monotonic() - start, 1)}
    (args.folder / "made.json").write_text(json.dumps({**made, "text": args.text.name}), encoding="utf-8")


def _auto_round(args: argparse.Namespace, tokenizer, samples: list[dict]) -> None:
    import torch
    from auto_round import AutoRound
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    worker = AutoRound(
        model,
        tokenizer,
        bits=BITS,
        group_size=GROUP_SIZE,
        iters=ROUNDS,
        nsamples=SAMPLES,
        seqlen=SAMPLE_TOKENS,
        batch_size=4,
        dataset=DataLoader(samples, batch_size=4),
        device_map="cpu",
        enable_torch_compile=False,
    )
    worker.quantize_and_save(str(args.folder), format="auto_gptq")


def _gptqmodel(args: argparse.Namespace, tokenizer, samples: list[dict]) -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=BITS, group_size=GROUP_SIZE, offload_to_disk=False, device="cpu")
    model = GPTQModel.load(str(args.model), config)
    model.quantize(
        [{name: row.tolist() for name, row in one.items()} for one in samples], batch_size=4, backend=BACKEND.TORCH
    )
    model.save(str(args.folder))


def measure(args: argparse.Namespace) -> None:
    """Unpack, score and add a row to the results."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    made = json.loads((args.folder / "made.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    packed = fill(model, args.folder)
    quality = perplexity(model, windows(AutoTokenizer.from_pretrained(args.model), args.text, args.windows))
    row = {
        "engine": made["tool"],
        "version": made["version"],
        "type": f"W{BITS} g{GROUP_SIZE}, embedding as stored",
        "size_bytes": sum(path.stat().st_size for path in args.folder.glob("*.safetensors")),
        "packed_tensors": packed,
        "how": f"{HOW[made['tool']]} of {made['text']}; unpacked and scored in torch on {args.text.name}",
        "quantize_wall_s": made["seconds"],
        **quality,
        **circumstances(args.threads),
    }
    Book(args.out).add(row)
    print(json.dumps(row))


def fill(model, folder: Path) -> int:
    """Put the weights of a folder in GPTQ layout into the model, in place. Returns how many tensors were packed."""
    from safetensors.torch import load_file

    stored = {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
    state, count, left = model.state_dict(), 0, set(model.state_dict())
    for name in list(stored):
        owner, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            parts = {
                key: stored[f"{owner}.{key}"]
                for key in ("qweight", "qzeros", "scales", "g_idx")
                if f"{owner}.{key}" in stored
            }
            state[f"{owner}.weight"].copy_(unpacked(**parts))
            left.discard(f"{owner}.weight")
            count += 1
        elif name in state:
            state[name].copy_(stored[name].float())
            left.discard(name)
    left -= {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert count and not left, f"{folder}: {count} packed tensors; not filled: {sorted(left)[:3]}"
    return count


def unpacked(qweight, qzeros, scales, g_idx=None):
    """float32 [out, in] from qweight int32 [in / 8, out], qzeros int32 [groups, out / 8] (stored less one), scales

    [groups, out]; `g_idx` [in] names the group of each input where the order is not plain.
    """
    import torch

    shifts = torch.arange(0, 32, BITS, dtype=torch.int32)
    codes = ((qweight[:, None, :] >> shifts[None, :, None]) & 15).reshape(-1, qweight.shape[1])
    zeros = (((qzeros[:, :, None] >> shifts) & 15).reshape(qzeros.shape[0], -1) + 1) & 15
    group = g_idx.long() if g_idx is not None else torch.arange(codes.shape[0]) // GROUP_SIZE
    return ((codes - zeros[group]).float() * scales.float()[group]).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "measure"))
    parser.add_argument("--tool", choices=tuple(HOW), help="for make")
    parser.add_argument("--model", type=Path, required=True, help="the parent, a Hugging Face folder")
    parser.add_argument("--text", type=Path, required=True, help="calibration text (make) or text to score (measure)")
    parser.add_argument("--folder", type=Path, required=True, help="where the tool's model is")
    parser.add_argument("--out", type=Path, help="result file (JSON), extended in place (measure)")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    make(args) if args.action == "make" else measure(args)


if __name__ == "__main__":
    main()
