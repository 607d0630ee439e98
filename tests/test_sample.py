"""The step `sample`: what a model writes of its own is its own, the same every time, and fit to calibrate with."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from language_samples import CAUSAL, write_causal, write_encoder
from language_samples import SMALL as SMALL_NETWORK
from toy_language import write_model

from gulliver.core.errors import ConfigError, DataError
from gulliver.core.progress import Progress
from gulliver.core.records import EXAMPLES, Sources
from gulliver.core.store.artifact import Artifact, verify
from gulliver.core.store.store import Store
from gulliver.data.options import SampleOptions
from gulliver.pipeline.call import call
from gulliver.runtime.eight_bits import write_in_eight_bits
from gulliver.runtime.reference import read_tensors
from gulliver.runtime.reference_cache import Lockstep, Reader
from gulliver.tasks import get_task
from gulliver.tasks.base import Written
from gulliver.tasks.language import writing
from gulliver.tasks.text.tokenizer import load_tokenizer

TASK = get_task("language")
SMALL = {"count": 5, "held_out": 2, "family": {"tokens": 40}, "batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def write(store: Store, folder: Path, quiet: Progress, seed: int = 0, **options: Any) -> Artifact:
    model = call("pull", {"source": str(folder)}, {}, store=store, progress=quiet)
    return call("sample", SMALL | options, {"model": model}, store=store, progress=quiet, seed=seed)


def rows(dataset: Artifact) -> list[dict[str, str]]:
    return pyarrow.parquet.read_table(dataset.file(EXAMPLES)).to_pylist()


def test_a_model_writes_a_dataset(store: Store, quiet: Progress, folder: Path) -> None:
    made = write(store, folder, quiet)
    verify(made)
    assert (made.kind, made.task, made.step["name"]) == ("dataset", "language", "sample")
    assert store.get(made.parents[0]).kind == "model" and len(made.parents) == 1
    every = TASK.chosen(SMALL["family"]).model_dump()
    assert made.manifest["config"] == {**SMALL, "family": every} and every["tokens"] == 40
    found = rows(made)
    assert len(found) == 7 and len({row["text"] for row in found}) == 7 and {row["source"] for row in found} == {"own"}
    assert [row["split"] for row in found].count("eval") == 2
    sources = Sources.of(made)
    assert (sources.train.examples, sources.eval.examples) == (5, 2)
    assert sources.writing is not None and sources.writing.drawn >= 7
    assert sources.writing.drawn - sum(sources.writing.dropped.values()) >= 7
    assert all(shown in [row["text"] for row in found] for shown in sources.writing.shown)
    judged = [row["text"] for row in found if row["split"] == "eval"]
    assert [row["text"] for row in TASK.rows(made.path, "eval")] == judged


def test_texts_begin_as_texts_do(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a chat template every text goes on from one of the natural beginnings, whatever the batch."""
    with writing.Author(folder, 64, 0, tmp_path) as author:
        monkeypatch.setattr(writing, "TOLD_EVERY_S", 1e-4)
        shares: list[float] = []
        together = author.write(range(6), shares.append)
        assert shares == sorted(shares) and shares[-1] == 1 and any(0 < share < 1 for share in shares)
        alone = author.write([4])
    assert alone == together[4:5]
    for number, example in enumerate(together):
        beginning = writing.beginnings()[number]
        assert example.row["text"].startswith(beginning[:8]), (number, example)


def test_the_beginnings_are_of_many_kinds_from_the_first() -> None:
    """Any prefix is spread over scripts and over code."""
    first = writing.beginnings()[:32]
    scripts = {writing.script_of(letter) for text in first for letter in text if letter.isalpha()}
    assert {"LATIN", "EAST ASIAN", "CYRILLIC", "ARABIC", "DEVANAGARI"} <= scripts
    assert sum("import" in text or "def " in text or "class " in text for text in first) >= 2
    assert len(set(writing.beginnings())) == len(writing.beginnings()) >= 200


