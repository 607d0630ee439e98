"""Steps run once per key; what users call a model is found; recipes run, stop and report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import toys.make

import gulliver
from gulliver.core.errors import ArtifactError, ConfigError, GateRefused
from gulliver.core.progress import Progress
from gulliver.core.store.artifact import copy_artifact
from gulliver.core.store.store import Store
from gulliver.pipeline import resolve, steps
from gulliver.pipeline.call import Call, call, reuse_key
from gulliver.pipeline.run import run_recipe

pytestmark = pytest.mark.usefixtures("toy_table")


def test_a_second_call_finds_the_first_one(store: Store, quiet: Progress) -> None:
    log: list[Call] = []
    first = call("make", {"weights": 8}, {}, store=store, progress=quiet, log=log)
    second = call("make", {"weights": 8}, {}, store=store, progress=quiet, log=log)
    assert first == second
    assert [entry.reused for entry in log] == [False, True]
    assert len(toys.make.calls) == 1
    assert log[0].peak_rss_bytes > 0
    assert [entry.step for entry in store.runs()] == ["make"]


@pytest.mark.parametrize("change", ["config", "seed", "version", "input", "file"])
def test_everything_that_decides_a_result_is_in_the_key(
    change: str, store: Store, quiet: Progress, tmp_path: Path
) -> None:
    source = tmp_path / "source.txt"
    source.write_text("one")
    make, shrink = steps.find("make"), steps.find("shrink")
    small = call("make", {"weights": 8}, {}, store=store, progress=quiet)
    other = call("make", {"weights": 9}, {}, store=store, progress=quiet)

    def key(row: steps.Step, values: dict, inputs: dict, seed: int = 0) -> str:
        return reuse_key(row, steps.checked_config(row, values), inputs, seed)

    made, shrunk = key(make, {"source": str(source)}, {}), key(shrink, {}, {"model": small})
    if change == "config":
        assert key(shrink, {"bits": 8}, {"model": small}) != shrunk
    elif change == "seed":
        assert key(make, {"source": str(source)}, {}, seed=1) != made
    elif change == "version":
        from dataclasses import replace

        assert key(replace(shrink, version=2), {}, {"model": small}) != shrunk
    elif change == "input":
        assert key(shrink, {}, {"model": other}) != shrunk
    else:
        source.write_text("two")
        assert key(make, {"source": str(source)}, {}) != made
    assert key(shrink, {"bits": 4}, {"model": small}) == shrunk  # a default that is written out changes nothing


def test_contents_of_a_folder_are_in_the_key(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    row = steps.find("make")
    config = steps.checked_config(row, {"source": str(folder)})
    before = reuse_key(row, config, {}, 0)
    (folder / "config.json").rename(folder / "other.json")
    assert reuse_key(row, config, {}, 0) != before


def test_an_artifact_that_was_deleted_is_made_again(store: Store, quiet: Progress) -> None:
    import shutil

    first = call("make", {}, {}, store=store, progress=quiet)
    shutil.rmtree(first.path)
    assert call("make", {}, {}, store=store, progress=quiet) == first
    (first.path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError):
        call("shrink", {}, {"model": first}, store=store, progress=quiet)


def test_scratch_is_deleted_after_success(store: Store, quiet: Progress) -> None:
    model = call("make", {}, {}, store=store, progress=quiet)
    call("shrink", {}, {"model": model}, store=store, progress=quiet)
    assert list((store.home / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weigths": 8}, "step 'make' has no key 'weigths'; did you mean 'weights'?"),
        ({"weights": "many"}, "step 'make': weights = 'many' is not valid"),
        ({"weights": "many"}, "it takes int, default 64 (how many weights to write)"),
        ({"weights": 0}, "greater than 0"),
    ],
)
def test_a_wrong_config_names_the_key_and_the_remedy(config: dict, message: str, store: Store) -> None:
    with pytest.raises(ConfigError) as caught:
        call("make", config, {}, store=store)
    assert message in str(caught.value)


def test_units_are_understood_where_the_name_says_so(store: Store) -> None:
    row = steps.find("shrink")
    assert steps.checked_config(row, {"max_ram_bytes": "1.5GB"}).max_ram_bytes == 1_500_000_000
    with pytest.raises(ConfigError, match="max_ram_bytes is 'much'"):
        steps.checked_config(row, {"max_ram_bytes": "much"})


def test_a_wrong_input_names_the_step_and_the_kind(store: Store, quiet: Progress) -> None:
    model = call("make", {}, {}, store=store, progress=quiet)
    report = call("measure", {}, {"model": model}, store=store, progress=quiet)
    with pytest.raises(ConfigError, match="unknown step 'shrnk'; did you mean 'shrink'"):
        call("shrnk", {}, {"model": model}, store=store)
    with pytest.raises(ConfigError, match="needs the input 'model'"):
        call("shrink", {}, {}, store=store)
    with pytest.raises(ConfigError, match="takes no input 'modle'; did you mean 'model'"):
        call("shrink", {}, {"modle": model}, store=store)
    with pytest.raises(ConfigError, match="must be a model"):
        call("shrink", {}, {"model": report}, store=store)


def test_a_model_is_an_id_a_prefix_or_a_folder(store: Store, quiet: Progress, tmp_path: Path) -> None:
    model = call("make", {}, {}, store=store, progress=quiet)
    outside = copy_artifact(model, tmp_path / "outside")
    for spec in (model, model.id, model.id[:8], str(model.path), outside.path):
        assert resolve.resolve_model(spec, store) == model
    elsewhere = Store(tmp_path / "other home")
    assert resolve.resolve_model(outside.path, elsewhere).path == elsewhere.artifacts_folder / model.id
    report = call("measure", {}, {"model": model}, store=store, progress=quiet)
    with pytest.raises(ConfigError, match="is a report; a model is needed"):
        resolve.resolve_model(report.id, store)
    with pytest.raises(ConfigError, match="is a model; a dataset is needed"):
        resolve.resolve_data(model.id, store)


def test_a_folder_that_was_changed_is_refused(store: Store, quiet: Progress, tmp_path: Path) -> None:
    model = call("make", {}, {}, store=store, progress=quiet)
    outside = copy_artifact(model, tmp_path / "outside")
    weights = bytearray((outside.path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (outside.path / "model.safetensors").write_bytes(weights)
    with pytest.raises(ArtifactError, match=r"model\.safetensors differs"):
        resolve.resolve_model(outside.path, store)


def test_the_public_names_are_sorted_and_there() -> None:
    assert gulliver.__all__ == sorted(gulliver.__all__)
    code = (
        "import sys, types, gulliver.runtime, gulliver.core; assert 'gulliver.pipeline' not in sys.modules\n"
        "assert isinstance(gulliver.core, types.ModuleType)\n"
        "import gulliver.train.train; assert isinstance(gulliver.train, types.FunctionType), 'the step, not the folder'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'fitt'"):
        gulliver.fitt  # noqa: B018


def test_a_recipe_runs_from_python(store: Store, tmp_path: Path) -> None:
    recipe = tmp_path / "life.toml"
    recipe.write_text('[[step]]\nid = "a"\nuse = "make"\n')
    assert gulliver.run(recipe, store=store, progress=Progress(quiet=True)).calls[0].id == "a"


RECIPE = """
name = "toy life"

