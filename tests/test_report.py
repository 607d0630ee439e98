"""The HTML report: order, honesty about what is missing, escaping, no other host, and readers that refuse bad JSON."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_samples import artifact, fit, fitted, plan, tensor, tensors

from gulliver.core.errors import ArtifactError
from gulliver.core.evidence.evidence import measured
from gulliver.core.evidence.gate import Gate
from gulliver.core.records import Asked, FitResult, Origin, PackedPart, PackedWeight, Packing, Plan, Point, TensorBits
from gulliver.core.store.store import Store
from gulliver.report import bits, plots, rows, verdict
from gulliver.report.gather import ReportData, gather, of_packing, oldest_first
from gulliver.report.html import asset, content_policy, page, plotly_library, script_hash

HOSTILE = "<script>alert(1)</script>\"'&`|</title>\u2028${x}"
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Outline(HTMLParser):
    """Tags, headings, links and scripts of a page; fails on a tag that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.headings: list[str] = []
        self.links: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag == "script":
            self.scripts.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture
def sample(tmp_path: Path) -> ReportData:
    """Everything a report can show, of a model in a store."""
    store, model = fitted(tmp_path / "home")
    return gather(model, store)


def bare() -> ReportData:
    return ReportData(title="m", artifact_id="a" * 64, task="language", step="quantize", size_bytes=None)


def test_verdict_stands_first_and_sections_in_order(sample: ReportData) -> None:
    text = page(sample)
    outline = Outline(text)
    assert outline.headings == [
        "Gates", "Evidence", "Size and quality", "Bits per tensor", "Predicted loss increase per block",
        "Memory over time", "Lineage", "Machine", "Commands to repeat",
    ]  # fmt: skip
    assert text.index("<strong>PASS</strong>") < text.index("<h2>Gates")
    assert "Asked for at most 72" in text and "95 % interval 2.68 to 3.56" in text and "10\u00a0min 10\u00a0s" in text


def test_page_asks_no_other_host_and_embeds_plotly_once(sample: ReportData) -> None:
    text = page(sample)
    outline = Outline(text)
    assert set(outline.links) == {"data:,"}
    assert "http://" not in text and "https://" not in text
    assert text.count('id="plotly"') == 1 and len(text) < 2_300_000
    assert f"script-src {script_hash(asset('page.js').encode())} {plotly_library()[1]}" in content_policy(drawn=True)
    assert [script.get("type") for script in outline.scripts].count(None) == 1


def test_same_records_give_the_same_bytes(sample: ReportData) -> None:
    assert page(sample) == page(sample)


def test_every_table_has_a_caption_and_every_plot_a_text_alternative(sample: ReportData) -> None:
    text = page(sample)
    assert len(re.findall("<table", text)) == len(re.findall("<caption>[^<]+</caption>", text)) > 5
    plotted = re.findall(r'<div class="plot"[^>]*>', text)
    assert len(plotted) == 5 and all('role="img" aria-label="' in tag for tag in plotted)
    assert len(re.findall("<details><summary>[^<]+: the numbers", text)) == 5


def test_sizes_say_what_they_are_compared_with(sample: ReportData) -> None:
    """A download that was packed already is not the size in bfloat16: both are named wherever a size is compared."""
    text = page(sample).replace("\u00a0", " ")
    assert "Downloaded: 94.10 kB GGUF Q4_1; 269 kB in bfloat16" in text
    assert "Reached 71.90 kB (76 % of the download, 27 % of its size in bfloat16), " in text
    assert "parent 269 kB<br>downloaded 94.10 kB<br>in bfloat16 269 kB" in text
    unknown = page(replace(sample, origin=None)).replace("\u00a0", " ")
    assert "ownloaded" not in unknown and "Reached 71.90 kB, " in unknown
    assert sample.origin is not None
    itself = replace(sample, parent_size_bytes=sample.origin.original_bytes)
    assert itself.parent_download_bytes is None and sample.parent_download_bytes == 94_100


def test_a_failing_gate_refuses_and_says_which(tmp_path: Path) -> None:
    store, model = fitted(tmp_path / "home", quality_loss=0.048)
    data = gather(model, store)
    text = page(data)
    assert data.outcome == "REFUSED" and "<strong>REFUSED</strong>" in text and 'class="verdict refused"' in text
    assert "interval 4.36 to 5.24" in verdict.sentences(data)[2] and 'class="fail-text">FAIL' in text
    assert "its worse end, 5.24" in text and "7.19e+" not in text


def test_a_gate_without_data_refuses(sample: ReportData) -> None:
    missing = Gate("accuracy", at_least=0.9).judge(sample.evidence, sample.artifact_id)
    data = replace(sample, fit=sample.fit.model_copy(update={"verdicts": (*sample.fit.verdicts, missing)}))
    assert data.outcome == "REFUSED"
    assert "NO DATA" in page(data) and "not measured" in page(data)


