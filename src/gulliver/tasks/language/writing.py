"""Text that a causal language model writes of its own: calibration data that favours no domain.

Each text begins with the model's start token (if it has one) and one token drawn uniformly from the vocabulary, which
spreads the texts over what the model knows; every further token is drawn from the model's own distribution,

    x_t ~ softmax(logits(x_<t)),    temperature 1, no cut-off

as in LLM-QAT: Data-Free Quantization Aware Training for Large Language Models, 2023, arXiv 2305.17888. An end token
ends nothing: what follows it is the next text that the model would write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gulliver.core.errors import ConfigError
from gulliver.tasks.base import Advance
from gulliver.tasks.text.tokenizer import load_tokenizer


def write_texts(
    model: nn.Module, folder: Path, count: int, tokens: int, generator: torch.Generator, advance: Advance
) -> list[str]:
    """`count` texts of `tokens` tokens each, or of as many as the model has positions for.

    `advance` is called with the share of the tokens that are written. Leaves the parameters in bfloat16. ConfigError
    for a model with fewer than two positions.
    """
    tokenizer = load_tokenizer(folder)
    config: Any = model.config
    start = start_token(config, tokenizer)
    prefix = torch.full((count, 0 if start is None else 1), start or 0)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int):
        tokens = min(tokens, limit - prefix.shape[1])
    if tokens < 1:
        raise ConfigError(f"the model has {limit} positions; writing text needs at least 2")
    known = min(int(config.vocab_size), len(tokenizer))
    first = torch.randint(known, (count, 1), generator=generator)
    for parameter in model.parameters():  # buffers keep their precision: rotary frequencies need it
        parameter.data = parameter.data.to(torch.bfloat16)
    written = continue_texts(model, prefix, first, tokens, generator, advance)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in written.tolist()]


def start_token(config: Any, tokenizer: Any) -> int | None:
    """The token that begins a text: the beginning-of-text token, else the end-of-text token, else None."""
    for name in ("bos_token_id", "eos_token_id"):
        for holder in (tokenizer, config):
            value = getattr(holder, name, None)
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int) and 0 <= value < config.vocab_size:
                return value
    return None


def continue_texts(
    model: nn.Module, prefix: Tensor, first: Tensor, tokens: int, generator: torch.Generator, advance: Advance
) -> Tensor:
    """int64 [batch, tokens]: `first` [batch, 1] and what the model draws after `prefix` [batch, 0 or 1] and it."""
    written, past, fed = [first], None, torch.cat([prefix, first], 1)
    with torch.no_grad():
        for number in range(1, tokens):
            output = model(input_ids=fed, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = output.past_key_values
            fed = torch.multinomial(torch.softmax(output.logits[:, -1].float(), -1), 1, generator=generator)
            written.append(fed)
            advance(number / tokens)
    advance(1.0)
    return torch.cat(written, 1)
