"""`gulliver bench`: what it measures, the workloads under it, and its intervals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine_samples import FakeDecoder, hashed
from language_samples import write_causal, write_encoder
from safetensors.torch import load_file, save_file

import gulliver
from gulliver.audit.measure import printed
from gulliver.cli.show import bench_table
from gulliver.core.errors import ConfigError, GulliverError
from gulliver.nets.files import stored_tensors, weight_files
from gulliver.pipeline import bench
from gulliver.runtime.decode import native_reason
from gulliver.runtime.workloads import bytes_per_token, workloads

Run = Callable[..., tuple[int, str, str]]
native_only = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))


@native_only
def test_everything_is_measured(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gulliver.pipeline.bench.COLD_STARTS", 1)
    folder = write_causal(tmp_path / "model")
    code, out, err = command("bench", folder, "--repeats", "2", "--threads", "1", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["backend"] != "reference" and found["threads"] == 1 and "native" in found["why"]
    for value in (found["prefill_tokens_per_s"], found["decode_tokens_per_s"], *found["streams"].values()):
        assert 0 < value["low"] <= value["median"] <= value["high"] and value["n"] == 2
    assert list(found["streams"]) == ["1", "4", "16"] or set(found["streams"]) == {"1", "4", "16"}
    assert found["file_bytes"] == sum(path.stat().st_size for path in weight_files(folder))
    assert found["memory"]["peak_beyond_file_bytes"] == found["memory"]["peak_ram_bytes"] - found["file_bytes"]
    assert found["bandwidth"]["bytes_per_token"] < found["file_bytes"] and found["bandwidth"]["gb_per_s"]["median"] > 0
    assert found["bandwidth"]["decode_share"]["median"] > 0
    cold = found["cold"]
    assert cold["prompt_tokens"] > 10 and 0 < cold["load_seconds"]["median"] < cold["first_token_seconds"]["median"]
    assert cold["rss_bytes"]["median"] < 250e6, "a process without torch is small"
    shown = "\n".join(bench_table(found))
    for word in ("prefill", "16 streams", "share of it", "beyond the file"):
        assert word in shown


def test_what_has_no_native_path_is_measured_on_the_other(tmp_path: Path) -> None:
    found = gulliver.bench(write_encoder(tmp_path / "encoder"), repeats=2, threads=1)
    assert found["backend"] == "reference" and "natively, because" in found["why"]
    assert found["examples_per_s"]["median"] > 0
    assert (found["streams"], found["bandwidth"], found["cold"]) == (None, None, None)
    assert "examples" in "\n".join(bench_table(found))


@pytest.mark.parametrize(
    ("options", "message"), [({"repeats": 1}, "repeats is 1"), ({"threads": 0}, "threads is 0"), ({"isa": "x"}, "x")]
)
def test_wrong_options(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises((ConfigError, GulliverError), match=message):
        gulliver.bench(write_causal(tmp_path / "model"), **{"repeats": 2, **options})


@pytest.mark.parametrize("write", [write_causal, write_encoder])
def test_a_weight_that_is_not_a_number_is_named_as_everywhere(
    command: Run, write: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = write(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name, tensor in sorted(weights.items()) if tensor.ndim == 2)
    weights[name][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for words in (["bench", folder, "--repeats", "2"], ["speed", folder], ["ask", folder, "hi"]):
        code, _, told = command(*words)
        assert code == 2 and f"error: {name} in " in told and "not finite" in told, told


def test_what_a_process_does_not_tell_is_no_bad_input() -> None:
    with pytest.raises(GulliverError, match="a try failed: the process ended with 3") as raised:
        printed([sys.executable, "-c", 'import sys; print(\'{"error": "Other"}\'); sys.exit(3)'], "a try")
    assert raised.value.exit_code == 1


@pytest.mark.parametrize("positions", [512, 40, 8])
def test_workloads_keep_the_rules_of_a_batch(positions: int) -> None:
    decoder = FakeDecoder(blocks=256, positions=positions, rule=lambda tokens: hashed(tokens[-2:]))
    work = workloads(decoder, (1, 4, 16))
    for _ in range(2):  # FakeDecoder fails on a block that two sequences write, a gap, a position too far
        units = {name: once() for name, once in work.items()}
    new = min(64, positions // 2)
    assert units["decode_tokens_per_s"] == new and units["prefill_tokens_per_s"] == min(512, positions - new)
    begun = min(16, positions - new)
    assert units["16"] == 16 * min(32, positions - begun) and units["4"] * 4 == units["16"]


def test_streams_continue_what_was_begun() -> None:
    decoder = FakeDecoder(blocks=256)
    work = workloads(decoder, (1, 4))
    alone: list[list[int]] = []
    for name in ("1", "4", "1"):
        decoder.batches.clear()
        work[name]()
        alone.append([int(batch.tokens[0]) for batch in decoder.batches[-32:]])
    assert alone[0] == alone[1] == alone[2] and len(set(alone[0])) > 4


def test_bytes_per_token_leave_out_an_embedding_that_is_only_looked_up(tmp_path: Path) -> None:
    tied, untied = write_causal(tmp_path / "tied"), write_causal(tmp_path / "untied", "llama-untied")
    embedding = stored_tensors(untied)["model.embed_tokens.weight"].length
    assert bytes_per_token(tied) == bytes_per_token(untied)
    assert bytes_per_token(untied) == sum(tensor.length for tensor in stored_tensors(untied).values()) - embedding


def test_the_interval_of_a_median() -> None:
    found = bench.summary([5.0, 1, 2, 3, 4, 6, 7, 8, 9])
    assert (found["median"], found["low"], found["high"], found["confidence"]) == (5, 2, 8, 0.9609)
    assert bench.summary([3.0, 1, 2]) == {"median": 2, "low": 1, "high": 3, "n": 3, "confidence": 0.75}
    dice = np.random.default_rng(0)
    summaries = [bench.summary(dice.normal(size=9).tolist()) for _ in range(2000)]
    hits = np.mean([row["low"] <= 0 <= row["high"] for row in summaries])
    assert 0.945 < hits < 0.98
