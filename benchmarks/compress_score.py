#!/usr/bin/env python3
"""Perplexity of a Hugging Face folder by transformers alone, as one JSON object: an independent check of our evidence.

    python benchmarks/compress_score.py MODEL_DIR --text wikitext-2.test.txt 24 --text tinyshakespeare.txt 12

The first windows of 1024 tokens of each text, as peers_llama_cpp.py does with the peers. "products" is the type in
which matrices were multiplied: bfloat16 where the CPU has it, float32 elsewhere.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from peers_common import perplexity, windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", nargs=2, action="append", required=True, metavar=("FILE", "WINDOWS"))
    args = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    from gulliver.nets.precision import has_bfloat16

    found: dict = {"products": "bfloat16" if has_bfloat16() else "float32"}
    for name, count in args.text:
        found[Path(name).stem] = {
            **perplexity(model, windows(tokenizer, Path(name), int(count))),
            "windows": int(count),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