def test_no_gate_is_not_a_pass(sample: ReportData) -> None:
    data = replace(sample, fit=sample.fit.model_copy(update={"verdicts": ()}))
    assert data.outcome == "NOT JUDGED" and "nothing is proven" in page(data)


def test_verdicts_of_a_recipe_are_shown(tmp_path: Path) -> None:
    store, model = fitted(tmp_path / "home")
    judged = Gate("kl_divergence", at_most=0.01).judge(store.evidence(model.id), model.id)
    data = gather(model, store, verdicts=[judged])
    assert data.outcome == "REFUSED" and data.fit.verdicts[0].metric == "kl_divergence"
    assert gather(model, store, verdicts=[judged, judged]).fit.verdicts == data.fit.verdicts


def test_infeasible_names_the_nearest_point(sample: ReportData) -> None:
    nearest = Point(size_bytes=84_000_000, predicted_drop=0.061)
    told = {"nearest": nearest, "reason": "The embedding is the limit."}
    data = replace(sample, fit=sample.fit.model_copy(update=told))
    text = " ".join(verdict.sentences(data))
    assert data.outcome == "INFEASIBLE" and "84" in text and "6.1" in text and "predicted" in text
    assert "The embedding is the limit." in text and "Reached" not in text


def test_a_speed_is_that_of_the_gate_or_of_what_was_measured() -> None:
    """No family is asked: METRICS says what a speed is, a gate on one says which, and its unit follows."""
    fit = FitResult(budget=Asked(min_tokens_per_s=150))
    images = replace(bare(), fit=fit, evidence=(measured("examples_per_s", 42),))
    assert images.speed_metric == "examples_per_s" and "150\u00a0examples/s." in verdict.sentences(images)[0]
    judged = Gate("prefill_tokens_per_s", at_least=1).judge([], "a" * 64)
    assert replace(images, fit=fit.model_copy(update={"verdicts": (judged,)})).speed_metric == "prefill_tokens_per_s"
    nothing = replace(bare(), fit=fit)
    assert nothing.speed_metric is None and "at least 150\u00a0per s." in verdict.sentences(nothing)[0]


