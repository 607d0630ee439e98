"""From the bodies of requests to what engines take: sampling, limits of length, logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gulliver.runtime.batching.records import Request
from gulliver.runtime.sampling import Sampling
from gulliver.serve.errors import bad_request
from gulliver.serve.openai.request_schemas import GenerationFields
from gulliver.serve.state import ServedModel

LARGEST_SEED = 2**63 - 1
SMALLEST_TEMPERATURE = 1e-3  # below it the likeliest token is taken: dividing logits by less may overflow
SMALLEST_TOP_P = 1e-9  # what top_p = 0, which OpenAI allows, means: the likeliest token alone


def engine_request(body: GenerationFields, prompt: Sequence[int], model: ServedModel) -> Request:
    """What chats and completions state alike. ApiError for a bias on a token that does not exist."""
    return Request(
        prompt=tuple(prompt),
        sampling=_sampling(body, model.engine.decoder.vocabulary),
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_tokens=tuple(body.stop_token_ids or ()),
        ignore_end=bool(body.ignore_eos),
    )


def fitted(prompt: Sequence[int], max_tokens: int | None, model: ServedModel, param: str) -> int | None:
    """`max_tokens`, at most what the context leaves. ApiError when the prompt leaves room for no token at all."""
    context = model.engine.context
    room = context - len(prompt)
    if room < (0 if max_tokens == 0 else 1):
        raise bad_request(
            f"the prompt has {len(prompt)} tokens; with its answer it must fit the context of {context}; shorten it",
            param,
            "context_length_exceeded",
        )
    return None if max_tokens is None else min(max_tokens, room)


def _sampling(body: GenerationFields, vocabulary: int) -> Sampling:
    biases = []
    for token, bias in (body.logit_bias or {}).items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10 and int(token) < vocabulary):
            message = f"logit_bias names token {token[:32]!r}; ids go from 0 to {vocabulary - 1}"
            raise bad_request(message, "logit_bias")
        biases.append((int(token), float(bias)))
    temperature = _or(body.temperature, 1.0)
    return Sampling(
        temperature=temperature if temperature >= SMALLEST_TEMPERATURE else 0.0,
        top_k=max(0, body.top_k or 0),
        top_p=max(_or(body.top_p, 1.0), SMALLEST_TOP_P),
        min_p=_or(body.min_p, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        logit_bias=tuple(biases),
        seed=None if body.seed is None else body.seed & LARGEST_SEED,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def repeated(requests: Sequence[Request], times: int) -> list[Request]:
    """Each request `times` times, one after the other, each with a random stream of its own."""
    found = []
    for request in requests:
        seed = request.sampling.seed
        for turn in range(times):
            changed = seed if seed is None or turn == 0 else (seed + turn) & LARGEST_SEED
            found.append(replace(request, sampling=replace(request.sampling, seed=changed)) if turn else request)
    return found


def rows_of(given: str | Sequence[str] | Sequence[int] | Sequence[list[int]], param: str) -> list[Any]:
    """The texts, or lists of tokens, of a field that may hold one or several. ApiError for an empty list."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise bad_request(f"{param} is an empty list; give at least one text or token", param)
    return list(given)
