"""lm-eval's tasks on our engine: the model as the harness asks it, against plain transformers; tasks of one's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from language_samples import write_causal, write_encoder

import gulliver
from gulliver.audit.harness_model import Scorer, check_greedy
from gulliver.core.errors import ConfigError, DataError, MissingExtra
from gulliver.core.progress import Progress
from gulliver.core.store.store import Store
from gulliver.runtime.decode import open_decoder
from gulliver.runtime.text.tokenizer import Text
from gulliver.tasks import get_task

CHOICE = """
task: lanterns
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
WRITE = """
task: harbour
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "x"
generation_kwargs:
  until: ["."]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_causal(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["auto", "reference"])
def scorer(folder, request):
    decoder = open_decoder(folder, slots=1, backend=request.param)
    yield Scorer(decoder, Text(folder))
    decoder.close()


def plain(folder, text: str, first: int) -> tuple[float, bool]:
    """Log-likelihood of the bytes from `first` on, by transformers."""
    tokens = torch.tensor(list(text.encode()))
    with torch.no_grad():
        log = torch.log_softmax(get_task("language").load(folder)(input_ids=tokens[None]).logits[0], -1)
    likely = log[first - 1 : -1].gather(1, tokens[first:, None])
    return likely.sum().item(), bool((log[first - 1 : -1].argmax(1) == tokens[first:]).all())


def test_a_likelihood_is_that_of_transformers_whatever_was_asked_before(scorer, folder):
    asked = [("the giant", " sleeps"), ("the giant", " wakes up"), ("the", " giant sleeps"), ("a giant ", "x")]
    for context, answer in [*asked, *asked]:
        found, greedy = scorer.loglikelihood(context, answer)
        expected, likeliest = plain(folder, context + answer, len(context.rstrip()))
        assert found == pytest.approx(expected, rel=2e-2) and greedy == likeliest


def test_a_whole_text_counts_each_token_once(scorer, folder):
    assert scorer.rolling("the giant sleeps") == pytest.approx(plain(folder, "\0the giant sleeps", 1)[0], rel=0.2)
    long = "the giant measures every island. " * 12  # longer than the 128 positions
    assert scorer.rolling(long) < 3 * scorer.rolling(long[:128]) < 0
    assert scorer.rolling("") == 0.0


def test_a_continuation_is_greedy_and_ends_at_a_stop(scorer, folder):
    whole = scorer.continued("the giant", [], 12)
    tokens = list(b"the giant")
    model = get_task("language").load(folder)
    for _ in range(3):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    assert whole.startswith(Text(folder).decode(tokens[9:]).rstrip("\ufffd"))
    stop = whole[1:3]
    assert stop and scorer.continued("the giant", [stop], 12) == whole[: whole.index(stop)]
    assert scorer.continued("the giant " * 40, [], 4)


def test_answers_at_random_are_refused():
    check_greedy({"temperature": 0.0, "do_sample": False, "until": ["."]})
    for settings in ({"do_sample": True}, {"temperature": 0.7}):
        with pytest.raises(ConfigError, match="at random"):
            check_greedy(settings)


def test_without_the_library_the_command_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"gulliver\[eval\]"):
        gulliver.audit(folder, tasks="arc_easy", home=tmp_path / "home", progress=Progress(quiet=True))


# ---- with the library -----------------------------------------------------------------------------------------------
@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two tasks and their data."""
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    where = tmp_path / "own"
    where.mkdir()
    rows = [
        {"question": f"lantern {number} is", "choices": [" lit", " dark", " lost"], "answer": number % 3}
        for number in range(12)
    ]
    (where / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, task in (("lanterns", CHOICE), ("harbour", WRITE)):
        (where / f"{name}.yaml").write_text(task.format(data=where / "rows.jsonl"))
    return where


def test_tasks_of_ones_own_become_paired_evidence(own, folder, tmp_path):
    other = write_causal(tmp_path / "other", seed=1)
    store = Store(tmp_path / "home")
    shared = {"store": store, "progress": Progress(quiet=True)}
    found = gulliver.audit(folder, parent=other, tasks="lanterns,harbour", include_path=str(own), **shared)
    scores = {item.detail["task"]: item for item in found if item.metric == "task_score"}
    drops = {item.detail["task"]: item for item in found if item.metric == "task_score_drop"}
    assert set(scores) == set(drops) == {"lanterns", "harbour"} and scores["harbour"].value == 0
    assert scores["lanterns"].n == 12 and scores["lanterns"].detail["metric"] == "acc"
    decoder = open_decoder(folder, slots=1)
    ours = Scorer(decoder, Text(folder))
    right = 0
    for number in range(12):
        likely = [ours.loglikelihood(f"lantern {number} is", f" {word}")[0] for word in (" lit", " dark", " lost")]
        right += likely.index(max(likely)) == number % 3
    decoder.close()
    assert abs(scores["lanterns"].value - right / 12) <= 2 / 12
    assert (
        drops["lanterns"].low < drops["lanterns"].high and scores["lanterns"].data_hash != scores["harbour"].data_hash
    )
    fewer = gulliver.audit(folder, tasks=["lanterns"], limit=5, include_path=str(own), **shared)
    assert {item.n for item in fewer if item.metric == "task_score"} >= {5}


def test_what_cannot_be_scored_is_named(own, folder, tmp_path):
    shared = {"home": tmp_path / "home", "progress": Progress(quiet=True)}
    with pytest.raises(ConfigError, match="lantern"):
        gulliver.audit(folder, tasks="lantern", include_path=str(own), **shared)
    with pytest.raises((ConfigError, DataError), match="absent"):
        gulliver.audit(folder, tasks="lanterns", include_path=str(tmp_path / "absent"), **shared)
    (own / "rows.jsonl").unlink()
    with pytest.raises(DataError, match="task 'lanterns' cannot be loaded"):
        gulliver.audit(folder, tasks="lanterns", include_path=str(own), **shared)
    with pytest.raises(ConfigError, match="write no text"):
        gulliver.audit(write_encoder(tmp_path / "encoder"), tasks="lanterns", include_path=str(own), **shared)