def test_an_infeasible_fit_is_told_only_where_it_is_given(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    parent = artifact(store, "model", "pull", {"model.safetensors": 1000})
    nearest = Point(size_bytes=84_000, predicted_drop=0.061)
    told = fit(72_000).model_copy(update={"nearest": nearest, "reason": "Too small."})
    made = artifact(store, "report", "fit", {FitResult.file: told}, [parent.id])
    text = page(gather(parent, store, fit=made))
    assert (
        text.endswith("</html>\n")
        and "<strong>INFEASIBLE</strong>" in text
        and "nearest feasible point" in text
        and "Too small." in text
    )
    assert '<dl class="figures">' not in text
    assert gather(parent, store).outcome == "NOT JUDGED"


def test_a_fit_that_made_another_model_is_not_this_models(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    parent = artifact(store, "model", "pull", {"model.safetensors": 1000})
    child = artifact(store, "model", "quantize", {"model.safetensors": 500}, [parent.id])
    told = fit(72_000).model_copy(update={"artifact_id": child.id})
    artifact(store, "report", "fit", {FitResult.file: told}, [parent.id, child.id])
    assert gather(parent, store).fit == FitResult() and gather(child, store).fit.artifact_id == child.id


def test_missing_parts_are_absent_and_never_invented() -> None:
    text = page(bare())
    outline = Outline(text)
    assert outline.headings == ["Gates", "Evidence", "Lineage", "Machine", "Commands to repeat"]
    assert "not measured" in text and "script-src &#39;none&#39;" in text and outline.scripts == []
    assert not re.search(r"\bnan\b|None|NaN", text)


def test_a_plain_model_without_evidence_has_a_report(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    files = {"model.safetensors": 1000, Origin.file: Origin(source="/some/where/toy")}
    text = page(gather(artifact(store, "model", "pull", files), store))
    assert "Gulliver report: toy" in text and "/some/where" not in text.split("<h2>Lineage")[0] and "NOT JUDGED" in text


def test_user_text_is_escaped_everywhere(tmp_path: Path) -> None:
    store, model = fitted(tmp_path / "home", source=f"catalog:{HOSTILE}")
    data = gather(model, store)
    verdicts = tuple(replace(gate, reason=HOSTILE, outcome="FAIL", evidence=None) for gate in data.fit.verdicts)
    memory = ((0.0, HOSTILE, 1), (1.0, HOSTILE, 2))
    changed = data.fit.model_copy(update={"reason": HOSTILE, "memory": memory, "verdicts": verdicts})
    held = (tensor(f"model.layers.0.{HOSTILE}", 64, [(64, "u4g64")], 1.0),)
    rows = tuple(
        replace(row, command=HOSTILE, machine=HOSTILE, data_hash=HOSTILE, detail={"data": HOSTILE})
        for row in data.evidence
    )
    assert data.machine is not None
    machine = replace(data.machine, cpu=HOSTILE, versions={HOSTILE: HOSTILE})
    text = page(replace(data, fit=changed, tensors=held, evidence=rows, machine=machine))
    outline = Outline(text)
    assert "alert(1)</script>" not in text and "<script>alert" not in text and "\u2028" not in text.split("<h2>")[3]
    assert [script.get("type") for script in outline.scripts].count(None) == 1
    for body in re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL):
        assert "<script" not in json.dumps(json.loads(body))


def test_interval_bars_place_value_and_threshold() -> None:
    row = measured("quality_loss", 0.03, low=0.02, high=0.04, n=24)
    bar = rows.interval_bar(row, 0.05)
    assert bar is not None and bar.limit is not None and "limit 5" in bar.label
    assert 0 <= bar.low < bar.value < bar.low + bar.width < bar.limit <= 100
    assert rows.interval_bar(measured("size_bytes", 100)) is None
    assert rows.interval_bar(measured("size_bytes", 100), 200) is not None
    assert rows.interval_bar(measured("quality_loss", 0.1, low=-math.inf, high=math.inf)) is None


def test_not_a_number_is_shown_as_such() -> None:
    row = measured("perplexity", math.nan)
    text = page(replace(bare(), evidence=(replace(row, artifact_id="a" * 64),)))
    assert "not a number" in text and "no interval" in text


def test_the_newest_evidence_counts_and_the_worst_data_decides() -> None:
    own = [measured("quality_loss", value, data_hash=data) for value, data in ((0.5, "a"), (0.1, "a"), (0.2, "b"))]
    data = replace(bare(), evidence=tuple(own))
    worst = data.latest("quality_loss")
    assert worst is not None and worst.value == 0.2
    assert [row.value for row in rows.latest_evidence(own)] == [0.1, 0.2]
    speeds = replace(
        bare(), evidence=(measured("accuracy", 0.9, data_hash="a"), measured("accuracy", 0.8, data_hash="b"))
    )
    found = speeds.latest("accuracy")
    assert found is not None and found.value == 0.8
    assert data.latest("accuracy") is None


def test_baselines_stand_beside_their_metric(sample: ReportData) -> None:
    beside = rows.baselines(sample)
    row = next(row for row in sample.evidence if row.metric == "perplexity")
    assert [text.split()[0] for text in beside[("perplexity", row.data_hash)]] == ["parent", "baseline"]
    assert "baseline_perplexity" not in [row.metric for row in rows.latest_evidence(sample.evidence)]
    assert "baseline_perplexity" in [row.metric for row in rows.latest_evidence([measured("baseline_perplexity", 9)])]


def test_data_are_named_as_people_call_them(sample: ReportData) -> None:
    assert sorted(sample.data_names.values()) == ["tinyshakespeare.txt", "wikitext-2.test.txt"]
    assert "on tinyshakespeare.txt" in page(sample) and sample.data_name("0" * 64) == "0" * 12


def test_blocks_and_roles_come_from_any_family_of_names() -> None:
    def grid(*names: str) -> bits.BlockGrid:
        rows = [tensor(name, 64, [(16, "u4g64")], 1.0) for name in names]
        return bits.block_grid(rows)

    language = bits.block_grid(tensors())
    assert language.blocks == tuple(map(str, range(30))) and len(language.roles) == 7 and len(language.names) == 210
    assert language.roles[0] == "q_proj" and "model.embed_tokens.weight" not in language.names
    convolution = grid("stem.conv.weight", "stages.0.conv1.weight", "stages.0.down.0.weight", "stages.10.conv1.weight")
    assert convolution.blocks == ("0", "10") and convolution.names == {
        "stages.0.conv1.weight", "stages.0.down.0.weight", "stages.10.conv1.weight",
    }  # fmt: skip
    two = grid("encoder.layer.0.q.weight", "decoder.layer.0.q.weight")
    assert sorted(two.roles) == ["decoder.layer.q", "encoder.layer.q"]
    same_end = grid("layers.0.attn.proj.weight", "layers.0.mlp.proj.weight")
    assert sorted(same_end.roles) == ["attn.proj", "mlp.proj"]
    assert grid("head.weight").roles == ()


def test_pictures_are_absent_without_data() -> None:
    assert plots.size_quality(bare()) is None and plots.loss_increase(bare()) is None and plots.memory(bare()) is None
    assert bits.bits(()) is None and bits.rows_bits(()) is None


def test_size_quality_shows_every_kind_of_point(sample: ReportData) -> None:
    picture = plots.size_quality(sample)
    assert picture is not None
    assert [trace["name"] for trace in picture.data] == [
        "menu, predicted", "rounds, predicted", "rounds, measured", "parent", "parent as downloaded",
        "this artifact",
    ]  # fmt: skip
    chosen = picture.data[-1]
    assert chosen["y"] == [pytest.approx(3.12)] and chosen["error_y"]["array"] == [pytest.approx(0.44)]
    assert len(picture.layout["shapes"]) == 2 and "budget" in picture.layout["annotations"][0]["text"]
    assert "cut off" in picture.says and len(picture.numbers.rows) == 21 + 2 + 3


def test_rows_of_an_embedding_are_drawn_by_class(sample: ReportData) -> None:
    picture = bits.rows_bits(sample.tensors)
    assert picture is not None
    bars = [trace for trace in picture.data if trace["type"] == "bar"]
    assert len(bars) == 3 and len({trace["marker"]["color"] for trace in bars}) == 3
    assert {trace["y"][0] for trace in bars} == {"embed_tokens"} and picture.numbers.rows[-1][1] == "32,768"


def test_the_loss_increase_is_that_of_the_plan(sample: ReportData) -> None:
    picture = plots.loss_increase(sample)
    assert picture is not None and "predicted" in picture.says
    assert picture.data[0]["x"][:2] == ["0", "1"] and picture.data[0]["x"][-1] == "embed_tokens"
    total = sum(tensor.loss_increase or 0 for tensor in sample.tensors)
    assert sum(picture.data[0]["y"]) == pytest.approx(total)


def test_memory_keeps_its_peak_when_thinned(sample: ReportData) -> None:
    samples = tuple((index / 4, "work", 100 + (900 if index == 1234 else 0)) for index in range(4000))
    picture = plots.memory(replace(sample, fit=sample.fit.model_copy(update={"memory": samples})))
    assert picture is not None
    assert len(picture.data[0]["y"]) <= 700 and max(picture.data[0]["y"]) == 1000 / 1e6
    assert picture.layout["shapes"][0]["y0"] == 1000.0
    full = plots.memory(sample)
    assert full is not None and len(full.data) == 6 and "nan" not in json.dumps(full.figure).lower()


def test_lineage_is_ordered_oldest_first() -> None:
    chain = [
        {"id": "m", "parents": ["p", "s"]}, {"id": "p", "parents": []}, {"id": "s", "parents": ["p", "d"]},
        {"id": "d", "missing": True},
    ]  # fmt: skip
    ordered = [row["id"] for row in oldest_first(chain)]
    assert sorted(ordered) == ["d", "m", "p", "s"] and ordered[-1] == "m" and ordered.index("p") < ordered.index("s")
    text = page(replace(bare(), manifests=({"id": "d" * 64, "missing": True},)))
    assert f"<code>{'d' * 12}</code> is not in this store" in text


def test_what_the_model_holds_counts_more_than_the_plan(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    names = ["layers.0.a.weight", "layers.1.a.weight"]
    rows = [tensor(name, 64, [(16, "c4g64")], 1.0) for name in names]
    body = plan(72_000).model_copy(update={"tensors": tuple(rows)})
    planned = artifact(store, "report", "plan", {Plan.file: body})
    parts = [[{"rows": 16, "format": "c4g64"}], [{"rows": 16, "format": "u8g32"}]]
    held = {name: {"shape": [16, 64], "parts": part} for name, part in zip(names, parts, strict=True)}
    packing = json.dumps({"format": 1, "tensors": held}).encode()
    model = artifact(store, "model", "quantize", {"model.safetensors": 9, "packing.json": packing}, [planned.id])
    first, second = gather(model, store).tensors
    assert first.loss_increase is not None and second.loss_increase is None and second.parts[0].format == "u8g32"


def test_bits_of_a_held_weight_are_those_on_disk() -> None:
    def held(fmt: str, rows: int, columns: int) -> TensorBits:
        weight = PackedWeight(shape=(rows, columns), parts=(PackedPart(format=fmt, rows=rows),))
        return of_packing(Packing(tensors={"a": weight}))[0]

    # a tile of 16 rows: codes, scales, row factors, filled up to 64 bytes
    assert held("c4g64", 32, 576).size_bytes == 2 * (16 * (576 // 2 + 9) + 32 + 16) + 16
    assert held("u8g32", 16, 64).bits_per_weight == pytest.approx(8 * (16 * (64 + 4) + 32) / 1024, rel=0.06)
    with pytest.raises(ArtifactError, match="bits is 7"):
        held("u7g64", 16, 64)
