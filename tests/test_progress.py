"""Progress: plain lines, a terminal, silence, and the memory samples for the report."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace

import pytest

from gulliver.core import progress as progress_file
from gulliver.core.progress import Bar, Progress, plural


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_say_stage_block_time_left_and_memory() -> None:
    out = io.StringIO()
    progress = Progress(stream=out, line_every_s=0)
    with progress.stage("calibrate", total=3, unit="block") as bar:
        bar.advance(note="layers.0")
        bar.advance(2)
    first, second, last = out.getvalue().splitlines()
    assert first.startswith("calibrate: block 1 of 3, ") and " left, " in first and first.endswith("MB, layers.0")
    assert second.startswith("calibrate: block 3 of 3, 0:00 left, ")
    assert last.startswith("calibrate: 3 blocks in 0:")


@pytest.mark.parametrize(
    ("count", "unit", "text"),
    [
        (1, "batch", "1 batch"), (2, "batch", "2 batches"), (0, "batch", "0 batches"), (1, "token", "1 token"),
        (2, "token", "2 tokens"), (3, "query", "3 queries"), (2, "key", "2 keys"), (2, "pass", "2 passes"),
        (2, "percent", "2 percent"),
    ],
)  # fmt: skip
def test_units_are_counted_in_english(count: int, unit: str, text: str) -> None:
    assert plural(count, unit) == text


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_the_time_left_counts_what_each_unit_costs(stream: type[io.StringIO]) -> None:
    out = stream()
    progress = Progress(stream=out, line_every_s=0)
    with progress.stage("quantize", total=2, costs=(1, 9)) as bar:
        bar.started = time.monotonic() - 1000
        bar.advance()
        assert bar.left in (", 2:30:00 left", ", 2:29:59 left")
        if progress._bars is not None:
            progress._bars.refresh()
    assert "2:30:00 left" in out.getvalue() or "2:29:59 left" in out.getvalue()


def test_lines_are_seldom_and_an_unknown_total_has_no_time_left() -> None:
    out = io.StringIO()
    progress = Progress(stream=out, line_every_s=1e9)
    with progress.stage("read") as bar:
        for _ in range(100):
            bar.advance()
        assert (bar.count, bar.left) == ("100", "")
    assert len(out.getvalue().splitlines()) == 1


def test_quiet_is_silent_and_still_samples_memory() -> None:
    for out in (io.StringIO(), Terminal()):
        progress = Progress(quiet=True, stream=out)
        with progress.stage("distill", total=1) as bar:
            bar.advance(note="loss 1.0")
        progress.print("hello")
        assert out.getvalue() == "" and len(progress.memory) >= 2


def test_a_terminal_shows_nested_stages_and_is_left_clean() -> None:
    out = Terminal()
    progress = Progress(stream=out)
    with progress.stage("fit", total=2, unit="round") as outer:
        with progress.stage("quantize [x]", total=4, unit="block") as inner:
            inner.advance(2, note="[bold]layers.1")
            progress.print("a [note]")
        outer.advance()
    text = out.getvalue()
    assert "quantize [x]: 2 blocks" in text and "a [note]" in text and "fit: 1 round in" in text
    assert progress._bars is None


def test_an_error_inside_a_stage_goes_through_and_ends_it() -> None:
    out = Terminal()
    progress = Progress(stream=out)
    with pytest.raises(ZeroDivisionError), progress.stage("a"), progress.stage("b"):
        raise ZeroDivisionError
    assert progress._bars is None and progress._open == 0


def test_memory_samples_are_in_order_named_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_file, "MAX_SAMPLES", 50)
    progress = Progress(quiet=True)
    with progress.stage("first"):
        pass
    for _ in range(200):
        progress.sample("second", force=True)
    times = [seconds for seconds, _, _ in progress.memory]
    assert times == sorted(times) and len(times) <= 50 and times[0] == progress.memory[0][0]
    assert {stage for _, stage, _ in progress.memory} == {"first", "second"}
    assert all(rss > 2**20 for _, _, rss in progress.memory)


def test_samples_are_rare_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 1.1, 1.2, 1.3])
    monkeypatch.setattr(progress_file, "time", SimpleNamespace(monotonic=lambda: next(now)))
    progress = Progress(quiet=True)
    for _ in range(4):
        progress.sample("s")
    assert [seconds for seconds, _, _ in progress.memory] == [1.0, 1.3]


def test_time_left_is_what_the_pace_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_file, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    bar = Bar(Progress(quiet=True), "s", 10, "step", started=1000.0 - 3600.0)
    assert bar.left == ""
    bar.advance(4)
    assert bar.left == ", 1:30:00 left"
    monkeypatch.setattr(progress_file, "time", SimpleNamespace(monotonic=lambda: 1060.0))
    assert bar.left == ", 1:29:00 left"  # the estimate counts down between advances


def test_time_left_counts_what_units_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = Bar(Progress(quiet=True), "calibrate", 3, "block", costs=(1.0, 2.0, 7.0), started=0.0)
    monkeypatch.setattr(progress_file, "time", SimpleNamespace(monotonic=lambda: 30.0))
    bar.advance(2)
    assert bar.left == ", 1:10 left"


def test_time_left_counts_what_is_begun_and_not_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = Bar(Progress(quiet=True), "sample", 100, "example", started=0.0)
    monkeypatch.setattr(progress_file, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    bar.advance(60, found=True)
    assert bar.left == ""
    bar.advance(0, begun=10.0)
    assert bar.left == ", 50:00 left"
    bar.advance(20)
    assert bar.left == ", 16:40 left"
