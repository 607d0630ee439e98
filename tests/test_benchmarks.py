"""The measured results: rows are complete, and the tables and the plot in the documents are what the results draw."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results" / "compress.json"
PEERS = BENCHMARKS / "results" / "peers.json"
HELD = 200_000_000


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of benchmarks/ can be imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def table(scripts: None) -> Any:
    import compress_table

    return compress_table


def peers() -> dict[str, Any]:
    return json.loads(PEERS.read_text(encoding="utf-8"))


def fitted(effort: str, size_bytes: int, ratio: float) -> dict[str, Any]:
    """A row as the part `fit` writes it."""
    around = {"value": ratio, "low": ratio - 0.01, "high": ratio + 0.01, "n": 24}
    return {
        "part": "fit",
        "key": f"{effort} {size_bytes}",
        "effort": effort,
        "size": f"{size_bytes / 1e6:.0f}MB",
        "outcome": "fitted",
        "parent": "p",
        "size_bytes": size_bytes,
        "evidence": {"perplexity_ratio": around},
        "independent": {"wikitext-2.test": {"ratio": ratio}},
        "domain_ratio": 1.25,
        "seconds": 600.0,
        "peak_rss_bytes": 1_500_000_000,
        "from_scratch": True,
    }


def sample(*rows: dict[str, Any]) -> dict[str, Any]:
    parent = {"wikitext-2.test": {"perplexity": peers()["parent"]["perplexity"]}}
    return {"parents": {"p": parent}, "rows": list(rows)}


# ---- what is committed ----------------------------------------------------------------------------------------------
def test_the_rows_of_the_peers_are_complete() -> None:
    data = peers()
    assert data["parent"]["perplexity"] > 1
    assert len({(row["engine"], row["type"]) for row in data["peers"]}) == len(data["peers"]) > 0
    for row in data["peers"]:
        told = f"{row['engine']} {row['type']}"
        assert all(row[name] for name in ("how", "date", "version", "machine", "versions")), told
        assert row["size_bytes"] >= row.get("tensor_bytes", 1) > 0, told
        assert row["ratio_to_parent"] == pytest.approx(row["perplexity"] / data["parent"]["perplexity"], abs=1e-4), told


def test_the_rows_of_our_results_are_complete() -> None:
    if not RESULTS.exists():
        pytest.skip("benchmarks/results/compress.json is not measured yet")
    for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]:
        assert row["seconds"] > 0, row["key"]
        assert {"torch", "transformers", "gulliver"} <= set(row["versions"]), row["key"]
        assert all(row[name] for name in ("part", "date", "machine")), row["key"]


@pytest.mark.parametrize(("page", "language"), [("README.md", "en"), ("README.zh-CN.md", "zh")])
def test_the_tables_of_a_page_are_drawn_from_the_results(page: str, language: str, table: Any) -> None:
    path = ROOT / page
    if not RESULTS.exists() or not path.exists():
        pytest.skip(f"{page} or benchmarks/results/compress.json is not there")
    text = path.read_text(encoding="utf-8")
    drawn = table.tables(table.load(RESULTS), table.load(PEERS), language)
    stands = {name: table.between(text, name) for name in drawn}
    for name, found in stands.items():
        assert found is None or found == drawn[name], f"{page}: run `python benchmarks/compress.py table`"


def test_the_plot_is_drawn_from_the_results(table: Any) -> None:
    path = ROOT / table.PLOT
    if not RESULTS.exists() or not path.exists():
        pytest.skip("the plot or the results are not there")
    drawn = table.picture(table.load(RESULTS), table.load(PEERS))
    assert path.read_text(encoding="utf-8") == drawn, "run `python benchmarks/compress.py table`"


# ---- how it is drawn ------------------------------------------------------------------------------------------------
def test_a_model_is_compared_with_the_peers_frontier(table: Any) -> None:
    small, poor, good = (
        table.Point(f"llama.cpp {n}", s, r) for n, s, r in [("a", 80, 1.1), ("b", 85, 1.3), ("c", 90, 1.05)]
    )
    peers = [small, poor, good]
    assert table.frontier(peers) == [small, good]
    assert table.next_peer(table.Point("ours", 84, 1.06, True), peers) is good, "not the poor one that is next in size"
    assert table.next_peer(table.Point("ours", 91, 1.06, True), peers) is None
    assert table.as_good(table.Point("ours", 84, 1.06, True), peers) is good
    assert table.as_good(table.Point("ours", 84, 1.01, True), peers) is None


def test_tables_replace_what_stands_between_the_markers(table: Any, tmp_path: Path) -> None:
    page = (
        "before\n<!-- table: compress -->\nold\n<!-- end table -->\n<!-- table: targets --><!-- end table -->\nafter\n"
    )
    (tmp_path / "README.md").write_text(page, encoding="utf-8")
    results = tmp_path / "compress.json"
    results.write_text(json.dumps(sample(fitted("high", 84_000_000, 1.04))), encoding="utf-8")
    table.draw_all(results, PEERS, tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert "| **gulliver high** | **84.0** | **1.0400** |" in text
    assert "| 10.0 min | 1.50 GB |" in text
    for name, drawn in table.tables(table.load(results), peers()).items():
        assert table.between(text, name) == drawn
    assert "high, 84 MB" in (tmp_path / table.PLOT).read_text(encoding="utf-8")


def test_a_fit_of_another_parent_is_not_beside_the_peers(table: Any, capsys: pytest.CaptureFixture[str]) -> None:
    results = sample(fitted("high", 84_000_000, 1.04))
    results["parents"]["p"]["wikitext-2.test"]["perplexity"] *= 1.1
    assert table.our_points(results, peers()) == []
    assert "left out" in capsys.readouterr().err


def test_the_plot_is_well_formed(table: Any) -> None:
    from xml.etree import ElementTree

    sizes = ((74, 1.12), (84, 1.05), (92, 1.03))
    results = sample(*(fitted("high", size * 10**6, ratio) for size, ratio in sizes))
    root = ElementTree.fromstring(table.picture(results, peers()))
    circles = [node for node in root.iter("{http://www.w3.org/2000/svg}circle") if node.get("class") == "ours"]
    assert len(circles) == len(sizes) + 1, "one for each model and one in the legend"


# ---- how it is measured ---------------------------------------------------------------------------------------------
def test_a_command_is_measured_from_outside(scripts: None) -> None:
    import compress_common

    done = compress_common.measured([sys.executable, "-c", f"held = bytes({HELD}) + b'x'; print('whole')"])
    assert (done.code, done.output) == (0, "whole\n")
    assert done.peak_rss_bytes > HELD
    assert done.seconds > 0


def test_measuring_needs_no_torch() -> None:
    """What this process holds counts in the peak of every command, so it must stay small."""
    told = "import sys, compress; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", told], cwd=BENCHMARKS, check=True)


def test_a_row_replaces_only_itself(scripts: None, tmp_path: Path) -> None:
    import compress_common

    results = compress_common.Results(tmp_path / "compress.json")
    for key, seconds in (("a", 1), ("b", 2), ("a", 3)):
        results.put("fit", key, {"seconds": seconds})
    assert [(row["key"], row["seconds"]) for row in results.read()["rows"]] == [("a", 3), ("b", 2)]
    assert results.has("fit", "b") and not results.has("memory", "b")


def test_stages_go_on_and_begin_anew_when_finished(scripts: None, tmp_path: Path) -> None:
    import compress_common

    calls: list[int] = []

    def produce() -> dict[str, int]:
        calls.append(1)
        return {"call": len(calls)}

    work = compress_common.Stages(tmp_path / "part", fresh=False)
    assert work.whole and work.stage("one", produce) == {"call": 1}
    work.home.mkdir()
    again = compress_common.Stages(tmp_path / "part", fresh=False)
    assert not again.whole and again.stage("one", produce) == {"call": 1}
    again.finish(keep=True)
    anew = compress_common.Stages(tmp_path / "part", fresh=False)
    assert anew.whole and anew.stage("one", produce) == {"call": 2}


def test_the_random_llama_is_one_that_transformers_reads(scripts: None, tmp_path: Path) -> None:
    import compress
    import compress_llama
    import torch
    from transformers import AutoModelForCausalLM

    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "config.json").write_text(json.dumps({"vocab_size": 320, "eos_token_id": 0}), encoding="utf-8")
    shape = compress_llama.Shape(layers=2, hidden=32, intermediate=64, heads=4)
    count = compress_llama.write_llama(tmp_path / "llama", parent, shape)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    assert count == model.num_parameters() == compress.parameter_count(tmp_path / "llama")
    weight = model.get_input_embeddings().weight
    assert weight.std().item() == pytest.approx(compress_llama.STANDARD_DEVIATION, rel=0.05)
    assert model.model.norm.weight.eq(1).all()