[[step]]
id = "parent"
use = "make"
weights = 32

[[step]]
id = "small"
use = "shrink"
inputs = { model = "parent" }
bits = 4

[[step]]
id = "measured"
use = "measure"
inputs = { model = "small", parent = "parent" }

[[gate]]
on = "small"
metric = "perplexity_ratio"
at_most = 1.1

[[step]]
id = "smaller"
use = "shrink"
inputs = { model = "small" }
bits = 2
"""


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Reports that were asked for, in place of the writer of HTML."""
    asked: list[Path] = []
    monkeypatch.setattr("gulliver.pipeline.run.write_atomic", lambda path, _: asked.append(path))
    return asked


def test_a_second_run_of_a_recipe_does_no_work(
    store: Store, quiet: Progress, tmp_path: Path, written: list[Path]
) -> None:
    path = tmp_path / "life.toml"
    path.write_text(RECIPE)
    first = run_recipe(path, store=store, progress=quiet)
    assert [entry.reused for entry in first.calls] == [False] * 4
    assert [verdict.outcome for verdict in first.verdicts] == ["PASS"]
    second = run_recipe(path, store=store, progress=quiet)
    assert [entry.reused for entry in second.calls] == [True] * 4
    assert [entry.artifact.id for entry in second.calls] == [entry.artifact.id for entry in first.calls]
    assert len(store.runs()) == 4
    assert written[0] == first.calls[-1].artifact.path / "report.html" == first.report


