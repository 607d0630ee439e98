"""Parts of runtime.py for what goes beyond one token at a time: prompt lookup, and reuse of shared beginnings.

Each is measured on and off, in turn, in the bare engine, on workloads that are stated here whole: one where it should
help, and one where it can only cost. Greedy answers must be the same texts either way.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from runtime_common import Rounds, in_turn, summary, text_of
from runtime_engine import BareEngine

CODE = '''\
class Account:
    """Money of one customer."""

    def __init__(self, owner: str, balance: int = 0) -> None:
        self.owner = owner
        self.balance = balance

    def deposit(self, amount: int) -> None:
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount

    def withdraw(self, amount: int) -> None:
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance -= amount
'''
QUESTIONS = (
    "Why is the sky blue?",
    "Tell me about a walk through a forest in autumn.",
    "How do I keep bread fresh?",
    "What does a lighthouse keeper do all day?",
    "Explain what a lever is.",
    "Write a short letter to a friend who moved away.",
)
RULES = (
    "You answer questions about the opening hours, the collection and the history of a town museum. "
    "Be polite, be brief, and say so when you do not know. "
)
RULE_TIMES = 16


# ---- lookup ---------------------------------------------------------------------------------------------------------
def workloads(paragraphs: list[str]) -> dict[str, list[list[dict]]]:
    """{workload: conversations}: code to edit, texts to summarise, texts to repeat, and questions without a text."""
    edits = ("Rename `balance` to `cents`", "Rename `Account` to `Wallet`", "Add a docstring to each method",
             "Add type hints for all attributes")  # fmt: skip
    told = {
        "edit code": [f"{edit} and give the whole file:\n\n```python\n{CODE}```" for edit in edits],
        "summarise": [f"Summarise this text in three sentences:\n\n{text}" for text in paragraphs[:4]],
        "repeat": [f"Repeat this text word for word:\n\n{text}" for text in paragraphs[4:8]],
        "questions": list(QUESTIONS[:4]),
    }
    return {name: [[{"role": "user", "content": text}] for text in texts] for name, texts in told.items()}


def paragraphs_of(text: str, count: int = 8) -> list[str]:
    """The first paragraphs of the text that have 600 to 1200 characters."""
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if 600 <= len(line) <= 1200][:count]
    if len(found) < count:
        raise SystemExit(f"the text has {len(found)} paragraphs of 600 to 1200 characters; {count} are needed")
    return found


def lookup(args: argparse.Namespace) -> dict:
    """Tokens per second with prompt lookup over those without, for each workload, one conversation after the other."""
    text = (args.data_folder / "wikitext-2.test.txt").read_text(encoding="utf-8")
    kinds, rows, same = workloads(paragraphs_of(text)), {}, {}
    with ExitStack() as stack:
        # Without reuse on both sides: the rounds ask the same prompts, and prefill must not vanish from one of them.
        engines = {
            "on": stack.enter_context(BareEngine(args.model, "--no-reuse", threads=args.threads)),
            "off": stack.enter_context(BareEngine(args.model, "--no-reuse", "--no-lookup", threads=args.threads)),
        }
        for kind, conversations in kinds.items():
            texts: dict[str, list[str]] = {}

            def run(which: str, conversations=conversations, texts=texts) -> float:
                found = [engines[which].ask([one], args.tokens) for one in conversations]
                texts[which] = [one["texts"][0] for one in found]
                return args.tokens * len(found) / sum(one["seconds"] for one in found)

            rounds = in_turn({which: lambda _, which=which, run=run: run(which) for which in engines}, args.rounds)
            rows[kind] = _on_over_off(rounds)
            same[kind] = sum(one == other for one, other in zip(texts["on"], texts["off"], strict=True)) / len(
                conversations
            )
    return {"workloads": rows, "same_texts": same, "tokens": args.tokens}


# ---- reuse ----------------------------------------------------------------------------------------------------------
def reuse(args: argparse.Namespace) -> dict:
    """Time to first token and tokens per second with reuse of shared beginnings over those without.

    `shared`: questions after one long system prompt, one after the other; `apart`: prompts that have nothing in common.
    """
    kinds: Mapping[str, Callable[[int], list]] = {
        "shared": after_one_system_prompt,
        "apart": lambda index: [text_of(400, 100 * index + number) for number in range(len(QUESTIONS))],
    }
    rows, firsts, lengths = {}, {}, {}
    with ExitStack() as stack:
        engines = {
            "on": stack.enter_context(BareEngine(args.model, "--no-lookup", threads=args.threads)),
            "off": stack.enter_context(BareEngine(args.model, "--no-lookup", "--no-reuse", threads=args.threads)),
        }
        for kind, prompts in kinds.items():
            waits: dict[str, list[float]] = {which: [] for which in engines}

            def run(which: str, index: int, prompts=prompts, waits=waits, kind=kind) -> float:
                found = [engines[which].ask([one], args.tokens) for one in prompts(index)]
                waits[which] += [one["first_token_seconds"][0] for one in found]
                lengths[kind] = found[0]["prompt_tokens"][0]
                return args.tokens * len(found) / sum(one["seconds"] for one in found)

            rounds = in_turn(
                {which: lambda index, which=which, run=run: run(which, index) for which in engines}, args.rounds
            )
            rows[kind] = _on_over_off(rounds)
            firsts[kind] = {which: summary(times) for which, times in waits.items()}
    return {"workloads": rows, "first_token_seconds": firsts, "prompt_tokens": lengths, "tokens": args.tokens}


def after_one_system_prompt(index: int) -> list[list[dict]]:
    """Conversations with one long system prompt, which differs from round to round: nothing is known beforehand."""
    system = {"role": "system", "content": f"This is museum number {index}. " + RULES * RULE_TIMES}
    return [[system, {"role": "user", "content": question}] for question in QUESTIONS]


def _on_over_off(rounds: Rounds) -> dict:
    row = rounds.row(["on"])
    return {"engines": row["engines"], "ratio": row["ratios"]["on"]["off"]}
