"""The same few requests answered by a model and by its parent, so that a report shows what the numbers mean."""

from __future__ import annotations

from gulliver.core.errors import GulliverError
from gulliver.core.progress import Progress
from gulliver.core.records import AnswerPair
from gulliver.core.store.artifact import Artifact
from gulliver.tasks import get_task, open_model
from gulliver.tasks.answerer import OpenOptions

PROMPTS = 3


def answer_pairs(
    parent: Artifact, model: Artifact, dataset: Artifact, max_ram_bytes: int | None, progress: Progress
) -> tuple[AnswerPair, ...]:
    """Both models' answers to PROMPTS requests of the family's own, one model open at a time.

    None for a family whose answers are no text, and where one of the two cannot answer, which is told.
    """
    asked = get_task(parent.task).prompts(dataset, parent.path, PROMPTS)
    if not asked:
        return ()
    try:
        with progress.stage("answers", total=2 * len(asked), unit="answer") as bar:
            found = []
            for one in (parent, model):
                options = OpenOptions(max_ram_bytes=max_ram_bytes, slots=1)
                with open_model(one.path, one.task, one.id[:12], options) as answerer:
                    texts = []
                    for request in asked.values():
                        texts.append("\n".join(answerer.show(answerer.answer(answerer.request_model(**request)))))
                        bar.advance()
                    found.append(texts)
    except GulliverError as failure:
        progress.print(f"answers: left out, because {failure}")
        return ()
    return tuple(AnswerPair(prompt=one, parent=old, model=new) for one, old, new in zip(asked, *found, strict=True))
