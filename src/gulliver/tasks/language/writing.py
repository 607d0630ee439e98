"""Text that a causal language model writes of its own: data that favours no domain.

What a model writes must look like what it reads, or calibration on it does harm: a text that begins with a token drawn
from the whole vocabulary is mostly junk. So texts begin as texts do:

    odd numbers    with one of the natural beginnings beside this file (thirty languages, code, many styles), which the
                   model continues freely
    even numbers   where the model has a chat template: at its head, where a user would begin to write, so that the
                   model writes the question and then the answer (Magpie: Alignment Data Synthesis from Scratch by
                   Prompting Aligned LLMs with Nothing, 2024, arXiv 2406.08464); every second of these with the first
                   words of a beginning. Without a chat template these continue beginnings too

Tokens are drawn at temperature 1 from the likeliest that have NUCLEUS of the probability. Texts that are short,
repetitive, unreadable or a mixture of scripts are named so, and left to the caller to drop. Text number k is a pure
function of (model, seed, k): natively of these alone, by the reference path up to how torch rounds with others beside
it. Many texts are written at a time; models that run natively are written with in 8 bits.
"""

from __future__ import annotations

import json
import time
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import cache, partial
from pathlib import Path
from types import TracebackType

import numpy as np

from gulliver.core import memory
from gulliver.core.errors import ConfigError
from gulliver.core.store.files import temporary_name
from gulliver.runtime.batching.engine import Engine, Request, Sampling
from gulliver.runtime.batching.records import Piece, check_finish
from gulliver.runtime.decode import native_reason, open_decoder
from gulliver.runtime.eight_bits import write_in_eight_bits
from gulliver.runtime.lower import NotLowered, read_config
from gulliver.runtime.packing import is_packed
from gulliver.runtime.reference_cache import Lockstep
from gulliver.runtime.reference_decode import ReferenceDecoder
from gulliver.runtime.text.tokenizer import Text
from gulliver.tasks.base import Advance, Written
from gulliver.tasks.language.lockstep import Row, write_in_step

BEGINNINGS = Path(__file__).with_name("beginnings.jsonl")
NUCLEUS = 0.95
SLOTS = 64
"""Texts that are written at once."""
TOLD_EVERY_S = 1.0
MARK = "\N{OBJECT REPLACEMENT CHARACTER}gulliver\N{OBJECT REPLACEMENT CHARACTER}"
"""A message by which the head of a chat template is found: what is rendered before it."""
MOST_HEAD = 199
"""Most characters of a template's head; a longer one would be a passage that training and judging share."""
FEWEST_TOKENS = 24
RUN, MOST_REPEATED = 6, 0.25
"""Runs of so many tokens; a text is repetitive when this share of its runs occurred before in it."""
MOST_UNREADABLE, MIXED = 0.02, 0.05
"""Share of characters that no person reads; share of letters from which on a script counts."""
EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "FULLWIDTH", "IDEOGRAPHIC")


