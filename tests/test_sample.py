"""The step `sample`: what a model writes of its own is its own, the same every time, and fit to calibrate with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from language_samples import CAUSAL, write_causal, write_encoder
from toy_language import DOES, WHAT, WHO, write_model

from gulliver.core.errors import ConfigError, DataError
from gulliver.core.progress import Progress
from gulliver.core.records import EXAMPLES, Sources
from gulliver.core.store.artifact import Artifact, verify
from gulliver.core.store.store import Store
from gulliver.data.options import SampleOptions
from gulliver.pipeline.call import call
from gulliver.tasks import get_task
from gulliver.tasks.language import task, writing
from gulliver.tasks.language.task import LanguageTask
from gulliver.tasks.text.tokenizer import load_tokenizer

TASK = get_task("language")
SMALL = {"count": 5, "family": {"tokens": 40}, "batch_size": 2}


def silent(share: float) -> None:
    """Progress that is not shown."""


def generate(model: Any, folder: Path, count: int, tokens: int, seed: int = 0, **more: Any) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    options = TASK.chosen({"tokens": tokens})
    return TASK.generate(model, count, folder=folder, options=options, generator=generator, **more)


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
    assert len(found) == 5 and len({row["text"] for row in found}) == 5
    assert {(row["split"], row["source"]) for row in found} == {("train", "own")}
    sources = json.loads(made.file(Sources.file).read_text())
    assert sources == {"train": {"examples": 5, "files": {}}, "eval": {"examples": 0, "files": {}}}
    kept = [{name: value for name, value in row.items() if name != "split"} for row in found]
    assert list(TASK.rows(made.path, "train")) == kept


def test_the_texts_are_in_the_models_own_words(folder: Path) -> None:
    """The toy model learned a grammar, but no start token and not every byte: begin with a token that it knows."""
    tokenizer = load_tokenizer(folder)
    first = torch.full((4, 1), tokenizer(" the")["input_ids"][0])
    drawn = writing.continue_texts(TASK.load(folder), first[:, :0], first, 60, torch.Generator().manual_seed(0), silent)
    assert drawn.shape == (4, 60) and len(set(map(tuple, drawn.tolist()))) == 4
    known = set(" ".join((*WHO, *DOES, *WHAT)).split())
    words = " ".join(tokenizer.decode(row) for row in drawn).replace(".", " ").replace(",", " ").split()
    assert sum(word in known for word in words) > 0.8 * len(words)


def test_first_tokens_are_spread_over_the_vocabulary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def only_begin(model: Any, prefix: torch.Tensor, first: torch.Tensor, *rest: Any) -> torch.Tensor:
        assert prefix.tolist() == [[0]] * len(first)
        seen.append(first)
        return first

    monkeypatch.setattr(writing, "continue_texts", only_begin)
    generate(TASK.load(folder), folder, 2000, 8)
    counts = torch.bincount(seen[0][:, 0], minlength=320)
    assert len(counts) == 320 and (counts > 0).float().mean() > 0.98 and counts.max() < 25


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
    real = LanguageTask._generate

    def killed_at_the_third(self: Any, model: Any, count: int, *rest: Any) -> list[dict[str, Any]]:
        asked.append(count)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(self, model, count, *rest)

    monkeypatch.setattr(LanguageTask, "_generate", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        write(store, folder, quiet)
    assert len(list((store.home / "work").glob("*/batch-*.json"))) == 2
    assert write(store, folder, quiet).id == whole.id
    assert asked == [2, 2, 1, 1]  # finished batches were not written again
    assert not list((store.home / "work").glob("*/batch-*.json"))


def test_progress_counts_every_example(store: Store, quiet: Progress, folder: Path) -> None:
    bars, stage = [], quiet.stage

    @contextlib.contextmanager
    def watched(*asked: Any, **more: Any) -> Iterator[Any]:
        with stage(*asked, **more) as bar:
            bars.append(bar)
            yield bar

    quiet.stage = watched  # type: ignore[method-assign]
    write(store, folder, quiet)
    assert [(bar.name, bar.done, bar.total) for bar in bars if bar.name == "sample"] == [("sample", 5, 5)]


def test_a_text_never_exceeds_the_models_positions(folder: Path) -> None:
    """The toy model has 256 positions, one of them for the start token."""
    shares: list[float] = []
    model = TASK.load(folder)
    generate(model, folder, 1, 10_000, advance=shares.append)
    assert len(shares) == 255 and shares == sorted(set(shares)) and shares[-1] == 1
    model.config.max_position_embeddings = 1
    with pytest.raises(ConfigError, match="1 positions"):
        generate(model, folder, 1, 8)


@pytest.mark.parametrize("name", CAUSAL)
def test_writing_with_a_cache_equals_writing_without(name: str, tmp_path: Path) -> None:
    folder = write_causal(tmp_path, name)
    model, tokenizer = TASK.load(folder), load_tokenizer(folder)
    start = writing.start_token(model.config, tokenizer)
    assert start == 256
    prefix, first = torch.full((3, 1), start), torch.tensor([[7], [65], [200]])
    found = writing.continue_texts(model, prefix, first, 14, torch.Generator().manual_seed(3), silent)
    slow, generator = torch.cat([prefix, first], 1), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _ in range(13):
            last = model(input_ids=slow, use_cache=False).logits[:, -1]
            slow = torch.cat([slow, torch.multinomial(last.softmax(-1), 1, generator=generator)], 1)
    assert torch.equal(found, slow[:, 1:])
    assert len(generate(model, folder, 2, 8)) == 2
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert not any(buffer.dtype == torch.bfloat16 for buffer in model.buffers())


def test_a_start_token_that_the_vocabulary_lacks_is_not_used() -> None:
    class Holder:
        def __init__(self, bos: Any, eos: Any) -> None:
            self.bos_token_id, self.eos_token_id, self.vocab_size = bos, eos, 100

    assert writing.start_token(Holder(5, 6), Holder(None, None)) == 5
    assert writing.start_token(Holder(5, 6), Holder(None, 7)) == 5
    assert writing.start_token(Holder(500, [8, 9]), Holder(None, None)) == 8
    assert writing.start_token(Holder(None, []), Holder(None, 100)) is None


def test_a_model_without_a_start_token_begins_with_the_drawn_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "start_token", lambda config, tokenizer: None)
    shares: list[float] = []
    generate(TASK.load(folder), folder, 2, 10_000, advance=shares.append)
    assert len(shares) == 256


# ---- what is refused ----------------------------------------------------------------------------------------------
def test_other_families_and_encoders_are_refused(store: Store, quiet: Progress, tmp_path: Path) -> None:
    vision = get_task("vision")
    vision.save(vision.build(1), tmp_path / "vision")
    with pytest.raises(ConfigError, match="vision models write no data of their own"):
        write(store, tmp_path / "vision", quiet, family={})
    with pytest.raises(ConfigError, match="encoder models write no data of their own"):
        write(store, write_encoder(tmp_path / "encoder"), quiet)


def test_empty_texts_are_dropped_and_nothing_but_them_is_refused(
    store: Store, quiet: Progress, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The empty ones of what the network writes: the family drops them, the step needs one that is left."""
    monkeypatch.setattr(task, "write_texts", lambda model, folder, count, *rest: ["", "a word", " \n"][:count])
    assert [row["text"] for row in rows(write(store, folder, quiet))] == ["a word", "a word"]
    monkeypatch.setattr(task, "write_texts", lambda model, folder, count, *rest: [""] * count)
    with pytest.raises(DataError, match="all 5 examples"):
        write(store, folder, quiet, seed=1)


@pytest.mark.parametrize("options", [{"count": 0}, {"batch_size": 0}, {"temperature": 1}])
def test_wrong_options_are_refused(store: Store, quiet: Progress, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        call("sample", options, {}, store=store, progress=quiet)


def test_wrong_options_of_the_family_are_refused(store: Store, quiet: Progress, folder: Path) -> None:
    for options in ({"tokens": 1}, {"temperature": 1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            write(store, folder, quiet, family=options)


def test_the_default_is_what_calibration_was_tried_with() -> None:
    assert SampleOptions().model_dump() == {"count": 96, "family": {}, "batch_size": 48, "max_ram_bytes": None}
    assert TASK.chosen().tokens == 512
