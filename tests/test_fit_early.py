"""What `fit` finds out before anything long is done, and what it says of limits that it could not keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from compress_samples import Lab
from fit_samples import fit, small_efforts
from gguf_samples import model_folder
from toy_language import write_text

import gulliver
from gulliver.core.errors import ArtifactError, BudgetError, ConfigError, DataError
from gulliver.core.progress import Progress
from gulliver.core.records import FitResult, PlainTensors
from gulliver.core.store.artifact import Artifact, copy_artifact
from gulliver.tasks.language import writing

__all__ = ["small_efforts"]
QUIET = Progress(quiet=True)


def steps_run(lab: Lab) -> list[str]:
    return [entry.step for entry in lab.store.runs()]


@pytest.fixture(scope="module")
def eight_bits(language: Lab) -> Artifact:
    """The toy language model as it comes from a GGUF file: its matrices are blocks of Q8_0."""
    written = gulliver.export(language.model, format="gguf", type="q8_0", home=language.store.home)
    return gulliver.pull(str(written.path / "model.gguf"), home=language.store.home)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_blocks_that_another_engine_does_not_read_are_unpacked(
    language: Lab, eight_bits: Artifact, engine: str
) -> None:
    pytest.importorskip("compressed_tensors")
    limit = 150_000
    made = gulliver.fit(
        eight_bits, size=limit, data=language.dataset, effort="fast", for_=engine, store=language.store, progress=QUIET
    )
    told = PlainTensors.of(made).tensors["model.embed_tokens.weight"]
    assert told.reason == f"{engine} reads an embedding, and a head that shares it, at 16 bits"
    exported = gulliver.export(made, format="compressed-tensors", home=language.store.home)
    assert made.weight_bytes <= limit and exported.weight_bytes <= limit


def test_the_least_size_for_gguf_counts_all_that_its_file_holds(language: Lab, eight_bits: Artifact) -> None:
    options: dict[str, Any] = {"data": language.dataset, "effort": "fast", "domain_only": True, "for_": "gguf"}
    options |= {"store": language.store, "progress": QUIET}
    with pytest.raises(BudgetError, match=r"its gguf file holds [0-9,]+ bytes beside the weights") as refusal:
        gulliver.fit(eight_bits, size="60%", **options)
    assert refusal.value.nearest is not None
    made = gulliver.fit(eight_bits, size=refusal.value.nearest["size_bytes"], **options)
    exported = gulliver.export(made, format="gguf", home=language.store.home)
    assert exported.weight_bytes <= refusal.value.nearest["size_bytes"]


@pytest.mark.parametrize("share", ["70%", "75%", "100%"])
def test_a_gguf_for_gguf_holds_its_size(language: Lab, eight_bits: Artifact, share: str) -> None:
    """However little the file's own bytes leave over."""
    options: dict[str, Any] = {"data": language.dataset, "effort": "fast", "domain_only": True, "for_": "gguf"}
    before = len(steps_run(language))
    made = gulliver.fit(eight_bits, size=share, store=language.store, progress=QUIET, **options)
    assert steps_run(language)[before:].count("quantize") <= 1, (
        "what the file holds beside the weights was not foreseen"
    )
    exported = gulliver.export(made, format="gguf", home=language.store.home)
    assert exported.weight_bytes <= int(share[:-1]) / 100 * eight_bits.weight_bytes
    assert gguf.GGUFReader(str(exported.path / "model.gguf")).tensors


NO_GGUF: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4}, "GPT2LMHeadModel"),
    "experts": ({"model_type": "mixtral", "num_local_experts": 4}, "MixtralForCausalLM"),
    "rows that fill no block": ({"model_type": "llama", "intermediate_size": 72}, "rows of 72 numbers"),
}


@pytest.mark.parametrize("case", NO_GGUF)
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_model_that_gguf_cannot_hold_is_refused_at_once(
    case: str, dry_run: bool, language: Lab, tmp_path: Path
) -> None:
    config, told = NO_GGUF[case]
    folder, before = model_folder(tmp_path / "model", **config), len(steps_run(language))
    options: dict[str, Any] = {"data": language.dataset, "for_": "gguf", "dry_run": dry_run}
    with pytest.raises(ConfigError, match=rf"cannot be fitted for gguf: .*{told}.*Leave --for out"):
        gulliver.fit(folder, size="60%", store=language.store, progress=QUIET, **options)
    assert set(steps_run(language)[before:]) <= {"pull"}