class Author:
    """Writes texts with the model in a folder; a context manager.

    `work` is scratch for a copy in 8 bits, which a killed run finds again. ConfigError for a model with too few
    positions, or one whose texts cannot be written within `max_ram_bytes`.
    """

    def __init__(self, folder: Path, tokens: int, seed: int, work: Path, max_ram_bytes: int | None = None) -> None:
        self._folder, self._tokens, self._seed, self._work = folder, tokens, seed, work
        self._max_ram_bytes = max_ram_bytes

    def __enter__(self) -> Author:
        folder = self._folder
        if runs_natively(folder) and not is_packed(folder):
            folder = self._work / "eight-bits"
            if not folder.is_dir():
                unfinished = temporary_name(folder)
                unfinished.mkdir(parents=True)
                write_in_eight_bits(self._folder, unfinished)
                unfinished.rename(folder)
                memory.give_back_freed_memory(at_once=False)
        decoder = open_decoder(folder, slots=SLOTS, max_ram_bytes=self._max_ram_bytes)
        if decoder.positions < FEWEST_TOKENS:
            decoder.close()
            raise ConfigError(
                f"the model has {decoder.positions} positions; writing text needs at least {FEWEST_TOKENS}"
            )
        self._tokens = min(self._tokens, decoder.positions)
        self._engine = Engine(decoder, Text(self._folder), slots=SLOTS, lookup=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engine.close()

    def write(self, numbers: Sequence[int], advance: Advance = lambda share: None) -> list[Written]:
        """Texts number `numbers`, in that order; `advance` gets the share of their tokens that is there."""
        decoder = self._engine.decoder
        if isinstance(decoder, ReferenceDecoder):
            assert decoder.reader is not None
            step = Lockstep(decoder.reader)
            if step.works:
                return self._in_step(step, numbers, advance)
        lengths = dict.fromkeys(numbers, 0)
        pool = ThreadPoolExecutor(SLOTS)
        try:
            texts = [pool.submit(self._written, number, lengths) for number in numbers]
            left: Collection[Future[Written]] = texts
            while left:
                done, left = wait(left, TOLD_EVERY_S, FIRST_EXCEPTION)
                for text in done:
                    text.result()
                advance(sum(lengths.values()) / (len(lengths) * self._tokens))
            return [text.result() for text in texts]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an interrupt, closing the engine ends what runs

    def _in_step(self, step: Lockstep, numbers: Sequence[int], advance: Advance) -> list[Written]:
        rows, told = [self._row(number) for number in numbers], 0.0
        for start in range(0, len(rows), SLOTS):
            some = rows[start : start + SLOTS]
            for share in write_in_step(step, some, self._tokens, self._engine.text.end_tokens):
                if time.monotonic() - told > TOLD_EVERY_S:
                    told = time.monotonic()
                    advance((start + share * len(some)) / len(rows))
        advance(1.0)
        return [self._judged(number, row.tokens) for number, row in zip(numbers, rows, strict=True)]

    def _row(self, number: int) -> Row:
        text = self._engine.text
        follows = partial(self._turn, text=text) if self._is_chat(number, text) else None
        return Row(self._prompt(number, text), self._sampling(number, 0), follows, self._sampling(number, 1))

    def _judged(self, number: int, tokens: list[int]) -> Written:
        text = self._engine.text
        told = text.tokenizer.decode(tokens, skip_special_tokens=not self._is_chat(number, text))
        return Written({"text": told}, fault_of(told, tokens))

    def _written(self, number: int, lengths: dict[int, int]) -> Written:
        """Text number `number`; `lengths` counts its tokens so far, and as many as there may be when it is done."""
        text, prompt = self._engine.text, self._prompt(number, self._engine.text)
        pieces = self._pieces(prompt, number, 0, lengths)
        tokens, last = prompt + _tokens(pieces), pieces[-1]
        if self._is_chat(number, text) and last.finish == "stop" and last.completion_tokens > 1:
            glue = self._turn(tokens, text)
            if glue is not None:
                turn = [*tokens, *glue]
                tokens = turn + _tokens(self._pieces(turn, number, 1, lengths))
        lengths[number] = self._tokens
        return self._judged(number, tokens)

    def _pieces(self, prompt: list[int], number: int, turn: int, lengths: dict[int, int]) -> list[Piece]:
        lengths[number], pieces = len(prompt), []
        for piece in self._engine.stream(self._request(prompt, number, turn)):
            pieces.append(piece)
            lengths[number] += len(piece.tokens)
        return pieces

    # ---- how texts begin ----
    def _is_chat(self, number: int, text: Text) -> bool:
        return number % 2 == 0 and chat_head(text) is not None

    def _prompt(self, number: int, text: Text) -> list[int]:
        rows = beginnings()
        head = chat_head(text)
        place = number if head is None else number // 2  # chat: only odd numbers continue a whole one
        beginning = rows[(place + self._seed) % len(rows)]
        if head is None or number % 2:
            return text.encode(beginning)[: self._tokens // 2] or text.encode("The")
        words = " ".join(beginning.split()[:3]) if number % 4 == 2 else ""
        return text.encode(head[0] + words, special=False)[: self._tokens // 2]

    def _request(self, prompt: list[int], number: int, turn: int) -> Request:
        left = max(1, self._tokens - len(prompt))
        return Request(tuple(prompt), max_tokens=left, sampling=self._sampling(number, turn))

    def _sampling(self, number: int, turn: int) -> Sampling:
        seed = int(np.random.default_rng([self._seed, number, turn]).integers(2**63))
        return Sampling(top_p=NUCLEUS, seed=seed)

    def _turn(self, tokens: Sequence[int], text: Text) -> list[int] | None:
        """What the template puts between a question as written and the answer; None where no answer fits."""
        head = chat_head(text)
        assert head is not None
        glue = text.encode(head[1], special=False)
        return glue if len(tokens) + len(glue) + FEWEST_TOKENS < self._tokens else None


def runs_natively(folder: Path) -> bool:
    """Whether the native engine runs the plain model in a folder."""
    try:
        read_config(folder)
    except NotLowered:
        return False
    return native_reason() is None


def _tokens(pieces: Sequence[Piece]) -> list[int]:
    check_finish(pieces[-1].finish)
    return [token.id for piece in pieces for token in piece.tokens]


@cache
def beginnings() -> tuple[str, ...]:
    """The natural beginnings, any prefix of which is balanced over languages, styles and code."""
    with BEGINNINGS.open(encoding="utf-8") as lines:
        return tuple(json.loads(line)["text"] for line in lines)


def chat_head(text: Text) -> tuple[str, str] | None:
    """What a chat template writes before a user's first message, and between it and the answer; None without one, or

    where the head is a long system prompt.
    """
    if not text.has_chat_template:
        return None
    try:
        whole = text.template.render([{"role": "user", "content": MARK}], add_generation_prompt=True)
    except ConfigError:
        return None
    head, found, glue = whole.partition(MARK)
    return (head, glue) if found and 0 < len(head) <= MOST_HEAD and glue else None


# ---- which texts are fit -------------------------------------------------------------------------------------------
def fault_of(text: str, tokens: Sequence[int]) -> str:
    """Why nothing should be calibrated on a text: "short", "repetitive", "unreadable", "mixed scripts"; "" if fit."""
    if len(tokens) < FEWEST_TOKENS or not text.strip():
        return "short"
    runs = [tuple(tokens[at : at + RUN]) for at in range(len(tokens) - RUN + 1)]
    if len(set(runs)) < (1 - MOST_REPEATED) * len(runs):
        return "repetitive"
    odd = sum(unicodedata.category(one) in ("Cn", "Co", "Cs", "Cc") or one == "\N{REPLACEMENT CHARACTER}"
              for one in text if one not in "\n\t\r")  # fmt: skip
    if odd > MOST_UNREADABLE * len(text):
        return "unreadable"
    scripts = Counter(script_of(one) for one in text if one.isalpha())
    total = scripts.total()
    others = [name for name, count in scripts.items() if name != "LATIN" and count > MIXED * total]
    return "mixed scripts" if len(others) > 1 else ""


@cache
def script_of(letter: str) -> str:
    """The script of a letter, as the first word of its Unicode name; one for those that East Asian texts mix."""
    first = unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]
    return "EAST ASIAN" if first in EAST_ASIAN else first