def test_a_model_with_a_chat_template_writes_questions_and_answers(folder: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat"
    shutil.copytree(folder, chat)
    (chat / "chat_template.jinja").write_text(
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    text = writing.Text(chat)
    assert writing.chat_head(text) == ("<|user|>", "<|end|><|assistant|>")
    assert writing.chat_head(writing.Text(folder)) is None
    with writing.Author(chat, 64, 0, tmp_path / "work") as author:
        written = author.write(range(4))
    assert [example.row["text"].startswith("<|user|>") for example in written] == [True, False, True, False]


@pytest.mark.parametrize(
    "template",
    [
        "a long system prompt " * 10 + "{{ messages[0].content }}<|end|>",
        "no message at all",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content }}",
    ],
)
def test_a_chat_template_without_a_head_is_not_used(folder: Path, tmp_path: Path, template: str) -> None:
    shutil.copytree(folder, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    assert writing.chat_head(writing.Text(tmp_path / "chat")) is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("The committee met on Tuesday and decided to postpone the vote until the report is complete.", ""),
        ("def area(width, height):\n    return width * height\n\nprint(area(3, 4))  # twelve", ""),
        ("会议于周二举行，委员会决定推迟投票，直到 GPU 报告完成为止，届时再作讨论。", ""),
        ("東京は今日も晴れです。カフェでコーヒーを飲みながら本を読みました。", ""),
        ("too short", "short"),
        ("again and again " * 20, "repetitive"),
        (
            "The \ufffd\ufffd\ufffd report \ufffd of the \ufffd committee \ufffd was read aloud on Tuesday.",
            "unreadable",
        ),
        ("Хорошо работает 会议决定推迟投票 والآن نعود إلى البيت the end of all of it is near", "mixed scripts"),
    ],
)
def test_what_is_dropped(text: str, fault: str) -> None:
    tokens = [ord(letter) for letter in text] if len(text) > 12 else [1, 2]
    assert writing.fault_of(text, tokens) == fault


def test_a_text_never_exceeds_the_models_positions(folder: Path, tmp_path: Path) -> None:
    """The toy model has 256 positions."""
    with writing.Author(folder, 10_000, 0, tmp_path) as author:
        (example,) = author.write([1])
    assert len(load_tokenizer(folder)(example.row["text"])["input_ids"]) <= 257


@pytest.mark.parametrize("name", CAUSAL)
def test_every_network_writes(name: str, tmp_path: Path) -> None:
    """Those that the native engine does not run are written with by the reference path."""
    folder = write_causal(tmp_path / "model", name)
    with writing.Author(folder, 48, 3, tmp_path / "work") as author:
        assert len(author.write([0, 1])) == 2


UNLIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "keys and values": CAUSAL["gpt2"],
    "convolutions beside them": ("lfm2", SMALL_NETWORK | {"layer_types": ["conv", "full_attention"]}),
    "states": ("mamba2", SMALL_NETWORK | {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}),
}


