"""Questions made of held-out text: the same for a seed, in any script, answered as a plain computation answers them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from language_samples import text, write_causal, write_dataset

from gulliver.core.evidence.evidence import METRICS
from gulliver.tasks import get_task
from gulliver.tasks.language.question_scores import QuestionSheet
from gulliver.tasks.language.questions import CHOICES, LEAST, digest, make_questions
from gulliver.tasks.text.tokenizer import load_tokenizer

ENGLISH = text(900, 3)
CHINESE = "".join(
    f"第{number}天，我们从{number * 7}号门出发，走过长长的石桥，看见许多小船在河上慢慢地漂。" for number in range(300)
)
THAI = "".join(f"วันที่{number}เราเดินข้ามสะพานยาวและเห็นเรือเล็กมากมายลอยอยู่ในแม่น้ำอย่างช้าๆ" for number in range(300))
CODE = "\n".join(f"def area_{number}(width, height):\n    return width * height + {number}\n" for number in range(400))
CRLF = ENGLISH.replace("\n", "\r\n")


@pytest.mark.parametrize(
    "whole", [ENGLISH, CHINESE, THAI, CODE, CRLF], ids=["english", "chinese", "thai", "code", "crlf"]
)
def test_every_script_gives_questions_about_the_text(whole):
    found = make_questions(whole, 40)
    assert len(found) >= 30 and {one.kind for one in found} == {"cloze", "choice"}
    for one in found:
        assert one.context + one.answers[0] in whole and one.context == one.context.rstrip() and one.answers[0].strip()
        if one.kind == "cloze":
            assert len(one.answers) == 1 and one.answers[0].strip().replace("'", "").isalpha()
            continue
        assert len({answer.strip().casefold() for answer in one.answers}) == CHOICES == len(one.answers)
        assert all(answer.strip() in whole for answer in one.answers)
        assert max(map(len, one.answers)) < 90


def test_questions_are_a_function_of_text_count_and_seed():
    assert make_questions(ENGLISH, 40, 1) == make_questions(ENGLISH, 40, 1) != make_questions(ENGLISH, 40, 2)
    assert digest(make_questions(ENGLISH, 40, 1)) != digest(make_questions(ENGLISH, 40, 2))
    places = [ENGLISH.index(one.context) for one in make_questions(ENGLISH, 40) if one.kind == "cloze"]
    assert all(later > earlier for earlier, later in pairwise(places))


def test_a_text_too_short_or_all_the_same_asks_nothing():
    assert make_questions("", 40) == make_questions("a short text", 40) == make_questions(ENGLISH, 0) == []
    assert make_questions("12345 67890\n" * 500, 40) == []
    assert all(one.kind == "cloze" for one in make_questions("the same line again. " * 2000, 40))
    assert len(make_questions(ENGLISH[:2400], 40)) in (0, *range(LEAST, 40))


class Plain:
    """Outputs as a table would give them: one row of logits for each position, computed whole."""

    def __init__(self, model, batches):
        self.logits = [model(input_ids=batch).logits.detach() for batch in batches]

    def log_probabilities(self, number, rows, positions):
        yield 0, torch.log_softmax(self.logits[number][rows, positions], -1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_causal(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


def test_marks_are_those_of_a_computation_one_answer_at_a_time(folder):
    model, tokenizer = get_task("language").load(folder), load_tokenizer(folder)
    questions = make_questions(ENGLISH, 20)
    sheet = QuestionSheet(questions, tokenizer, 512)
    assert sheet.questions == questions
    with torch.no_grad():
        marks = sheet.marks(Plain(model, sheet.batches), 0)
        for question, mark in zip(questions, marks, strict=True):
            scores, greedy = [], []
            for answer in question.answers:
                context, whole = (
                    tokenizer(question.context)["input_ids"],
                    tokenizer(question.context + answer)["input_ids"],
                )
                log = torch.log_softmax(model(input_ids=torch.tensor([whole])).logits[0], -1)
                targets = range(len(context), len(whole))
                scores.append(sum(log[at - 1, whole[at]].item() for at in targets) / len(answer.encode()))
                greedy.append(all(log[at - 1].argmax().item() == whole[at] for at in targets))
            right = greedy[0] if question.kind == "cloze" else scores[0] == max(scores)
            assert mark == right


class Constant:
    """The same logits everywhere: every answer is as likely per token as any other; or all are NaN."""

    def __init__(self, value):
        self.value = value

    def log_probabilities(self, number, rows, positions):
        yield 0, torch.full((len(rows), 257), self.value)


@pytest.mark.parametrize("value", [-math.log(257), math.nan])
def test_ties_and_nan_are_wrong(folder, value):
    tokenizer = load_tokenizer(folder)  # a token is a byte, so that every answer is as likely per byte
    sheet = QuestionSheet(make_questions(ENGLISH, 20), tokenizer, 512)
    assert not any(sheet.marks(Constant(value), 0))


def test_a_model_that_knows_the_text_answers_all_of_it(folder):
    sheet = QuestionSheet(make_questions(ENGLISH, 20), load_tokenizer(folder), 512)

    class Knows:
        def log_probabilities(self, number, rows, positions):
            targets = sheet.batches[number][rows, positions + 1]
            first = torch.tensor([sheet.rows[number][row].answer == 0 for row in rows.tolist()])
            log = torch.full((len(rows), 257), -9.0)
            log[torch.arange(len(rows)), targets] = torch.where(first, -0.001, -5.0)
            yield 0, log

    assert all(sheet.marks(Knows(), 0))
    rows = {item.metric: item for item in sheet.evidence([True] * 20, [True] * 20, {"data_hash": "d", "detail": {}})}
    assert rows["cloze_accuracy"].value == rows["choice_accuracy"].value == 1 and rows["choice_accuracy"].low < 0.8
    assert rows["baseline_choice_accuracy"].value == 1 / CHOICES and rows["cloze_accuracy"].n == 12
    drop = rows["choice_accuracy_drop"]
    assert drop.value == 0 and drop.low < 0 < drop.high


def test_a_short_context_keeps_what_is_next_to_the_answer(folder):
    tokenizer, questions = load_tokenizer(folder), make_questions(ENGLISH, 20)
    sheet = QuestionSheet(questions, tokenizer, 64)
    assert 0 < len(sheet.questions) <= 20 and all(batch.shape[1] <= 64 for batch in sheet.batches)
    assert QuestionSheet(questions, tokenizer, 4).questions == []


def test_the_score_of_a_model_has_them_paired_and_hashed(folder, tmp_path):
    dataset = write_dataset(tmp_path / "data", [text(100, 1)], [ENGLISH])
    task = get_task("language")
    options = task.chosen({"windows": 2, "context": 64, "questions": 30})
    rows = {
        e.metric: e for e in task.score(task.load(folder), dataset, task.load(folder), folder=folder, options=options)
    }
    assert rows["cloze_accuracy_drop"].value == rows["choice_accuracy_drop"].value == 0
    assert rows["cloze_accuracy"].n + rows["choice_accuracy"].n == 30
    assert len(rows["choice_accuracy"].detail["questions_sha256"]) == 64
    assert METRICS["choice_accuracy"].direction == "higher" and METRICS["choice_accuracy_drop"].direction == "lower"
    streamed = task.score(task.load(folder, empty=True), dataset, folder=folder, options=options)
    assert {e.metric: e.value for e in streamed}["choice_accuracy"] == rows["choice_accuracy"].value
    none = task.score(
        task.load(folder), dataset, folder=folder, options=task.chosen({"windows": 2, "context": 64, "questions": 0})
    )
    assert not [e for e in none if "choice" in e.metric]
