"""Standard pieces of work for measuring speed: reading a prompt and continuing it. By the reference path."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

PROMPT_TOKENS = 512
NEW_TOKENS = 24


def causal_workloads(model: nn.Module) -> dict[str, Callable[[], int]]:
    """Metric -> function that does the work once and returns how many tokens it was."""
    config = model.config
    limit = int(getattr(config, "max_position_embeddings", PROMPT_TOKENS + NEW_TOKENS))  # type: ignore[arg-type]
    prompt = max(1, min(PROMPT_TOKENS, limit - NEW_TOKENS - 1))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(int(config.vocab_size), (1, prompt), generator=generator)  # type: ignore[union-attr, arg-type]

    def prefill() -> int:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        return prompt

    state: dict[str, object] = {}

    def decode() -> int:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            past, token = state.get("past"), tokens[:, :1]
            if past is None:
                past = model(input_ids=tokens[:, : min(64, prompt)], use_cache=True, logits_to_keep=1).past_key_values
                state["past"] = past
            for _ in range(NEW_TOKENS):
                output = model(input_ids=token, past_key_values=past, use_cache=True, logits_to_keep=1)
                past, token = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            past.crop(-NEW_TOKENS)  # type: ignore[attr-defined]
        return NEW_TOKENS

    return {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}