def test_a_refused_gate_stops_the_recipe_and_still_reports(
    store: Store, quiet: Progress, tmp_path: Path, written: list[Path]
) -> None:
    path = tmp_path / "life.toml"
    path.write_text(RECIPE.replace("at_most = 1.1", "at_most = 1.01"))
    with pytest.raises(GateRefused, match="perplexity_ratio"):
        run_recipe(path, store=store, progress=quiet, report=tmp_path / "report.html")
    assert [entry.step for entry in store.runs()] == ["make", "shrink", "measure"]
    assert written == [tmp_path / "report.html"]


BOTH = (
    RECIPE
    + """
[[step]]
id = "measured again"
use = "measure"
inputs = { model = "smaller", parent = "parent" }

[[gate]]
on = "smaller"
metric = "size_bytes"
at_most = 10000
"""
)


def test_the_report_shows_the_gates_on_its_model_and_names_the_others(
    store: Store, quiet: Progress, tmp_path: Path
) -> None:
    path = tmp_path / "life.toml"
    path.write_text(BOTH)
    done = run_recipe(path, store=store, progress=quiet)
    assert done.report is not None
    text = done.report.read_text(encoding="utf-8")
    own, other = text.split("<h2>Gates</h2>")[1].split("<h2>")[0].split("Gates on small, another model of this recipe")
    assert "<strong>PASS</strong>" in text and "NOT JUDGED" not in text
    assert "size at most 10" in own and "perplexity ratio" not in own
    assert "perplexity ratio at most 1.1" in other and "size at most" not in other
    assert done.calls[1].artifact.id[:12] in other


def test_the_report_of_a_model_without_a_gate_claims_no_pass(store: Store, quiet: Progress, tmp_path: Path) -> None:
    path = tmp_path / "life.toml"
    path.write_text(RECIPE)
    done = run_recipe(path, store=store, progress=quiet)
    assert done.report is not None
    text = done.report.read_text(encoding="utf-8")
    assert "<strong>NOT JUDGED</strong>" in text and "No gate was judged on this model" in text
    assert "Gates on small, another model of this recipe" in text


def test_a_refused_gate_on_an_earlier_model_refuses_the_page(store: Store, quiet: Progress, tmp_path: Path) -> None:
    path = tmp_path / "life.toml"
    gate = '[[gate]]\non = "small"\nmetric = "perplexity_ratio"\nat_most = 1.01\n'
    path.write_text(BOTH + gate)
    with pytest.raises(GateRefused):
        run_recipe(path, store=store, progress=quiet, report=tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<strong>REFUSED</strong>" in text and "perplexity ratio at most 1.01 on small (" in text


def test_a_report_that_cannot_be_written_is_told_before_the_work(store: Store, quiet: Progress, tmp_path: Path) -> None:
    path = tmp_path / "life.toml"
    path.write_text(RECIPE)
    for report in ("/proc/report.html", tmp_path / ("x" * 250)):
        with pytest.raises(ConfigError, match=r"--report .* cannot be written"):
            run_recipe(path, store=store, progress=quiet, report=report)
    assert store.runs() == []


def test_a_gate_without_evidence_refuses(store: Store, quiet: Progress, tmp_path: Path, written: list[Path]) -> None:
    path = tmp_path / "life.toml"
    path.write_text(RECIPE.replace('metric = "perplexity_ratio"', 'metric = "kl_divergence"'))
    with pytest.raises(GateRefused, match="NO_DATA"):
        run_recipe(path, store=store, progress=quiet)
