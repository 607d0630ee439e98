"""The measurements of the runtime: their statistics, and tables that are what the results draw."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results" / "runtime.json"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of benchmarks/ can be imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def a_summary(median: float, spread: float = 0.05) -> dict[str, Any]:
    low, high = median * (1 - spread), median * (1 + spread)
    return {"median": median, "low": low, "high": high, "n": 7, "confidence": 0.9844}


def sample(**changes: Any) -> dict[str, Any]:
    """Results with a row for each part, as runtime.py writes them."""
    speeds = {"gulliver fitted": 300.0, "gulliver 8-bit": 180.0, "llama.cpp Q4_K_M": 130.0, "llama.cpp Q4_0": 170.0}
    engines = {name: a_summary(speed) for name, speed in {**speeds, "llama.cpp Q8_0": 128.0}.items()}
    fitted = {"llama.cpp Q4_K_M": a_summary(2.3), "llama.cpp Q4_0": a_summary(1.76), "llama.cpp Q8_0": a_summary(2.3)}
    eight = {"llama.cpp Q4_K_M": a_summary(1.4), "llama.cpp Q4_0": a_summary(1.05), "llama.cpp Q8_0": a_summary(1.4)}
    long = {"llama.cpp Q4_0": a_summary(2.4), "OpenVINO GenAI int4": a_summary(0.9)}
    rows = {
        "decode": {
            "engines": engines,
            "ratios": {"gulliver fitted": fitted, "gulliver 8-bit": eight},
            "size_bytes": {"gulliver fitted": 72_000_000},
        },
        "bandwidth": {"share": {"gulliver large": a_summary(0.84)}},
        "prefill": {
            "engines": {"gulliver fitted": a_summary(1800.0), "OpenVINO GenAI int4": a_summary(1450.0)},
            "ratios": {"gulliver fitted": long},
            "prompt": 512,
            "share_of_peak": {"int8_gop_s": a_summary(0.5)},
        },
        "streams": {
            "engines": {"gulliver fitted": a_summary(1400.0), "llama.cpp Q4_0": a_summary(540.0)},
            "ratios": {"gulliver fitted": {"llama.cpp Q4_0": a_summary(2.6, 0.01)}},
            "streams": 16,
        },
        "overhead": {"overhead": {"median": 0.03, "low": 0.02, "high": 0.04}},
        "cold": {"seconds": a_summary(0.15), "beyond_file_bytes": 90_000_000},
        "load": {
            "clients": 200,
            "seconds": 180.0,
            "killed_share": 0.1,
            "errors": 0,
            "rss_bytes_per_minute": {"value": 1e5, "standard_error": 2e5},
            "p99_over_median": 4.0,
        },
        "two": {"workloads": {"1 + 1 streams": {"ratio": a_summary(1.0, 0.02)}}},
        "lookup": {"workloads": {"repeat": {"ratio": a_summary(1.9)}}},
        "reuse": {"workloads": {"shared": {"ratio": a_summary(3.0)}}},
        "quality": {"ratio": {"native": {"value": 1.002, "low": 1.001, "high": 1.003}}},
    }
    quiet = {"others_share": 0.01, "stolen_share": 0.0}
    return {
        "rows": [{"part": part, "key": part, **quiet, **row, **changes.get(part, {})} for part, row in rows.items()]
    }


# ---- statistics -----------------------------------------------------------------------------------------------------
def test_the_interval_of_a_median_covers_it_as_often_as_it_says() -> None:
    from runtime_common import summary

    random, true = np.random.default_rng(0), math.log(2)
    for count in (5, 7, 9, 20):
        found = [summary(list(random.exponential(size=count))) for _ in range(2000)]
        covered = np.mean([one["low"] <= true <= one["high"] for one in found])
        assert covered == pytest.approx(found[0]["confidence"], abs=0.02), count
    assert summary([1.0] * 5)["confidence"] < 0.95 <= summary([1.0] * 6)["confidence"]
    few, many = summary(list(range(1, 9))), summary(list(range(1, 10)))
    assert (few["low"], few["high"], many["low"], many["high"]) == (1, 8, 2, 8)


def test_ratios_are_taken_within_a_round() -> None:
    from runtime_common import paired

    drift = np.array([1.0, 0.5, 2.0, 0.7, 1.3, 0.9])
    found = paired(list(300 * drift), list(150 * drift))
    assert found["median"] == found["low"] == found["high"] == pytest.approx(2.0)
    with pytest.raises(ValueError, match="no pairs"):
        paired([1.0], [1.0, 2.0])


def test_engines_take_turns_and_each_begins_as_often() -> None:
    from runtime_common import in_turn

    asked: list[tuple[int, str]] = []

    def engine(name: str) -> Any:
        return lambda index: asked.append((index, name)) or float(len(asked))

    rounds = in_turn({name: engine(name) for name in "abc"}, 3)
    assert ["".join(name for index, name in asked if index == number) for number in range(3)] == ["abc", "bca", "cab"]
    assert rounds.values["a"] == [1.0, 6.0, 8.0]
    row = rounds.row(["a"])
    assert set(row["engines"]) == {"a", "b", "c"} and set(row["ratios"]["a"]) == {"b", "c"}


def test_the_slope_of_memory_has_an_error_that_noise_fits_into() -> None:
    from runtime_common import slope

    random, times = np.random.default_rng(1), list(np.arange(150.0))
    steep, error = slope(times, [5e8 + 1000 * t + 1e6 * random.standard_normal() for t in times])
    assert error < 3000 and abs(steep - 1000) < 3 * error
    with pytest.raises(ValueError):
        slope([1.0, 2.0], [1.0, 2.0])


def test_quantiles_are_values_that_were_there() -> None:
    from runtime_common import quantile

    values = [float(value) for value in range(1, 101)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile([3.0], 0.99)) == (50, 99, 3)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux's /proc")
def test_our_own_work_is_not_taken_for_that_of_others() -> None:
    from runtime_common import Watch, noisy

    with Watch() as watch:
        subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
    whole = watch.row["others_share"]
    burn = "import time\nend = time.time() + 1\nwhile time.time() < end: pass"
    with Watch() as other:
        process = subprocess.Popen([sys.executable, "-c", burn])  # not waited for: somebody else's, as far as it knows
        time.sleep(0.8)
    process.wait()
    assert other.row["others_share"] > 0.4 / (os.cpu_count() or 1)
    assert whole < 1
    assert noisy({"others_share": 0.04, "stolen_share": 0.02}) and not noisy({"others_share": 0.04, "stolen_share": 0})


def test_paired_losses_make_a_ratio_of_perplexities() -> None:
    from runtime_speed import loss_ratio

    base = list(np.random.default_rng(0).normal(3.0, 0.4, 24))
    found = loss_ratio([one + 0.01 for one in base[:6]], base)
    assert found["n"] == 6 and found["value"] == pytest.approx(math.exp(0.01), rel=1e-4)
    assert found["low"] == pytest.approx(found["high"], rel=1e-4), "the noise of the windows is common to both"
    random = np.random.default_rng(1)
    found = loss_ratio([one + random.normal(0, 0.02) for one in base], base)
    assert found["low"] < 1 < found["high"]


# ---- what a model asks of the machine -------------------------------------------------------------------------------
def write_model(folder: Path, tensors: dict[str, list[int]], config: dict[str, Any]) -> Path:
    header, end = {}, 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_and_operations_of_a_model(tmp_path: Path, tied: bool) -> None:
    from runtime_models import bytes_per_token, prefill_operations

    tensors = {"model.embed_tokens.weight": [100, 8], "model.layers.0.a.weight": [8, 8], "model.norm.weight": [8]}
    tensors |= {} if tied else {"lm_head.weight": [100, 8]}
    config = {"tie_word_embeddings": tied, "num_attention_heads": 2, "hidden_size": 8, "num_hidden_layers": 1}
    folder = write_model(tmp_path, tensors, config)
    assert bytes_per_token(folder) == 2 * (800 + 64 + 8), "one of the two tables is read whole"
    assert prefill_operations(folder, 10) == 2 * 10 * 64 + 2 * 100 * 8, "each query sees half of the keys"


def test_the_large_model_is_one_that_can_be_read(tmp_path: Path) -> None:
    from compress_llama import Shape
    from runtime_large import write_packed_llama

    from gulliver.tasks import get_task

    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "config.json").write_text('{"vocab_size": 200}', encoding="utf-8")
    write_packed_llama(tmp_path / "large", parent, Shape(layers=1, hidden=96, intermediate=160, heads=2))
    model = get_task("language").load(tmp_path / "large")
    weight = model.get_parameter("model.layers.0.mlp.down_proj.weight").detach()
    assert weight.shape == (96, 160) and float(weight.std()) == pytest.approx(0.02, rel=0.2)
    assert float(model.get_parameter("model.norm.weight").detach().sum()) == 96


class Counting:
    """A decoder that answers with the token after the last one, and knows what it was fed."""

    vocabulary, positions, block_tokens, cache_blocks, max_rows, shares_blocks = 50, 1024, 16, 4, 8, True

    def __init__(self) -> None:
        self.fed: list[int] = []

    def step(self, batch: Any) -> Any:
        assert list(batch.positions) == list(range(len(self.fed), len(self.fed) + len(batch.tokens)))
        self.fed += [int(token) for token in batch.tokens]
        return np.eye(self.vocabulary, dtype=np.float32)[(batch.tokens[batch.wanted] + 1) % self.vocabulary]


def test_a_sequence_is_fed_in_steps_that_the_decoder_takes() -> None:
    from runtime_ours import Sequence

    decoder = Counting()
    sequence = Sequence(decoder, 60)
    assert sequence.feed(range(20)).argmax(1).tolist() == [20], "the logits of the last token alone"
    assert sequence.feed([20]).argmax(1).tolist() == [21]
    assert sequence.feed(range(21, 40), all_logits=True).argmax(1).tolist() == list(range(22, 41))
    assert decoder.fed == list(range(40))


# ---- tables ---------------------------------------------------------------------------------------------------------
def test_every_part_has_a_place_in_the_table() -> None:
    from runtime import PARTS
    from runtime_table import claims

    for language in ("en", "zh"):
        from runtime_table import WORDS

        assert {claim.part for claim in claims(sample(), WORDS[language])} == set(PARTS)
    assert set(WORDS["en"]) == set(WORDS["zh"])


def test_a_verdict_is_that_of_the_unfavourable_end() -> None:
    from runtime_table import Claim

    def verdict(value: float, low: float, high: float, higher: bool = True) -> str | None:
        floor, target = (1.6, 2.4) if higher else (0.05, 0.02)
        return Claim("decode", "", value, low, high, floor, target, higher).verdict

    assert verdict(2.6, 2.41, 2.8) == "met"
    assert verdict(2.6, 2.39, 2.8) == "half"
    assert verdict(1.7, 1.5, 1.9) == "missed"
    assert verdict(0.015, 0.01, 0.019, higher=False) == "met"
    assert verdict(0.015, 0.01, 0.03, higher=False) == "half"
    assert verdict(0.04, 0.01, 0.06, higher=False) == "missed"
    assert Claim("quality", "", 1.0, 0.9, 1.1).verdict is None


def test_the_table_says_what_was_missed_and_what_was_noisy() -> None:
    from runtime_table import engines_table, runtime_table

    lines = runtime_table(sample()).splitlines()
    found = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    assert found["decode, fitted ÷ llama.cpp Q4_K_M"].endswith(
        "**2.30 ×** [2.18 ×, 2.42 ×] | 1.60 × | 2.40 × | floor |"
    )
    assert found["prefill of 512 tokens, fitted ÷ OpenVINO GenAI int4"].endswith("| below the floor |")
    assert found["16 streams over HTTP, total, fitted ÷ llama.cpp Q4_0"].endswith("| target |")
    assert not any("noisy" in line for line in lines)
    loud = runtime_table(sample(decode={"others_share": 0.2}))
    assert loud.count("(noisy)") == 3, "the claims of the noisy part alone"
    engines = engines_table(sample()).splitlines()
    assert engines[2] == "| gulliver fitted | 72 | 300 | 1800 | 1400 |"
    assert engines[-1] == "| OpenVINO GenAI int4 |  |  | 1450 |  |"


def test_errors_under_load_miss_the_floor() -> None:
    from runtime_table import runtime_table

    fine, failed = runtime_table(sample()), runtime_table(sample(load={"errors": 1}))
    told = "200 clients for 180 s, 10% broken off: errors but 429"
    assert next(line for line in fine.splitlines() if told in line).endswith("| 0 | 0 | target |")
    assert next(line for line in failed.splitlines() if told in line).endswith("| below the floor |")


def test_pages_are_drawn_from_the_results(tmp_path: Path) -> None:
    from runtime_table import draw_all

    results = tmp_path / "runtime.json"
    with pytest.raises(SystemExit, match="measure something first"):
        draw_all(results, tmp_path)
    results.write_text(json.dumps(sample()), encoding="utf-8")
    (tmp_path / "README.md").write_text("a\n<!-- table: runtime -->\nstale\n<!-- end table -->\nb\n", encoding="utf-8")
    assert draw_all(results, tmp_path) == [tmp_path / "README.md"]
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "decode, fitted ÷ llama.cpp Q4_0" in page and "stale" not in page and page.startswith("a\n")
    assert draw_all(results, tmp_path) == [], "drawn again, nothing changes"


def test_the_rows_of_our_results_are_complete() -> None:
    from runtime import PARTS

    if not RESULTS.exists():
        pytest.skip("benchmarks/results/runtime.json is not measured yet")
    for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]:
        assert row["part"] in PARTS
        assert all(row[name] for name in ("date", "machine", "versions", "threads", "wall_seconds")), row["part"]


@pytest.mark.parametrize("page, language", [("README.md", "en"), ("README.zh-CN.md", "zh")])
def test_the_tables_in_the_pages_are_what_the_results_draw(page: str, language: str) -> None:
    from compress_table import between
    from runtime_table import engines_table, runtime_table

    if not RESULTS.exists():
        pytest.skip("benchmarks/results/runtime.json is not measured yet")
    results, text = json.loads(RESULTS.read_text(encoding="utf-8")), (ROOT / page).read_text(encoding="utf-8")
    for name, table in (("runtime", runtime_table), ("engines", engines_table)):
        drawn = between(text, name)
        assert drawn in (None, table(results, language)), f"{page}: draw it again with benchmarks/runtime.py table"


# ---- the command ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words, told",
    [
        (["decode"], "decode needs --model"),
        (["--model", "{model}", "decode"], "decode needs --parent"),
        (["--model", "{model}", "--parent", "{model}", "quality"], "quality needs --data-folder"),
        (["--model", "{model}", "--parent", "{model}", "--home", "{model}", "decode"], "holds no llama.cpp"),
    ],
)
def test_a_missing_path_is_named(tmp_path: Path, words: list[str], told: str) -> None:
    from runtime import arguments, checked

    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match=told):
        checked(arguments([word.format(model=tmp_path) for word in words]))
