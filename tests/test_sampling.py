"""Sampling against transformers' own processors, against exact distributions, and on hostile logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import generation

from gulliver.core.errors import ConfigError
from gulliver.runtime.sampling import Sampler, Sampling, likeliest, logprobs, pick

VOCABULARY = 6000


def logits(seed: int = 0, size: int = VOCABULARY, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def expected(row: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities by transformers' processors, in their order."""
    scores, ids = torch.tensor(row)[None], torch.zeros(1, 1, dtype=torch.long)
    scores = generation.TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k:
        scores = generation.TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = generation.TopPLogitsWarper(sampling.top_p)(ids, scores)
    if sampling.min_p:
        scores = generation.MinPLogitsWarper(sampling.min_p)(ids, scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


def drawn(row: np.ndarray, sampling: Sampling, count: int = 4001) -> np.ndarray:
    """Probabilities as `pick` deals them out, by a fine comb of uniforms instead of random ones."""
    found = np.zeros(len(row))
    for uniform in (np.arange(count) + 0.5) / count:
        found[pick(row, sampling, float(uniform))] += 1
    return found / count


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_k": 5000},
        {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 2.0},
        {"min_p": 0.05},
        {"top_k": 50, "top_p": 0.8, "min_p": 0.1, "temperature": 1.5},
        {"top_p": 0.001},
        {"top_k": 900, "temperature": 5.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("spread", [0.01, 3.0, 12.0])
def test_the_distribution_is_that_of_transformers(options: dict[str, Any], spread: float) -> None:
    row, sampling = logits(spread=spread), Sampling(**options)
    right = expected(row, sampling)
    ours = drawn(row, sampling)
    assert not ours[right == 0].any()
    assert np.abs(ours - right).max() < 1.5 / 4001 + 1e-6


@given(st.integers(0, 10**6), st.floats(0.05, 3), st.integers(0, 40), st.floats(0.01, 1), st.floats(0, 1))
def test_whatever_is_picked_is_allowed(seed: int, temperature: float, top_k: int, top_p: float, uniform: float) -> None:
    row = logits(seed, 100)
    row[::3] = -np.inf
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    token = pick(row, sampling, min(uniform, np.nextafter(1, 0)))
    assert expected(row, sampling)[token] > 0


def test_extreme_uniforms_and_logits_pick_a_real_token() -> None:
    row = np.full(VOCABULARY, -np.inf, np.float32)
    row[[3, 700]] = (1e4, -1e4)
    last = float(np.nextafter(1, 0))
    for sampling in (Sampling(), Sampling(temperature=1e-9), Sampling(top_p=0.5), Sampling(top_k=2), Sampling(min_p=1)):
        assert pick(row, sampling, 0.0) == 3
        assert pick(row, sampling, last) == 3
    flat = np.zeros(VOCABULARY, np.float32)
    assert pick(flat, Sampling(), last) == VOCABULARY - 1
    assert pick(flat, Sampling(), 0.0) == 0


def test_penalties_are_those_of_transformers_and_of_openai() -> None:
    row = logits()
    prompt, answer = [1, 2, 3, 3], [5, 5, 7]
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=1.3), VOCABULARY, prompt)
    for token in answer:
        sampler.observe(token)
    processor = generation.RepetitionPenaltyLogitsProcessor(1.3)
    right = processor(torch.tensor([prompt + answer]), torch.tensor(row)[None])[0].numpy()
    assert np.allclose(sampler._penalised(row), right)
    sampler = Sampler(Sampling(presence_penalty=0.5, frequency_penalty=0.25), VOCABULARY, prompt)
    for token in answer:
        sampler.observe(token)
    right = row.copy()
    right[5] -= 0.5 + 2 * 0.25
    right[7] -= 0.5 + 0.25
    assert np.allclose(sampler._penalised(row), right)


def test_bias_mask_and_greedy() -> None:
    row = logits()
    best = int(row.argmax())
    assert Sampler(Sampling(temperature=0), VOCABULARY, []).draw(row) == best
    assert Sampler(Sampling(temperature=0, logit_bias=((17, 100.0),)), VOCABULARY, []).draw(row) == 17
    assert Sampler(Sampling(temperature=0, logit_bias=((best, -100.0),)), VOCABULARY, []).draw(row) != best
    allowed = np.zeros(VOCABULARY, bool)
    allowed[[4, 9]] = True
    for sampling in (Sampling(temperature=0), Sampling(), Sampling(top_k=3), Sampling(top_p=0.9), Sampling(min_p=0.1)):
        sampler = Sampler(sampling, VOCABULARY, [])
        assert {sampler.draw(row, allowed) for _ in range(20)} <= {4, 9}
    assert np.array_equal(row, logits()), "the caller's logits were changed"


def test_a_seed_repeats_and_different_seeds_differ() -> None:
    row = logits(spread=1.0)

    def tokens(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(seed=seed), VOCABULARY, [])
        return [sampler.draw(row) for _ in range(20)]

    assert tokens(5) == tokens(5)
    assert tokens(5) != tokens(6)
    assert tokens(None) != tokens(None)
    assert tokens(-1) == tokens(-1)


def test_logprobs_and_the_likeliest() -> None:
    rows = np.stack([logits(0), logits(1)])
    right = torch.log_softmax(torch.tensor(rows).double(), -1).numpy()
    ours = logprobs(rows)
    assert np.abs(ours - right).max() < 1e-5
    for count in (0, 1, 5, VOCABULARY, 2 * VOCABULARY):
        found = likeliest(ours[0], count)
        order = np.argsort(-ours[0], kind="stable")[:count]
        assert [token for token, _ in found] == order.tolist()
        assert [value for _, value in found] == ours[0][order].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("inf")},
        {"frequency_penalty": float("nan")},
        {"logit_bias": ((1, float("nan")),)},
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Sampling(**options)


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="token 6000"):
        Sampler(Sampling(logit_bias=((VOCABULARY, 1.0),)), VOCABULARY, [])