@pytest.mark.parametrize(("kind", "cached"), [*((kind, True) for kind in UNLIKE), ("keys and values", False)])
def test_many_texts_in_step_are_those_written_one_by_one(
    kind: str, cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of any kind, and none; prompts of unlike lengths, questions with answers, texts that end early."""
    monkeypatch.setitem(CAUSAL, kind, UNLIKE[kind])
    chat = write_causal(tmp_path / "model", kind)
    (chat / "chat_template.jinja").write_text(
        "{% for message in messages %}A:{{ message.content }}B{% endfor %}{% if add_generation_prompt %}C:{% endif %}"
    )
    if not cached:
        monkeypatch.setattr(Reader, "cache_of", lambda self, found: None)
    shares: list[float] = []
    monkeypatch.setattr(writing, "TOLD_EVERY_S", 0.0)
    with writing.Author(chat, 64, 3, tmp_path / "work") as author:
        author._engine.text.end_tokens = frozenset(range(10, 20))  # a network of random weights ends seldom
        monkeypatch.setattr(writing, "SLOTS", 4)
        together = author.write(range(6), shares.append)
        monkeypatch.setattr(Lockstep, "_agrees", lambda self, texts: False)
        assert author.write(range(6)) == together
    assert shares == sorted(shares) and 0 < shares[0] < shares[-1] == 1
    assert len({example.row["text"] for example in together}) == 6


def test_eight_bits_are_close_and_hold_every_companion(folder: Path, tmp_path: Path) -> None:
    """No weight is further away than half a step of its group's 256 values."""
    write_in_eight_bits(folder, tmp_path)
    packed = dict(read_tensors(tmp_path))
    for name, weight in read_tensors(folder):
        if weight.dim() == 2:
            spread = weight.max() - weight.min()
            assert (packed[name] - weight).abs().max() <= 0.6 * spread / 255, name
        else:
            assert torch.allclose(packed[name], weight)
    assert (tmp_path / "tokenizer.json").is_file() and (tmp_path / "config.json").is_file()


def test_the_same_seed_writes_the_same_and_another_does_not(tmp_path: Path, quiet: Progress, folder: Path) -> None:
    first, second = (write(Store(tmp_path / name), folder, quiet) for name in ("here", "there"))
    assert first.id == second.id
    other = write(Store(tmp_path / "here"), folder, quiet, seed=1)
    assert not {row["text"] for row in rows(other)} & {row["text"] for row in rows(first)}


def test_it_can_be_calibrated_on(store: Store, quiet: Progress, folder: Path) -> None:
    made = write(store, folder, quiet)
    batch = next(TASK.batches(made, "train", 2, 0, 0, folder=folder, options=TASK.chosen({"tokens": 32})))
    assert batch["tokens"].shape == (2, 32)
    assert torch.isfinite(TASK.loss(TASK.load(folder), batch)).all()


def test_a_killed_run_goes_on_with_the_next_batch(
    tmp_path: Path, store: Store, quiet: Progress, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write(Store(tmp_path / "uninterrupted"), folder, quiet)
    asked: list[int] = []
    real = writing.Author.write

    def killed_at_the_second(self: Any, numbers: Any, advance: Any) -> Any:
        asked.append(numbers[0])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(self, numbers, advance)

    monkeypatch.setattr(writing.Author, "write", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        write(store, folder, quiet)
    assert len(list((store.home / "work").glob("*/batch-*.json"))) == 1
    assert write(store, folder, quiet).id == whole.id
    assert asked[:3] == [0, 4, 4]  # finished batches were not written again
    assert not list((store.home / "work").glob("*/batch-*.json"))


def test_progress_counts_what_is_written(store: Store, quiet: Progress, folder: Path) -> None:
    bars, stage = [], quiet.stage

    @contextlib.contextmanager
    def watched(*asked: Any, **more: Any) -> Iterator[Any]:
        with stage(*asked, **more) as bar:
            bars.append(bar)
            yield bar

    quiet.stage = watched  # type: ignore[method-assign]
    write(store, folder, quiet)
    assert [(bar.name, bar.done, bar.total) for bar in bars if bar.name == "sample"] == [("sample", 7, 7)]


# ---- what is refused ----------------------------------------------------------------------------------------------
def test_faulty_texts_are_dropped_and_more_are_drawn(
    store: Store, quiet: Progress, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(self: Any, numbers: Any, advance: Any) -> list[Written]:
        return [Written({"text": f"text {number}"}, "repetitive" if number % 2 else "") for number in numbers]

    monkeypatch.setattr(writing.Author, "write", half)
    made = write(store, folder, quiet)
    assert [row["text"] for row in rows(made)] == [f"text {number}" for number in range(0, 14, 2)]
    written = Sources.of(made).writing
    assert written is not None and (written.drawn, written.dropped) == (14, {"repetitive": 7})

    monkeypatch.setattr(
        writing.Author, "write", lambda self, numbers, advance: [Written({"text": ""}, "short")] * len(numbers)
    )
    with pytest.raises(DataError, match=r"0 are fit to calibrate on \(24 short\)"):
        write(store, folder, quiet, seed=1)


def test_too_few_positions_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8}))
    with pytest.raises(ConfigError, match="8 positions"), writing.Author(tmp_path / "short", 64, 0, tmp_path / "work"):
        raise AssertionError("it must not open")


def test_other_families_and_encoders_are_refused(store: Store, quiet: Progress, tmp_path: Path) -> None:
    vision = get_task("vision")
    vision.save(vision.build(1), tmp_path / "vision")
    with pytest.raises(ConfigError, match="vision models write no data of their own"):
        write(store, tmp_path / "vision", quiet, family={})
    with pytest.raises(ConfigError, match="encoder models write no data of their own"):
        write(store, write_encoder(tmp_path / "encoder"), quiet)


@pytest.mark.parametrize("options", [{"count": 0}, {"batch_size": 0}, {"temperature": 1}])
def test_wrong_options_are_refused(store: Store, quiet: Progress, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        call("sample", options, {}, store=store, progress=quiet)


def test_wrong_options_of_the_family_are_refused(store: Store, quiet: Progress, folder: Path) -> None:
    for options in ({"tokens": 1}, {"temperature": 1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            write(store, folder, quiet, family=options)


def test_the_default_is_what_calibration_was_tried_with() -> None:
    assert SampleOptions().model_dump() == {
        "count": 96,
        "held_out": 16,
        "family": {},
        "batch_size": 64,
        "max_ram_bytes": None,
    }
    assert TASK.chosen().tokens == 512
