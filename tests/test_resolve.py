"""What `export` wrote is a MODEL like a stranger's: its folder and its id are taken by every command."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from compress_samples import Lab
from language_samples import write_causal

import gulliver
from gulliver.core.errors import ArtifactError, ConfigError, GulliverError
from gulliver.core.progress import Progress
from gulliver.core.store.artifact import Artifact, copy_artifact
from gulliver.core.store.store import Store
from gulliver.pipeline import resolve, steps
from gulliver.pipeline.spec import local_folder

QUIET = Progress(quiet=True)
FORMATS = ("compressed-tensors", "gguf", "safetensors")


@pytest.fixture(scope="module", params=FORMATS)
def exported(request: pytest.FixtureRequest, language: Lab, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(store, artifact in it, its folder outside) of the packed toy model in one format."""
    options = {"format": request.param} | ({"widen": True} if request.param == "compressed-tensors" else {})
    made = language.step("export", options, model=language.quantize(bits=4, group_size=32))
    return language.store, made, copy_artifact(made, tmp_path_factory.mktemp("outside") / "exported").path


def test_every_name_of_it_is_a_model(exported: Any, tmp_path: Path) -> None:
    store, made, folder = exported
    found = [resolve.resolve_model(spec, store, progress=QUIET) for spec in (made, made.id, made.id[:9], folder)]
    assert all((one.path / "config.json").is_file() and one.task == "language" for one in found)
    assert len({one.files["model.safetensors"].sha256 for one in found}) == 1
    home = {"home": tmp_path / "home", "progress": QUIET}
    pulled = gulliver.pull(str(folder), **home)
    if made.config["format"] != "safetensors":
        assert found[-1].step["name"] == "pull" and local_folder(folder) is None and local_folder(made) is None
        assert resolve.resolve_model(folder, Store(tmp_path / "home"), progress=QUIET) == pulled
        assert [one.id for one in Store(tmp_path / "home").artifacts()] == [pulled.id], "it was copied as well"


@pytest.mark.parametrize("by", ["id", "folder"])
def test_commands_take_it(exported: Any, by: str, language: Lab, command: Any) -> None:
    store, made, folder = exported
    spec, home = {"id": made.id, "folder": folder}[by], ("--home", store.home)
    for words in (
        ("generate", spec, "--raw", "--prompt", "the giant", "--max-tokens", "2"),
        ("ask", spec, "the giant"),
        ("export", spec, "--format", "safetensors"),
        ("speed", spec, "--repeats", "2"),
        ("show", spec),
        ("verify", spec),
    ):
        code, _, told = command(*words, *home)
        assert code == 0, (words, told)
    evidence = gulliver.audit(spec, language.dataset, language.model, store=store, progress=QUIET)
    assert math.isfinite(next(one.value for one in evidence if one.metric == "perplexity_ratio"))


def test_fit_takes_it(exported: Any, language: Lab) -> None:
    store, _, folder = exported
    found = gulliver.fit(folder, dry_run=True, data=language.dataset, effort="fast", store=store, progress=QUIET)
    assert found.kind == "report"


def test_one_that_was_changed_is_refused(exported: Any, tmp_path: Path) -> None:
    _, made, _ = exported
    folder = copy_artifact(made, tmp_path / "changed").path
    weights = next(folder / name for name in made.files if name.startswith("model."))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(ArtifactError, match=r"model\.(safetensors|gguf) differs"):
        resolve.resolve_model(folder, Store(tmp_path / "home"), progress=QUIET)


def test_inputs_that_do_not_exist_are_found_before_a_download(store: Store, language: Lab, tmp_path: Path) -> None:
    row = steps.find("distill")
    good: dict[str, Any] = {"model": "hf:no/model", "parent": language.model, "dataset": language.dataset}
    for role, spec, told in (
        ("parent", "nosuch", "nosuch does not exist"),
        ("parent", "abcdef", "no artifact abcdef"),
        ("parent", "catalog:nosuch", "nosuch"),
        ("parent", tmp_path, "has no config.json"),
        ("dataset", "nosuch", "nosuch does not exist"),
        ("samples", "abcdef", "no artifact abcdef"),
    ):
        with pytest.raises(GulliverError, match=told):
            resolve.resolve_inputs(row, {**good, role: spec}, {}, store, QUIET)
    given = {"model": "hf:no/model", "calibration": "nosuch"}
    with pytest.raises(ArtifactError, match="neither the id nor the folder"):
        resolve.resolve_inputs(steps.find("plan"), given, {"size_bytes": 1}, store)


def test_a_folder_without_a_tokenizer_is_told_in_a_whole_sentence(command: Any, tmp_path: Path) -> None:
    folder = write_causal(tmp_path / "model")
    for file in folder.glob("*token*"):
        file.unlink()
    code, _, told = command("generate", folder, "--raw", "--prompt", "hi")
    assert code == 2 and "no usable tokenizer; add the model's tokenizer.json" in told
    assert not told.rstrip().endswith("one of:")


def test_the_kind_is_checked_for_every_name(language: Lab) -> None:
    report: Artifact = language.calibration
    for spec in (report, report.id, report.path):
        with pytest.raises(ConfigError, match="is a report; a model is needed here"):
            resolve.resolve_model(spec, language.store)
