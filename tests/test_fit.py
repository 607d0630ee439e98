"""`fit`, as users call it: a model within the budget with its report, or exit code 4 and the nearest point that is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compress_samples import Lab
from fit_samples import SIZE, at_home, fit, small_efforts
from language_samples import write_encoder
from toy_language import write_model

import gulliver
from gulliver.core import memory
from gulliver.core.errors import ArtifactError, BudgetError, ConfigError, DataError, GateRefused
from gulliver.core.evidence.gate import Budget
from gulliver.core.progress import Progress
from gulliver.core.records import EXAMPLES, Calibration, FitResult, Packing
from gulliver.core.store.artifact import Artifact, open_artifact, verify
from gulliver.core.store.store import Store
from gulliver.pipeline import api, resolve, smallest
from gulliver.pipeline import call as run
from gulliver.pipeline.fitting import Fit
from gulliver.runtime.formats import BLOCK_TYPES
from gulliver.tasks import get_task

__all__ = ["at_home", "small_efforts"]
DIGITS = 60_000


def steps_run(lab: Lab) -> list[str]:
    return [entry.step for entry in lab.store.runs()]


# ---- what comes out --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("effort", ["fast", "normal", "high"])
def test_every_effort_fits_a_language_model(language: Lab, effort: str, tmp_path: Path) -> None:
    before = len(steps_run(language))
    out = tmp_path / "out"
    made = fit(language, effort=effort, out=out)
    assert made.path == out and made.weight_bytes <= SIZE < language.model.weight_bytes
    assert open_artifact(out).id == made.id
    verify(open_artifact(out))
    ran = set(steps_run(language)[before:])
    assert ("distill" in ran) == (effort == "high")
    metrics = {item.metric: item for item in language.store.evidence(made.id)}
    assert metrics["size_bytes"].value == made.weight_bytes
    assert metrics["quality_loss"].parent_id == language.model.id
    assert metrics["compress_peak_ram_bytes"].value > 0
    assert gulliver.ask(out, {"prompt": "the giant", "temperature": 0})["text"]
    report = [one for one in language.store.artifacts() if FitResult.file in one.files and made.id in one.parents][-1]
    answers = FitResult.of(report).answers
    assert len(answers) == 3 and all(pair.prompt and pair.parent and pair.model for pair in answers)
    asked = {"prompt": answers[0].prompt, "temperature": 0, "max_tokens": 48}
    assert gulliver.ask(language.model, asked)["text"] == answers[0].parent
    assert gulliver.ask(out, asked)["text"] == answers[0].model


@pytest.mark.parametrize(("rate", "kept"), [(0.01, "distill"), (50.0, "quantize")])
def test_distilling_is_kept_only_where_it_helps(
    language: Lab, rate: float, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gulliver.pipeline import fitting as efforts

    settings = {"steps": 60, "batch_size": 8, "learning_rate": rate, "scale_rate": 1e-4, "vector_rate": 1e-4}
    monkeypatch.setattr(efforts, "EFFORTS", efforts.EFFORTS | {"high": efforts.EFFORTS["high"] | {"distill": settings}})
    before = len(steps_run(language))
    made = fit(language, 48_000, effort="high")
    assert made.manifest["step"]["name"] == kept
    assert "distill" in steps_run(language)[before:]


@pytest.mark.parametrize("effort", ["fast", "normal", "high"])
def test_every_effort_fits_a_classifier(digits: Lab, effort: str, tmp_path: Path) -> None:
    made = fit(digits, DIGITS, effort=effort, out=tmp_path / "out", data=None)
    assert made.weight_bytes <= DIGITS < digits.model.weight_bytes
    metrics = {item.metric: item.value for item in digits.store.evidence(made.id)}
    assert metrics["accuracy_drop"] < 0.2
    assert metrics["quality_loss"] < 0.5


def test_an_encoder_is_fitted(language: Lab, tmp_path: Path) -> None:
    made = gulliver.fit(
        write_encoder(tmp_path / "encoder"),
        size=40_000,
        data=language.dataset,
        effort="normal",
        store=language.store,
        progress=Progress(quiet=True),
    )
    assert made.weight_bytes <= 40_000


def test_the_command_leaves_a_folder_that_explains_itself(
    language: Lab, at_home: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["fit", language.model.id, "--data", language.dataset.id, "--size", "59kB", "--effort", "fast"]
    code, shown, err = at_home(*words, "--out", out, "--max-drop", "50%", "--json")
    assert code == 0, err
    document = json.loads(shown)
    assert document["path"] == str(out) and document["weight_bytes"] <= SIZE
    assert document["report"] == str(out / "report.html")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<html" in page and "PASS" in page and "Answers, before and after" in page
    card = (out / "README.md").read_text(encoding="utf-8")
    assert document["id"][:12] in card and "perplexity" in card
    evidence = json.loads((out / "evidence.json").read_text(encoding="utf-8"))
    rows = evidence if isinstance(evidence, list) else evidence["evidence"]
    assert {"size_bytes", "quality_loss", "compress_peak_ram_bytes"} <= {row["metric"] for row in rows}
    assert any(f"--out {out}" in row["command"] for row in rows), rows[0]["command"]
    code, shown, err = at_home("verify", out)
    assert code == 0, err
    assert {"packing.json", "model.safetensors", "config.json", "tokenizer.json"} <= set(open_artifact(out).files)


def test_a_second_fit_does_no_work(language: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = fit(language, effort="normal")
    before = len(steps_run(language))

    def never(*_: Any) -> Any:
        raise AssertionError("a step ran again")

    monkeypatch.setattr(run, "named", never)
    assert fit(language, effort="normal", out=tmp_path / "out").id == first.id
    assert len(steps_run(language)) == before
    with pytest.raises(AssertionError, match="ran again"):
        fit(language, SIZE + 1, effort="normal")


def test_more_bytes_give_a_larger_and_better_model(language: Lab) -> None:
    small, large = fit(language, 42_000, effort="fast"), fit(language, 90_000, effort="fast")
    assert small.weight_bytes <= 42_000 < large.weight_bytes <= 90_000
    assert small.weight_bytes > 0.7 * 42_000
    worse, better = (
        next(item.value for item in language.store.evidence(made.id) if item.metric == "kl_divergence")
        for made in (small, large)
    )
    assert better < 0.5 * worse


# ---- what cannot be ------------------------------------------------------------------------------------------------
def test_a_size_that_no_format_reaches(
    language: Lab, at_home: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    words = ["fit", language.model.id, "--data", language.dataset.id, "--effort", "fast", "--out", tmp_path / "out"]
    code, _, err = at_home(*words, "--size", "9kB")
    assert code == 4 and not (tmp_path / "out").exists() and "Traceback" not in err
    nearest = re.search(r"nearest feasible point is ([\d,]+) bytes", err)
    report = re.search(r"report: (\S+report\.html)", err)
    assert nearest and report and "<html" in Path(report[1]).read_text(encoding="utf-8")
    with pytest.raises(BudgetError) as refusal:
        fit(language, "9kB", effort="fast")
    least = refusal.value.nearest["size_bytes"]
    assert f"{least:,}" == nearest[1]
    assert fit(language, least, effort="fast").weight_bytes <= least
    with pytest.raises(BudgetError):
        fit(language, least - 1, effort="fast")


def test_a_drop_that_no_model_of_this_size_keeps(
    language: Lab, at_home: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    words = ["fit", language.model.id, "--data", language.dataset.id, "--effort", "fast", "--out", tmp_path / "out"]
    code, shown, err = at_home(*words, "--size", "40kB", "--max-drop", "1%", "--json")
    assert code == 4 and not (tmp_path / "out").exists()
    assert "quality_loss <= 0.01" in err + shown and "nearest feasible point" in err + shown
    would_do = re.search(r"would do with --max-drop ([\d.]+%)", err + shown)
    assert would_do and fit(language, 40_000, effort="fast", max_drop=would_do[1]).weight_bytes <= 40_000
    with pytest.raises(BudgetError) as refusal:
        fit(language, 40_000, effort="fast", max_drop=0.01)
    nearest = refusal.value.nearest
    assert nearest is not None and nearest["size_bytes"] > 40_000
    larger = fit(language, nearest["size_bytes"], effort="fast", max_drop=0.01)
    assert 40_000 < larger.weight_bytes <= nearest["size_bytes"]


def test_a_drop_that_no_size_keeps_has_no_nearest_point(language: Lab) -> None:
    with pytest.raises(BudgetError, match="would do with --max-drop") as refusal:
        fit(language, 42_000, effort="fast", max_drop=1e-9)
    assert refusal.value.nearest is None and "nearest feasible" not in str(refusal.value)
    assert "report.html" in str(refusal.value)


def test_the_least_size_is_not_called_feasible_where_more_was_asked(language: Lab) -> None:
    with pytest.raises(BudgetError, match="whether that size meets the other limits") as refusal:
        fit(language, "9kB", effort="fast", max_drop=0.01)
    assert refusal.value.nearest is None and "nearest feasible" not in str(refusal.value)


def test_a_parent_worth_nothing_is_not_called_a_matter_of_size(language: Lab, tmp_path: Path) -> None:
    parent, quiet = write_model(tmp_path / "random", steps=0), Progress(quiet=True)
    for options in ({}, {"max_drop": 1e-9}):
        with pytest.raises(GateRefused, match="no size would") as refusal:
            gulliver.fit(
                parent, size=SIZE, data=language.dataset, effort="fast", store=language.store, progress=quiet, **options
            )
        assert "perplexity_vs_baseline" in str(refusal.value)
        assert not any(word in str(refusal.value) for word in ("infeasible", "nearest", "bytes"))


def test_memory_that_is_too_little(language: Lab, at_home: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    words = ["fit", language.model.id, "--data", language.dataset.id, "--effort", "fast", "--out", tmp_path / "out"]
    code, _, err = at_home(*words, "--size", "61kB", "--ram", "1MB")
    assert code == 4 and "1 MB" in err and not (tmp_path / "out").exists()


def test_memory_that_is_enough_is_judged(language: Lab) -> None:
    limit = memory.current_rss_bytes() + 600_000_000
    made = fit(language, 62_000, effort="fast", ram=limit)
    peak = next(item for item in language.store.evidence(made.id) if item.metric == "compress_peak_ram_bytes")
    assert 0 < peak.value <= limit


def test_a_speed_that_no_machine_reaches(language: Lab) -> None:
    with pytest.raises(BudgetError, match=r"decode_tokens_per_s >= 1e.*would do with --speed") as refusal:
        fit(language, effort="fast", speed=1e12)
    assert refusal.value.nearest is None and "nearest feasible" not in str(refusal.value)


# ---- what is asked -------------------------------------------------------------------------------------------------
def test_data_come_from_the_lineage(language: Lab, digits: Lab) -> None:
    made = fit(digits, DIGITS, data=None, effort="fast")
    assert digits.dataset.id in {manifest["id"] for manifest in digits.store.lineage(made.id)}
    with pytest.raises(DataError, match="--data"):
        fit(language, data=None, effort="fast", domain_only=True)


def judged_on(lab: Lab, made: Artifact) -> set[str]:
    return {item.data_hash for item in lab.store.evidence(made.id) if item.metric == "quality_loss"}


def written_by(lab: Lab, model: Artifact) -> set[str]:
    own = [one for one in lab.store.artifacts() if one.step["name"] == "sample" and model.id in one.parents]
    return {one.files[EXAMPLES].sha256 for one in own}


def test_the_worse_of_the_users_data_and_of_the_broad_set_is_judged(language: Lab) -> None:
    made = fit(language, 52_000, effort="fast", max_drop="100%")
    judged, users = judged_on(language, made), language.dataset.files[EXAMPLES].sha256
    assert len(judged) == 2 and users in judged and judged - {users} <= written_by(language, language.model)
    losses = [item for item in language.store.evidence(made.id) if item.metric == "quality_loss"]
    with pytest.raises(BudgetError, match="quality_loss"):
        worst = max(item.high for item in losses)
        fit(language, 52_000, effort="fast", max_drop=worst * 0.999)
    alone = fit(language, 52_000, effort="fast", domain_only=True)
    assert judged_on(language, alone) == {language.dataset.files[EXAMPLES].sha256}
    assert alone.id != made.id


def test_without_data_the_broad_set_stands_alone(language: Lab) -> None:
    made = fit(language, 52_000, effort="fast", data=None)
    judged = judged_on(language, made)
    assert len(judged) == 1 and judged <= written_by(language, language.model)
    assert language.store.get(Calibration.of(made).dataset).files[EXAMPLES].sha256 in judged


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"effort": "huge"}, "effort is 'huge'"),
        ({"size": "sixty"}, "size is 'sixty'"),
        ({"size": "64"}, "64 bytes\\? Write 64MB"),
        ({"size": "150%"}, "at most 100%"),
        ({"size": None}, "--size 64MB, --max-drop 2%, or both"),
        ({"max_drop": "500%"}, "max_drop is 5"),
        ({"max_drop": "little"}, "max_drop is 'little'"),
        ({"ram": True}, "ram is True"),
        ({"ram": "10%"}, "ram is '10%'"),
        ({"speed": float("nan")}, "min_tokens_per_s is nan"),
        ({"speed": 0}, "min_tokens_per_s is 0"),
        ({"speed": -3.0}, "min_tokens_per_s is -3"),
        ({"data": "no/such/text.txt"}, "no/such/text.txt does not exist"),
        ({"data": "catalog:no-such-text"}, "no-such-text"),
        ({"eval_data": "no/such/eval.txt"}, "no/such/eval.txt does not exist"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_wrong_word_is_found_before_the_model_is_looked_for(
    wrong: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gulliver.pipeline import fit as loop

    monkeypatch.setattr(loop, "resolve_model", lambda *_, **__: pytest.fail("the model was looked for"))
    text = tmp_path / "text.txt"
    text.write_text("the giant")
    given = {"size": "1MB", "data": text, "home": tmp_path / "home"} | wrong
    with pytest.raises((ConfigError, DataError), match=message):
        gulliver.fit("hf:no/model", **given)
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(ArtifactError, match="not empty"):
        gulliver.fit("hf:no/model", size="1MB", data=text, home=tmp_path / "home", out=full)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantize", "--calibration", "abcdef123", "--bits", "11"], "bits"),
        (["calibrate", "--data", "no/such.txt"], "no/such.txt does not exist"),
        (["audit", "--data", "no/such.txt"], "no/such.txt does not exist"),
    ],
)
def test_steps_find_a_wrong_word_before_the_model_too(
    words: list[str], message: str, at_home: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "resolve_model", lambda *_, **__: pytest.fail("the model was looked for"))
    monkeypatch.setattr(api, "resolve_model", lambda *_, **__: pytest.fail("the model was looked for"))
    code, _, err = at_home(words[0], "hf:no/model", *words[1:])
    assert code == 2 and message in err


def test_true_is_no_number(language: Lab) -> None:
    with pytest.raises(ConfigError, match="max_ram_bytes = True is not valid: must be a number, not true or false"):
        language.quantize(bits=4, max_ram_bytes=True)


def test_a_share_of_the_parent(language: Lab) -> None:
    made = fit(language, "20%", effort="fast")
    assert 0.15 * language.model.weight_bytes < made.weight_bytes <= 0.2 * language.model.weight_bytes


def test_the_smallest_model_within_a_drop(
    language: Lab, at_home: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    before = len(steps_run(language))
    strict, loose = (fit(language, None, effort="fast", max_drop=drop) for drop in (0.02, 0.2))
    assert strict.weight_bytes > loose.weight_bytes
    for made, limit in ((strict, 0.02), (loose, 0.2)):
        lost = [item for item in language.store.evidence(made.id) if item.metric == "quality_loss"]
        assert lost[-1].worse_end <= limit
    assert steps_run(language)[before:].count("quantize") <= 2 * smallest.ROUNDS
    code, _, err = at_home(
        "fit",
        language.model.id,
        "--data",
        language.dataset.id,
        "--effort",
        "fast",
        "--max-drop",
        "0%",
        "--out",
        tmp_path,
    )
    assert code == 4 and "quality_loss <= 0" in err, err


def test_wrong_words(language: Lab, at_home: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="5%"):
        fit(language, max_drop="5")
    with pytest.raises(ConfigError, match="packed already"):
        gulliver.fit(
            language.quantize(bits=4),
            size=SIZE,
            data=language.dataset,
            store=language.store,
            progress=Progress(quiet=True),
        )
    code, _, err = at_home("fit", language.model.id, "--size", "1MB", "--out", tmp_path / "o", "--effort", "huge")
    assert code == 2 and "huge" in err


# ---- other tools read what was fitted ------------------------------------------------------------------------------
def losses(network: torch.nn.Module, lab: Lab) -> torch.Tensor:
    task = get_task("language")
    stream = task.batches(lab.dataset, "eval", 4, 0, 0, folder=lab.model.path, options=task.chosen({"tokens": 64}))
    with torch.no_grad():
        return torch.cat([task.loss(network, next(stream)) for _ in range(3)])


def test_transformers_reads_the_export_and_agrees_with_us(language: Lab) -> None:
    made = fit(language, effort="fast")
    exported = language.step("export", {"format": "safetensors"}, model=made)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(exported.path), dtype=torch.float32).eval()
    ours, task = losses(get_task("language").load(made.path), language), get_task("language")
    assert torch.allclose(losses(theirs, language), ours, rtol=2e-2)
    parent = losses(task.load(language.model.path), language)
    assert (losses(theirs, language) - ours).abs().mean() < 0.5 * (ours - parent).abs().mean()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(exported.path))
    assert tokenizer.decode(tokenizer("the queen finds")["input_ids"]) == "the queen finds"


def test_integers_are_exported_bit_for_bit(language: Lab) -> None:
    pytest.importorskip("compressed_tensors")
    packed = language.quantize(bits=4, kind="uniform")
    exported = language.step("export", {"format": "compressed-tensors"}, model=packed)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(exported.path)).eval()
    ours = get_task("language").load(packed.path)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        expected = theirs(tokens).logits  # compressed-tensors unpacks here
        assert torch.allclose(expected, ours(tokens).logits, atol=1e-5)
    assert torch.allclose(losses(theirs, language), losses(ours, language), rtol=1e-5)


def test_a_fit_in_a_new_home_makes_the_same_model(language: Lab, tmp_path: Path) -> None:
    here = fit(language, effort="fast")
    there = gulliver.fit(
        language.model.path,
        size=SIZE,
        data=language.dataset.path,
        effort="fast",
        store=Store(tmp_path / "home"),
        progress=Progress(quiet=True),
    )
    assert there.id == here.id


def test_a_model_for_gguf_is_as_large_in_its_file(language: Lab, tmp_path: Path) -> None:
    import gguf

    limit = 150_000
    made = fit(language, limit, effort="fast", for_="gguf")
    assert made.weight_bytes <= limit
    exported = gulliver.export(made, format="gguf", home=language.store.home)
    assert exported.weight_bytes <= limit
    written = {row.name: row for row in gguf.GGUFReader(str(exported.path / "model.gguf")).tensors}
    held = {row.tensor_type.name for row in written.values()}
    packed = {part.format for tensor in Packing.of(made).tensors.values() for part in tensor.parts}
    assert packed <= set(BLOCK_TYPES) and held == packed | {"F32"}
    ours = get_task("language").load(made.path).state_dict()
    for theirs, name in (("token_embd", "embed_tokens"), ("blk.0.ffn_down", "layers.0.mlp.down_proj")):
        row = written[f"{theirs}.weight"]
        values = torch.from_numpy(gguf.dequantize(row.data, row.tensor_type))
        torch.testing.assert_close(values, ours[f"model.{name}.weight"], rtol=0, atol=0)
    assert gulliver.ask(made.path, {"prompt": "the giant", "temperature": 0})["text"]
    with pytest.raises(ConfigError, match="only GGUF and plain safetensors can hold"):
        gulliver.export(made, format="compressed-tensors", home=language.store.home)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_model_for_another_engine_is_as_large_in_its_file(language: Lab, engine: str) -> None:
    pytest.importorskip("compressed_tensors")
    limit = 150_000
    made = fit(language, limit, effort="fast", for_=engine)
    assert made.weight_bytes <= limit
    exported = gulliver.export(made, format="compressed-tensors", home=language.store.home)
    assert 0.5 * limit < exported.weight_bytes <= limit
    told = json.loads(exported.file("config.json").read_text())["quantization_config"]
    schemes = [row["weights"] for row in told["config_groups"].values()]
    assert all(row["symmetric"] and row["strategy"] == "group" for row in schemes)
    assert "model.embed_tokens" in told["ignore"]
    own = {module: name for name, row in told["config_groups"].items() for module in row["targets"]}
    if engine == "vllm":
        assert {row["num_bits"] for row in schemes} <= {4, 8}
        for layer in ("model.layers.0", "model.layers.1"):
            assert len({own[f"{layer}.self_attn.{part}_proj"] for part in "qkv"}) == 1
            assert own[f"{layer}.mlp.gate_proj"] == own[f"{layer}.mlp.up_proj"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(exported.path)).eval()
    ours = get_task("language").load(made.path)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, ours(tokens).logits)
    weights = dict(theirs.named_parameters(remove_duplicate=False))
    for name, weight in ours.named_parameters():
        assert torch.equal(weights[name].float(), weight), name
        assert torch.equal(weight.half().float(), weight) or "proj" not in name, name


def test_a_loss_that_is_asked_for_is_judged_on_more_of_what_the_model_writes(language: Lab) -> None:
    def held_out(**budget: Any) -> int:
        work = Fit(language.model, None, None, Budget(**budget), "fast", {})
        return (work.options("sample") or {})["held_out"]

    assert held_out(max_drop=0.1) == 2 * held_out(size_bytes=SIZE) > 0


def test_for_whom(language: Lab, digits: Lab) -> None:
    with pytest.raises(ConfigError, match="for is 'mlx'; choose one of native, gguf, vllm, transformers"):
        fit(language, for_="mlx")
    with pytest.raises(ConfigError, match="its file is for language models"):
        fit(digits, DIGITS, data=None, for_="gguf")
    with pytest.raises(ConfigError, match="vllm does not open vision models"):
        fit(digits, DIGITS, data=None, for_="vllm")
    with pytest.raises(BudgetError, match="needs at least") as refusal:
        fit(language, 30_000, effort="fast", for_="vllm")
    assert refusal.value.nearest is not None and refusal.value.nearest["size_bytes"] > 30_000
