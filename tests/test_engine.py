"""The batching engine on a decoder without a model: exactness in company, cache, drafts, fairness, and every end."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_samples import END, VOCABULARY, Collected, FakeDecoder, answer, greedy, hashed, ids, read_text

from gulliver.core.errors import ConfigError
from gulliver.runtime.batching.engine import Engine, EngineClosed, QueueFull, Request, Sampling
from gulliver.runtime.batching.sequence import Sequence
from gulliver.runtime.sampling import Sampler
from gulliver.runtime.text.tokenizer import Text

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return read_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def make(text: Text) -> Iterator[Callable[..., tuple[Engine, FakeDecoder]]]:
    made: list[Engine] = []

    def build(lookup: bool = False, slots: int = 8, queue: int = 64, **options: Any) -> tuple[Engine, FakeDecoder]:
        decoder = FakeDecoder(**options)
        made.append(Engine(decoder, text, lookup=lookup, slots=slots, queue=queue, prompt_rows=32, lookup_rows=24))
        return made[-1], decoder

    yield build
    for engine in made:
        engine.close()
        assert engine.stats()["cache_blocks_used"] == 0, "blocks were lost"
        assert not engine._thread.is_alive()


def prompts(count: int, seed: int = 0, shortest: int = 1, longest: int = 90) -> list[list[int]]:
    choose = random.Random(seed)
    return [[choose.randrange(256) for _ in range(choose.randint(shortest, longest))] for _ in range(count)]


def spoken(pattern: str) -> Callable[[list[int]], np.ndarray]:
    """A rule that says `pattern` (bytes of UTF-8) from its beginning, by how many tokens stand after the prompt "?"."""
    data = pattern.encode()

    def rule(tokens: list[int]) -> np.ndarray:
        logits = np.zeros(VOCABULARY, np.float32)
        place = len(tokens) - 1 - tokens.index(ord("?"))
        logits[data[place] if place < len(data) else END] = 9
        return logits

    return rule


# ---- exactness ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("blocks", [200, 40])  # 40: not enough for all, some are preempted
def test_company_drafts_and_preemption_change_nothing(make: Any, shares: bool, lookup: bool, blocks: int) -> None:
    engine, decoder = make(lookup=lookup, blocks=blocks, shares=shares, memory=1 if lookup else 64)
    asked = prompts(16)
    found = engine.complete([Request(tuple(prompt), 120, GREEDY) for prompt in asked])
    for prompt, pieces in zip(asked, found, strict=True):
        assert ids(pieces) == greedy(decoder.rule, prompt, 120)
        assert pieces[-1].finish == "length" and pieces[-1].completion_tokens == 120
    numbers = engine.stats()
    assert (numbers["preemptions"] > 0) == (blocks == 40)
    assert (numbers["draft_accepted"] > 0) == lookup
    assert max(len(batch.blocks) for batch in decoder.batches) > 1


def test_a_seed_gives_the_same_tokens_alone_in_company_with_drafts_and_with_penalties(make: Any) -> None:
    def sharp(tokens: list[int]) -> np.ndarray:
        return hashed(tokens[-1:]) * 3

    sampling = Sampling(temperature=0.8, top_p=0.95, seed=11, frequency_penalty=0.3, repetition_penalty=1.05)
    prompt = tuple(prompts(1, 5)[0])
    request = Request(prompt, 120, sampling)
    alone, _ = make(rule=sharp)
    right = ids(alone.complete([request])[0])
    crowd, _ = make(rule=sharp, blocks=30)
    others = [Request(tuple(other), 100, Sampling(seed=number)) for number, other in enumerate(prompts(6))]
    assert ids(crowd.complete([*others[:3], request, *others[3:]])[3]) == right
    drafting, _ = make(rule=sharp, lookup=True)
    assert ids(drafting.complete([request])[0]) == right
    assert drafting.stats()["draft_accepted"] > 0
    assert ids(alone.complete([Request(prompt, 120, Sampling(temperature=0.8, seed=12))])[0]) != right


def test_penalties_count_the_answer_and_grammars_and_drafts_see_them(make: Any) -> None:
    sampling = Sampling(temperature=0, frequency_penalty=2.0, repetition_penalty=1.1)
    engine, decoder = make(memory=1, lookup=True)
    prompt = [1, 2, 3]
    sampler, tokens = Sampler(sampling, VOCABULARY, prompt), list(prompt)
    for _ in range(150):
        tokens.append(sampler.draw(decoder.rule(tokens)))
        sampler.observe(tokens[-1])
    assert ids(engine.complete([Request(tuple(prompt), 150, sampling)])[0]) == tokens[3:]
    assert tokens[3:] != greedy(decoder.rule, prompt, 150)


def test_drafts_shorten_what_repeats(make: Any) -> None:
    loop, _ = make(lookup=True, memory=1)
    assert len(ids(loop.complete([Request((1, 2, 3), None, GREEDY)])[0])) == loop.context - 3
    assert loop.stats()["steps"] < 150


def test_drafts_rest_where_they_keep_failing(make: Any) -> None:
    def rule(tokens: list[int]) -> np.ndarray:
        logits = hashed(tokens)  # after 7, 8 comes anything; what came there before does not tell
        if tokens[-1] == 7:
            logits[8] = 99
        elif tokens[-1] != 8:
            logits[7] = 99
        return logits

    engine, _ = make(lookup=True, rule=rule)
    assert ids(engine.complete([Request((1, 2, 7), 400, GREEDY)])[0]) == greedy(rule, [1, 2, 7], 400)
    numbers = engine.stats()
    assert 0 < numbers["draft_offered"] < 150
    assert numbers["draft_accepted"] < 0.6 * numbers["draft_offered"]


# ---- the cache ----------------------------------------------------------------------------------------------------
def test_a_beginning_is_computed_once(make: Any) -> None:
    engine, decoder = make()
    system = prompts(1, 3, 70, 70)[0]
    first, second = [*system, 1, 2, 3], [*system, 4, 5, 6]
    assert engine.complete([Request(tuple(first), 4, GREEDY)])[0][-1].cached_tokens == 0
    rows = engine.stats()["rows"]
    pieces = engine.complete([Request(tuple(second), 4, GREEDY)])[0]
    assert pieces[-1].cached_tokens == 64
    assert engine.stats()["rows"] - rows == len(second) - 64 + 3
    assert ids(pieces) == greedy(decoder.rule, second, 4)
    assert engine.stats()["cached_tokens"] == 64


def test_the_answer_of_a_chat_is_found_in_its_next_turn(make: Any) -> None:
    engine, decoder = make()
    first = prompts(1, 4, 40, 40)[0]
    said = ids(engine.complete([Request(tuple(first), 30, GREEDY)])[0])
    second = [*first, *said, 9, 9]
    pieces = engine.complete([Request(tuple(second), 4, GREEDY)])[0]
    assert pieces[-1].cached_tokens == 64
    assert ids(pieces) == greedy(decoder.rule, second, 4)


def test_several_answers_to_one_prompt_compute_it_once_even_when_they_come_together(make: Any) -> None:
    engine, decoder = make(max_rows=256)
    decoder.gate = threading.Event()
    asked = [Request(tuple(range(100)), 5, Sampling(seed=seed)) for seed in range(4)]
    collected = [Collected() for _ in asked]
    for request, one in zip(asked, collected, strict=True):
        engine.submit(request, one)
    decoder.gate.set()
    answers = [ids(one.wait()) for one in collected]
    assert len({tuple(tokens) for tokens in answers}) == 4
    assert [one.pieces[-1].cached_tokens for one in collected] == [0, 96, 96, 96]
    assert sum(len(batch.tokens) for batch in decoder.batches) < 100 + 4 * (4 + 4) + 5


def test_a_prompt_of_whole_blocks_still_computes_its_last_token(make: Any) -> None:
    engine, decoder = make()
    prompt = list(range(64))
    for cached in (0, 48):
        pieces = engine.complete([Request(tuple(prompt), 3, GREEDY)])[0]
        assert pieces[-1].cached_tokens == cached
        assert ids(pieces) == greedy(decoder.rule, prompt, 3)


def test_a_decoder_that_shares_nothing_is_asked_to_share_nothing(make: Any) -> None:
    engine, _ = make(shares=False)
    for _ in range(2):
        assert engine.complete([Request(tuple(range(80)), 3, GREEDY)])[0][-1].cached_tokens == 0


def test_sequences_that_fill_the_whole_cache_come_to_their_end(make: Any) -> None:
    engine, decoder = make(blocks=8, positions=1000)
    assert engine.context == 128
    asked = [tuple([number]) for number in range(3)]
    found = engine.complete([Request(prompt, None, GREEDY) for prompt in asked])
    for prompt, pieces in zip(asked, found, strict=True):
        assert ids(pieces) == greedy(decoder.rule, list(prompt), 127)
    assert engine.stats()["preemptions"] > 0


# ---- fairness -----------------------------------------------------------------------------------------------------
def test_a_long_prompt_stalls_neither_a_running_answer_nor_a_short_prompt(make: Any) -> None:
    engine, decoder = make(blocks=400, positions=4000)
    running, long, short = Collected(), Collected(), Collected()
    decoder.gate = threading.Event()
    ticket = engine.submit(Request((1,), None, GREEDY), running)
    decoder.gate.set()
    assert running.first.wait(5)
    decoder.gate.clear()
    engine.submit(Request(tuple(prompts(1, 1, 1000, 1000)[0]), 2, GREEDY), long)
    engine.submit(Request((5, 6, 7), 2, GREEDY), short)
    decoder.gate.set()
    for one in (long, short):
        one.wait()
    ticket.cancel()
    running.wait()
    assert short.times[-1] < long.times[0]
    busy = [batch for batch in decoder.batches if len(batch.blocks) > 1]
    assert max(len(batch.tokens) for batch in busy) <= 32 + 8  # prompt rows, and the rows of those being continued
    steps_of_long = [batch for batch in decoder.batches if len(batch.tokens) > 8]
    assert all(np.count_nonzero(np.bincount(batch.sequences) == 1) >= 1 for batch in steps_of_long)


def test_a_stream_of_short_prompts_does_not_starve_a_long_one(make: Any) -> None:
    engine, decoder = make(blocks=400, positions=2000, slots=8)
    decoder.gate = threading.Event()
    long = Collected()
    engine.submit(Request(tuple(prompts(1, 1, 600, 600)[0]), 1, GREEDY), long)
    shorts = [Collected() for _ in range(60)]
    for number, one in enumerate(shorts):
        engine.submit(Request(tuple([number + 1] * 30), 1, GREEDY), one)
    decoder.gate.set()
    long.wait()
    left = sum(not one.ended.is_set() for one in shorts)
    for one in shorts:
        one.wait()
    assert left > 10


def test_of_prompts_that_wait_the_shortest_is_next_after_the_oldest(make: Any) -> None:
    engine, decoder = make(blocks=400, positions=2000, max_rows=64)
    decoder.gate = threading.Event()
    collected = [Collected() for _ in range(4)]
    for number, (one, length) in enumerate(zip(collected, (640, 300, 120, 20), strict=True)):
        engine.submit(Request((number + 1,) * length, 1, GREEDY), one)
    decoder.gate.set()
    for one in collected:
        one.wait()
    assert sorted(range(4), key=lambda number: collected[number].times[-1]) == [3, 2, 1, 0]


# ---- ends ---------------------------------------------------------------------------------------------------------
def test_the_end_token_a_stop_token_and_the_limit(make: Any) -> None:
    engine, _ = make(rule=spoken("hello"))
    pieces = engine.complete([Request((ord("?"),), 50, GREEDY)])[0]
    assert answer(pieces) == "hello" and pieces[-1].finish == "stop" and pieces[-1].completion_tokens == 6
    assert END not in ids(pieces)
    pieces = engine.complete([Request((ord("?"),), 3, GREEDY)])[0]
    assert answer(pieces) == "hel" and pieces[-1].finish == "length"
    pieces = engine.complete([Request((ord("?"),), 50, GREEDY, stop_tokens=(ord("l"),))])[0]
    assert answer(pieces) == "he" and pieces[-1].finish == "stop"
    pieces = engine.complete([Request((ord("?"),), 9, GREEDY, ignore_end=True)])[0]
    assert pieces[-1].finish == "length" and pieces[-1].completion_tokens == 9


@pytest.mark.parametrize(
    ("stop", "said", "finish"),
    [
        (("lo w",), "hel", "stop"),
        (("world!",), "hello world", "stop"),
        (("x", "o", "ello"), "h", "stop"),
        (("hello",), "", "stop"),
        (("lo wx",), "hello world", "stop"),
    ],
)
def test_a_stop_text_across_tokens_is_never_shown(make: Any, stop: Any, said: str, finish: str) -> None:
    engine, _ = make(rule=spoken("hello world"))
    collected = Collected()
    engine.submit(Request((ord("?"),), 50, GREEDY, stop=stop), collected)
    pieces = collected.wait()
    assert answer(pieces) == said and pieces[-1].finish == finish
    assert bytes(ids(pieces)).decode() == said


def test_what_a_stop_held_back_comes_at_the_limit(make: Any) -> None:
    engine, _ = make(rule=spoken("hello world"))
    pieces = engine.complete([Request((ord("?"),), 5, GREEDY, stop=("low",))])[0]
    assert answer(pieces) == "hello" and pieces[-1].finish == "length" and len(ids(pieces)) == 5


def test_characters_come_whole_or_not_at_all(make: Any) -> None:
    engine, _ = make(rule=spoken("naïve 🦣!"))
    pieces = engine.complete([Request((ord("?"),), 50, GREEDY)])[0]
    assert [piece.text for piece in pieces if piece.text] == list("naïve 🦣!")
    cut = engine.complete([Request((ord("?"),), 9, GREEDY)])[0]
    assert answer(cut) == "naïve " and len(ids(cut)) == 9


def test_cancelled_while_running_and_while_waiting(make: Any) -> None:
    engine, decoder = make(slots=1)
    decoder.gate = threading.Event()
    running, waiting, after = Collected(), Collected(), Collected()
    first = engine.submit(Request((1,), None, GREEDY), running)
    second = engine.submit(Request((2,), 5, GREEDY), waiting)
    engine.submit(Request((3,), 5, GREEDY), after)
    second.cancel()
    decoder.gate.set()
    assert waiting.wait()[-1].finish == "cancelled"
    first.cancel()
    assert running.wait()[-1].finish == "cancelled"
    assert ids(after.wait()) == greedy(decoder.rule, [3], 5)
    first.cancel()


def test_leaving_a_stream_early_cancels_it(make: Any) -> None:
    engine, decoder = make()
    decoder.delay_seconds = 0.002
    for _ in engine.stream(Request((1,), None, GREEDY)):
        break
    deadline = time.monotonic() + 5
    while engine.stats()["requests_running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats()["finished_cancelled"] == 1


def test_a_request_that_takes_too_long_ends_with_what_it_has(make: Any) -> None:
    engine, decoder = make(slots=1)
    decoder.delay_seconds = 0.01
    running, waiting = Collected(), Collected()
    engine.submit(Request((1,), None, GREEDY, timeout_seconds=1), running)
    engine.submit(Request((1,), None, GREEDY, timeout_seconds=0.05), waiting)
    assert running.wait()[-1].finish == "timeout" and len(ids(running.pieces)) >= 1
    assert waiting.wait()[-1].finish == "timeout" and not ids(waiting.pieces)


def test_a_full_queue_says_when_to_come_back(make: Any) -> None:
    engine, decoder = make(slots=1, queue=2)
    decoder.gate = threading.Event()
    collected = [Collected() for _ in range(3)]
    engine.submit(Request((1,), 2, GREEDY), collected[0])
    while not engine.stats()["requests_running"]:
        time.sleep(0.001)
    for one in collected[1:]:
        engine.submit(Request((1,), 2, GREEDY), one)
    with pytest.raises(QueueFull, match="2 requests") as caught:
        engine.submit(Request((1,), 2, GREEDY), Collected())
    assert caught.value.retry_after_seconds >= 1
    decoder.gate.set()
    for one in collected:
        assert one.wait()[-1].finish == "length"
    assert engine.stats()["rejected"] == 1


def test_complete_takes_more_than_the_queue_holds(make: Any) -> None:
    engine, decoder = make(slots=1, queue=2)
    decoder.gate = threading.Event()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(engine.complete([Request((1,), 2, GREEDY)] * 20)))
    thread.start()
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline:
        assert engine.stats()["requests_waiting"] <= 2
    decoder.gate.set()
    thread.join(10)
    assert [ids(pieces) for pieces in found] == [greedy(decoder.rule, [1], 2)] * 20


def test_drain_lets_the_running_end_and_takes_no_new(make: Any) -> None:
    engine, decoder = make(slots=1)
    decoder.delay_seconds = 0.002
    collected = [Collected(), Collected()]
    for one in collected:
        engine.submit(Request((1,), 20, GREEDY), one)
    assert engine.drain(5)
    assert all(one.pieces[-1].finish == "length" for one in collected)
    with pytest.raises(EngineClosed):
        engine.submit(Request((1,), 20, GREEDY), Collected())


def test_drain_cancels_what_does_not_end(make: Any) -> None:
    engine, decoder = make()
    decoder.delay_seconds = 0.01
    collected = Collected()
    engine.submit(Request((1,), None, GREEDY), collected)
    assert not engine.drain(0.05)
    assert collected.wait()[-1].finish == "cancelled"


def test_close_ends_everything(make: Any) -> None:
    engine, decoder = make(slots=1)
    decoder.delay_seconds = 0.01
    collected = [Collected(), Collected()]
    for one in collected:
        engine.submit(Request((1,), None, GREEDY), one)
    engine.close()
    assert all(one.wait()[-1].finish == "cancelled" for one in collected)
    assert decoder.closed


# ---- what goes wrong ----------------------------------------------------------------------------------------------
def test_logits_that_are_not_finite_end_their_request_alone(make: Any) -> None:
    def rule(tokens: list[int]) -> np.ndarray:
        logits = hashed(tokens)
        if tokens[0] == 66 and len(tokens) > 4:
            logits[100] = np.nan if tokens[1] == 1 else np.inf
        return logits

    engine, _ = make(rule=rule)
    asked = [(66, 1), (66, 2), (7, 8)]
    nan, infinite, good = engine.complete([Request(prompt, 10, GREEDY) for prompt in asked])
    for pieces in (nan, infinite):
        assert len(ids(pieces)) == 3
        assert (pieces[-1].finish or "").startswith("error: ") and "gulliver verify" in (pieces[-1].finish or "")
    assert ids(good) == greedy(rule, [7, 8], 10)


def test_a_failed_step_ends_the_running_and_the_engine_lives_on(make: Any, caplog: Any) -> None:
    engine, decoder = make()
    prompt = tuple(range(40))
    engine.complete([Request(prompt, 3, GREEDY)])
    decoder.fail_next = RuntimeError("no memory")
    pieces = engine.complete([Request(prompt, 3, GREEDY)])[0]
    assert pieces[-1].finish == "error: no memory"
    pieces = engine.complete([Request(prompt, 3, GREEDY)])[0]
    assert pieces[-1].cached_tokens == 0, "blocks in doubt were used again"
    assert ids(pieces) == greedy(decoder.rule, list(prompt), 3)
    assert engine.stats()["finished_error"] == 1


def test_a_deliver_that_raises_cancels_its_request_alone(make: Any, caplog: Any) -> None:
    engine, decoder = make()

    def broken(piece: Any) -> None:
        raise OSError("gone")

    good = Collected()
    engine.submit(Request((1,), None, GREEDY), broken)
    engine.submit(Request((2,), 20, GREEDY), good)
    assert ids(good.wait()) == greedy(decoder.rule, [2], 20)
    while engine.stats()["requests_running"]:
        time.sleep(0.001)
    assert engine.stats()["finished_cancelled"] == 1


def test_requests_that_cannot_be_answered_are_refused_at_once(make: Any) -> None:
    engine, _ = make(positions=100)
    with pytest.raises(ConfigError, match="60 tokens and max_tokens of 41 do not fit the context of 100"):
        engine.submit(Request((1,) * 60, 41), Collected())
    with pytest.raises(ConfigError, match="context of 100"):
        engine.submit(Request((1,) * 100), Collected())
    with pytest.raises(ConfigError, match="token 257"):
        engine.submit(Request((1, 257), 1), Collected())
    with pytest.raises(ConfigError, match="token -1"):
        engine.submit(Request((1, -1), 1), Collected())
    with pytest.raises(ConfigError, match="token 999"):
        engine.submit(Request((1,), 1, Sampling(logit_bias=((999, 1.0),))), Collected())
    for options in ({"prompt": ()}, {"max_tokens": 0}, {"top_logprobs": -1}, {"timeout_seconds": 0}, {"stop": ("",)}):
        with pytest.raises(ConfigError):
            Request(**({"prompt": (1,), "max_tokens": 3} | options))
    assert len(ids(engine.complete([Request((1,) * 60, 40, GREEDY)])[0])) == 40


# ---- logprobs and numbers -----------------------------------------------------------------------------------------
def right_logprobs(row: np.ndarray) -> np.ndarray:
    wide = row.astype(np.float64)
    return wide - np.log(np.exp(wide - wide.max()).sum()) - wide.max()


def test_logprobs_are_the_models_own(make: Any) -> None:
    engine, decoder = make(lookup=True, memory=1)
    request = Request((3, 4), 30, Sampling(temperature=0.5, seed=3, frequency_penalty=1.0), top_logprobs=3)
    choices = [choice for piece in engine.complete([request])[0] for choice in piece.tokens]
    tokens = [3, 4]
    for choice in choices:
        right = right_logprobs(decoder.rule(tokens))
        assert choice.logprob == pytest.approx(right[choice.id], abs=1e-4)
        assert [token for token, _ in choice.top] == np.argsort(-right)[:3].tolist()
        tokens.append(choice.id)
    assert all(choice.logprob is None for piece in engine.complete([Request((3,), 3)])[0] for choice in piece.tokens)


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("length", [1, 2, 100])
def test_the_prompts_logprobs_can_be_asked_for(make: Any, max_tokens: int, length: int) -> None:
    engine, decoder = make(blocks=20, max_rows=48)
    prompt = prompts(1, 2, length, length)[0]
    engine.complete([Request(tuple(prompt), 1, GREEDY)])  # what is cached has no logits, so it must not be used
    request = Request(tuple(prompt), max_tokens, GREEDY, top_logprobs=2, echo_logprobs=True)
    pieces = engine.complete([request])[0]
    echoed = [choice for piece in pieces for choice in piece.prompt]
    assert [choice.id for choice in echoed] == prompt
    assert echoed[0].logprob is None
    for place, choice in enumerate(echoed[1:], 1):
        right = right_logprobs(decoder.rule(prompt[:place]))
        assert choice.logprob == pytest.approx(right[choice.id], abs=1e-4)
        assert [token for token, _ in choice.top] == np.argsort(-right)[:2].tolist()
    assert ids(pieces) == greedy(decoder.rule, prompt, max_tokens)
    assert pieces[-1].finish == "length"


def test_prompt_rows_that_are_computed_again_are_not_told_again(text: Text) -> None:
    request = Request((1, 2, 3), 1, GREEDY, echo_logprobs=True)
    sequence = Sequence(request, Collected(), text, VOCABULARY, 4, lambda: None)
    rows = np.stack([hashed([number]) for number in range(3)])
    for stop in (1, 2, 3):  # given back after each, and computed from the beginning
        sequence.echo_rows(0, rows[:stop])
    assert [choice.id for choice in sequence.echoed] == [1, 2, 3]
    assert sequence.echoed[2].logprob == pytest.approx(right_logprobs(rows[1])[3], abs=1e-4)


def test_the_numbers_add_up(make: Any) -> None:
    engine, _ = make(lookup=True, memory=1)
    engine.complete([Request(tuple(prompt), 20, GREEDY) for prompt in prompts(10)])
    numbers, histograms = engine.stats(), engine.histograms()
    assert numbers["requests"] == numbers["finished_length"] == 10
    assert numbers["completion_tokens"] == 200
    assert numbers["prompt_tokens"] == sum(map(len, prompts(10)))
    assert numbers["requests_running"] == numbers["requests_waiting"] == numbers["cache_blocks_used"] == 0
    assert sum(histograms["first_token_seconds"].counts) == sum(histograms["request_seconds"].counts) == 10
    assert sum(histograms["between_tokens_seconds"].counts) == 190
    assert sum(histograms["rows_per_step"].counts) == numbers["steps"]
    assert histograms["rows_per_step"].total == numbers["rows"]


def test_a_grammar_holds_with_drafts_and_in_company(make: Any) -> None:
    engine, _ = make(lookup=True, memory=1)
    grammar = engine.grammars.json_schema({"type": "string", "pattern": "^(ab|cd){6}$"})
    found = engine.complete([Request((seed,), 40, Sampling(seed=seed), grammar=grammar) for seed in range(5)])
    for pieces in found:
        word = json.loads(answer(pieces))
        assert set(zip(word[::2], word[1::2], strict=True)) <= {("a", "b"), ("c", "d")}
        assert len(word) == 12 and pieces[-1].finish == "stop"
    assert len({answer(pieces) for pieces in found}) > 1
    free = Request((1,), 40, Sampling(seed=1))
    assert len(ids(engine.complete([free])[0])) == 40


def test_many_clients_at_once_some_of_whom_leave(make: Any) -> None:
    engine, decoder = make(lookup=True, blocks=48, queue=1000, memory=1)
    choose = random.Random(0)
    asked = prompts(120, 9)
    collected = [Collected() for _ in asked]

    def client(numbers: range) -> None:
        for number in numbers:
            ticket = engine.submit(Request(tuple(asked[number]), 30, GREEDY), collected[number])
            if number % 10 == 3:
                time.sleep(choose.random() / 100)
                ticket.cancel()

    threads = [threading.Thread(target=client, args=(range(start, 120, 4),)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (prompt, one) in enumerate(zip(asked, collected, strict=True)):
        said, right = ids(one.wait()), greedy(decoder.rule, prompt, 30)
        assert said == right[: len(said)]
        assert one.pieces[-1].finish == "length" or number % 10 == 3


def test_the_text_folder_is_needed_for_nothing_else(tmp_path: Path) -> None:
    text = read_text(tmp_path / "text")
    engine = Engine(FakeDecoder(), text, "name")
    assert engine.name == "name" and engine.text is text and engine.context == 512
    engine.close()


def test_what_one_owner_asked_is_found_by_that_owner_alone(make: Any) -> None:
    (engine, _), prompt = make(), tuple(range(64))

    def cached(owner: str) -> int:
        return engine.complete([Request(prompt, max_tokens=2, owner=owner)])[0][-1].cached_tokens

    assert [cached(owner) for owner in ("ann", "bob", "ann", "bob", "", "")] == [0, 0, 48, 48, 0, 48]


def test_owners_that_come_together_share_nothing(make: Any) -> None:
    (engine, _), prompt = make(), tuple(range(64))
    answers = engine.complete(
        [Request(prompt, 4, Sampling(temperature=0), owner=owner) for owner in ("ann", "bob", "ann")]
    )
    assert len({tuple(ids(pieces)) for pieces in answers}) == 1
    assert sorted(pieces[-1].cached_tokens for pieces in answers) == [0, 0, 48]


@pytest.mark.parametrize("error", [RuntimeError("ours"), SystemExit(3), BaseException("a panic")])
def test_a_failure_that_no_request_can_be_blamed_for_ends_them_and_the_thread_begins_anew(
    make: Any, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = make()
    monkeypatch.setattr(engine._stepper, "sweep", lambda: (_ for _ in ()).throw(error))
    finish = engine.complete([Request((1, 2), max_tokens=4)])[0][-1].finish
    assert finish is not None and finish.startswith("error: the engine failed")
    assert engine.complete([Request((1, 2), max_tokens=4)])[0][-1].finish == "length"
    stats = engine.stats()
    assert engine.alive and (stats["restarts"], stats["finished_error"], stats["requests_running"]) == (1, 1, 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_waits_for_a_thread_that_has_died_is_told(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make()

    def fail(*given: Any) -> None:
        raise SystemExit(1)  # which a thread ends by without a word

    monkeypatch.setattr(engine._stepper, "sweep", fail)
    monkeypatch.setattr(engine._stepper, "lose", fail)
    with pytest.raises(EngineClosed, match="lost its thread"):
        list(engine.stream(Request((1, 2), max_tokens=4)))
    assert not engine.alive
    with pytest.raises(EngineClosed, match="lost its thread"):
        engine.stream(Request((1, 2), max_tokens=4))


def test_a_deliver_that_raises_past_exception_ends_its_request_alone(make: Any) -> None:
    (engine, _), others = make(), Collected()

    def deliver(piece: Any) -> None:
        raise BaseException("a panic")

    engine.submit(Request((1, 2), max_tokens=20), deliver)
    engine.submit(Request((1, 2), max_tokens=20), others)
    assert others.wait()[-1].finish == "length" and engine.stats()["restarts"] == 0