def test_an_out_that_holds_another_artifact_is_told_at_once(language: Lab, tmp_path: Path) -> None:
    copy_artifact(language.model, tmp_path / "out")
    before = steps_run(language)
    given: dict[str, Any] = {"data": language.dataset, "effort": "fast", "store": language.store, "progress": QUIET}
    with pytest.raises(ArtifactError, match="holds another artifact"):
        gulliver.fit(language.model, size=100_000, out=tmp_path / "out", **given)
    with pytest.raises(ArtifactError, match="lies in the home"):
        gulliver.fit(language.model, size=100_000, out=language.store.home / "artifacts" / "out", **given)
    assert steps_run(language) == before


def test_wrong_data_are_found_before_a_model_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "nothing").mkdir()
    for wrong in ("empty.txt", "nothing"):
        with pytest.raises(DataError, match=f"{wrong} is empty"):
            gulliver.fit("hf:no/model", size="50%", data=str(tmp_path / wrong), home=tmp_path / "home")
    with pytest.raises(ConfigError, match=r"--eval-data judge\.txt needs --data"):
        gulliver.fit("hf:no/model", size="50%", eval_data="judge.txt", home=tmp_path / "home")


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_text_too_short_to_judge_by_is_refused_at_once(dry_run: bool, language: Lab, tmp_path: Path) -> None:
    short, judge = tmp_path / "train.txt", tmp_path / "judge.txt"
    short.write_text("the giant walks over the hill and sees the sea. " * 300, encoding="utf-8")
    judge.write_text("a ship of small people came to the shore. " * 2, encoding="utf-8")
    before = len(steps_run(language))
    with pytest.raises(DataError, match="too few for two windows of 64; give more text"):
        fit(language, data=str(short), eval_data=str(judge), dry_run=dry_run)
    assert set(steps_run(language)[before:]) <= {"read"}


def test_a_short_text_is_judged_by_shorter_windows(language: Lab, tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt", count=250)
    made = fit(language, data=str(tmp_path / "text.txt"), effort="fast", domain_only=True)
    found = next(item for item in language.store.evidence(made.id) if item.metric == "quality_loss")
    assert found.detail["context"] < 256 and found.n >= 2


def test_the_card_says_what_the_report_says(language: Lab) -> None:
    for options in ({"size": None, "max_drop": "30%"}, {"size": "20%", "max_drop": "60%"}):
        made = fit(language, **options, effort="fast")
        card = (made.path / "README.md").read_text(encoding="utf-8")
        assert "**PASS**" in card and "NOT JUDGED" not in card
        assert f"quality loss at most {options['max_drop'][:-1]} %" in card.replace("\N{NO-BREAK SPACE}", " ")


def test_a_model_that_writes_nothing_fit_is_judged_on_the_data_alone_and_the_report_says_so(
    language: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "fault_of", lambda text, tokens: "unreadable")
    made = fit(language, 53_000, effort="fast", seed=5)
    report = [one for one in language.store.artifacts() if FitResult.file in one.files and made.id in one.parents][-1]
    told = "Calibrated and judged on --data alone, since the model writes no text that is fit"
    assert told in str(FitResult.of(report).reason)
    assert told in (made.path / "README.md").read_text(encoding="utf-8").replace("\\", "")
    assert told in (made.path / "report.html").read_text(encoding="utf-8")


def test_no_room_to_write_texts_is_no_reason_to_judge_by_less(language: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise BudgetError("memory reached 900 MB; the limit is 800 MB")

    monkeypatch.setattr("gulliver.data.sample.run", full)
    with pytest.raises(BudgetError, match=r"own texts cannot be written: .*--domain-only"):
        fit(language, 53_000, effort="fast", seed=6)


def test_a_dry_run_tells_what_the_memory_limit_costs(language: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    gulliver.fit(language.model, size="60%", data=language.dataset, ram="1.1GB", dry_run=True, store=language.store)
    assert "1.1 GB of memory cost quality" in capsys.readouterr().err
