#!/usr/bin/env python3
"""Size and perplexity of one model in llama.cpp's formats: the peers for the table "beats at equal bytes".

    python benchmarks/peers_llama_cpp.py --bin LLAMA_BIN --model HF_DIR --calibration wikitext-2.valid.txt \
        --text wikitext-2.test.txt --work SCRATCH --out benchmarks/results/peers.json [--only NAME …]

LLAMA_BIN is a folder with llama-quantize and llama-imatrix, and SCRATCH holds `model-bf16.gguf`, which llama.cpp's own
convert_hf_to_gguf.py makes from HF_DIR (`--outtype bf16`). Needs numpy, torch, transformers and llama.cpp's own gguf
package (PYTHONPATH=llama.cpp/gguf-py: a released one may lack new types); not Gulliver.

For each row of VARIANTS: llama-quantize makes the file with an importance matrix, collected once from --calibration
(llama-imatrix has no name for a tied head, so the embedding gets none); `size_bytes` is what the file takes on disk,
`tensor_bytes` what its tensors take. llama-quantize then writes the same file out as F32 (dequantizing with its own
code), those weights are put into the Hugging Face model, and its perplexity is computed in torch, in the way of the
plain measurement that every claim of ours uses: the first `--windows` windows of 1024 tokens, consecutive, no overlap,
every token but a window's first is scored, no token is inserted. All peers so run in one engine, and
quality alone differs between them. `perplexity_second_half` scores only the later half of each window: this is what
llama-perplexity prints, to compare the two engines (`--check NAME`).

Rows already in --out are kept, so the run may be stopped and started again at any time.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from peers_common import CONTEXT, Book, circumstances, perplexity, windows

IMATRIX_CHUNKS = 200
IMATRIX_CONTEXT = 512


@dataclass(frozen=True)
class Variant:
    """One file: llama-quantize's `type`, the embedding's type (which is also the head) and types for other tensors."""

    type: str
    embedding: str | None = None
    tensors: tuple[tuple[str, str], ...] = ()
    pure: bool = False

    @property
    def name(self) -> str:
        parts = [self.type + (" pure" if self.pure else "")]
        parts += [f"embedding {self.embedding}"] if self.embedding else []
        return ", ".join(parts + [f"{pattern} {kind}" for pattern, kind in self.tensors])

    @property
    def options(self) -> list[str]:
        out = ["--pure"] if self.pure else []
        out += ["--token-embedding-type", self.embedding] if self.embedding else []
        for pattern, kind in self.tensors:
            out += ["--tensor-type", f"{pattern}={kind}"]
        return out


# SmolLM2's rows of 576 are no multiple of 256, so K- and I-quants fall back there to types with blocks of 32 (IQ4_NL,
# Q5_0, Q8_0 …): only ffn_down has the type that the name says. Files below 80 MB need a smaller embedding, too.
VARIANTS = (
    Variant("Q4_K_M"),
    Variant("IQ4_XS"),
    Variant("IQ4_NL", "iq4_nl"),
    Variant("IQ4_XS", "q5_0"),
    Variant("Q5_K_M"),
    Variant("IQ2_M", "iq4_nl"),
    Variant("Q4_0"),
    Variant("Q3_K_S"),
    Variant("IQ3_S", "iq4_nl"),
    Variant("IQ4_XS", "q5_1"),
    Variant("Q4_K_M", "q5_1"),
    Variant("IQ2_M"),
    Variant("Q5_K_M", "q5_1"),
    Variant("Q2_0"),
    Variant("IQ2_M", "iq4_nl", tensors=((r"blk\.[0-9]\.ffn_(gate|up)", "q2_0"),)),
    Variant("IQ2_XXS", "iq4_nl"),
    Variant("Q4_K_S", "q5_1"),
    Variant("IQ3_S", "iq4_nl", tensors=(("ffn_(gate|up)", "mxfp4"),)),
    Variant("Q4_1"),
    Variant("Q4_K_S"),
    Variant("Q5_0", "q5_1"),
    Variant("Q3_K_M", "q5_1"),
    Variant("Q4_0", "q4_0"),
    Variant("Q3_K_L"),
    Variant("Q5_K_S"),
    Variant("Q5_1"),
    Variant("Q8_0"),
)


def main() -> None:
    args = _arguments()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = windows(tokenizer, args.text, args.windows)
    book, header = Book(args.out), _header(args)
    source, imatrix = args.work / "model-bf16.gguf", args.work / "imatrix.gguf"
    if not imatrix.exists():
        run(
            [args.bin / "llama-imatrix", "-m", source, "-f", args.calibration, "-o", imatrix, "--process-output"],
            {"--chunks": IMATRIX_CHUNKS, "-c": IMATRIX_CONTEXT, "-b": IMATRIX_CONTEXT, "-t": args.threads},
        )
    if not book.parent:
        book.set_parent(perplexity(model, ids))
    for variant in VARIANTS:
        wanted = not args.only or variant.name in args.only
        if wanted and not book.has("llama.cpp", variant.name):
            row, path = measured(args, variant, model, ids, source, imatrix)
            if variant.name in args.check:
                row["llama_perplexity"] = own_perplexity(args, path)
            path.unlink()
            book.add({**header, **row})
            print(json.dumps(row), flush=True)


def measured(args, variant: Variant, model, ids, source: Path, imatrix: Path) -> tuple[dict, Path]:
    """A row of the result and the quantized file."""
    path, dense = args.work / "candidate.gguf", args.work / "candidate-f32.gguf"
    threads = str(args.threads)
    start = time.monotonic()
    run([args.bin / "llama-quantize", "--imatrix", imatrix, *variant.options, source, path, variant.type, threads])
    seconds = time.monotonic() - start
    run([args.bin / "llama-quantize", "--allow-requantize", path, dense, "F32", threads])
    tensor_bytes, types = contents(path)
    fill(model, dense)
    dense.unlink()
    row = {
        "type": variant.name,
        "size_bytes": path.stat().st_size,
        "tensor_bytes": tensor_bytes,
        "tensor_types": types,
        "quantize_wall_s": round(seconds, 1),
        **perplexity(model, ids),
    }
    return row, path


def fill(model, path: Path) -> None:
    """Put the F32 weights of a GGUF file of llama architecture into the Hugging Face model, in place."""
    import torch
    from gguf import GGUFReader

    config, state = model.config, model.state_dict()
    left = {name for name in state if name != "lm_head.weight" or not config.tie_word_embeddings}
    for tensor in GGUFReader(str(path)).tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        name = hf_name(tensor.name)
        value = torch.from_numpy(tensor.data.copy()).reshape(state[name].shape)
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp interleaves the two halves of each head
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            value = value.view(heads, -1, 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
        state[name].copy_(value)
        left.discard(name)
    assert not left, f"{path} lacks {sorted(left)[:3]}"


def hf_name(name: str) -> str:
    """token_embd.weight -> model.embed_tokens.weight, and so on."""
    fixed = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in fixed:
        return fixed[name]
    inner = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    _, layer, module, suffix = name.split(".")
    return f"model.layers.{layer}.{inner[module]}.{suffix}"


def contents(path: Path) -> tuple[int, dict[str, int]]:
    """Bytes of all tensors, and weights by tensor type."""
    from gguf import GGUFReader

    total, types = 0, {}
    for tensor in GGUFReader(str(path)).tensors:
        total += int(tensor.n_bytes)
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return total, types


def own_perplexity(args: argparse.Namespace, path: Path) -> float:
    """What llama-perplexity prints for the same windows: compare with `perplexity_second_half`."""
    log = run(
        [args.bin / "llama-perplexity", "-m", path, "-f", args.text],
        {"-c": CONTEXT, "-b": CONTEXT, "--chunks": args.windows, "-t": args.threads},
    )
    found = re.search(r"Final estimate: PPL = ([\d.]+)", log)
    assert found, f"llama-perplexity printed no estimate: {log[-500:]}"
    return float(found.group(1))


def run(command: list[object], options: Mapping[str, object] = MappingProxyType({})) -> str:
    """Output of a command; ends the program with the end of that output when it fails."""
    words = [str(word) for word in [*command, *(word for pair in options.items() for word in pair)]]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit {done.returncode}\n{done.stdout[-2000:]}")
    return done.stdout


def _header(args: argparse.Namespace) -> dict:
    how = (
        f"llama-quantize with an importance matrix ({IMATRIX_CHUNKS} x {IMATRIX_CONTEXT} tokens of "
        f"{args.calibration.name}; none for the tied embedding, which llama-imatrix cannot name); dequantized by "
        f"llama-quantize, scored in torch on the first {args.windows} x {CONTEXT} tokens of {args.text.name}"
    )
    return {
        "engine": "llama.cpp",
        "version": args.llama_version,
        "how": how,
        **circumstances(args.threads),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, required=True, help="folder with llama-quantize and llama-imatrix")
    parser.add_argument("--model", type=Path, required=True, help="the parent, a Hugging Face folder")
    parser.add_argument("--calibration", type=Path, required=True, help="text for the importance matrix")
    parser.add_argument("--text", type=Path, required=True, help="text to score")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder that holds model-bf16.gguf")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON), extended in place")
    parser.add_argument("--llama-version", default="unknown", help="what to write down as the version of llama.cpp")
    parser.add_argument("--only", nargs="*", default=[], help="names of variants to run (default: all)")
    parser.add_argument("--check", nargs="*", default=[], help="variants to run through llama-perplexity, too")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
