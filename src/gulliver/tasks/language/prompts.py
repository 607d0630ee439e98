"""A few requests that show what a language model is like, before and after: questions, or passages to continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gulliver.core.store.artifact import Artifact
from gulliver.runtime.text.tokenizer import Text
from gulliver.tasks.language.questions import make_questions
from gulliver.tasks.language.text import joined
from gulliver.tasks.text.files import dataset_texts

CHAT = (
    "Why is the sky blue? Answer in two sentences.",
    "A train leaves at 9:40 and takes 85 minutes. When does it arrive?",
    "Write a Python function that returns the largest of three numbers.",
)
MAX_TOKENS = 48


def prompts(dataset: Artifact, folder: Path, count: int) -> dict[str, dict[str, Any]]:
    """At most `count` requests by the text that is asked; see `Task.prompts`."""
    if Text(folder).has_chat_template:
        asked = list(CHAT[:count])
    else:
        passages = make_questions(joined(list(dataset_texts(dataset, "eval"))), 4 * max(count, 2))
        asked = [one.context for one in passages][:count]
    greedy = {"temperature": 0.0, "max_tokens": MAX_TOKENS}
    return {text: {"prompt": text, **greedy} for text in asked}
