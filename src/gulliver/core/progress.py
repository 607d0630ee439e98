"""Progress on stderr: stage, block, time left, memory. Keeps the memory samples that the report plots over time."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from gulliver.core.memory import current_rss_bytes

MAX_SAMPLES = 4000


class Progress:
    """Shows stages on a terminal as bars, elsewhere as one plain line about every ten seconds, or not at all.

    `memory` holds (seconds since the start, stage, resident bytes) in order of time, at most 4000 of them.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None, line_every_s: float = 10.0) -> None:
        self.memory: list[tuple[float, str, int]] = []
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._line_every_s = line_every_s
        self._start = time.monotonic()
        self._sample_every_s = 0.25
        self._last_sample = float("-inf")
        self._open = 0
        self._bars: Any = None

    @contextlib.contextmanager
    def stage(
        self, name: str, total: int | None = None, unit: str = "step", costs: Sequence[float] = ()
    ) -> Iterator[Bar]:
        """One stage of `total` units (None when unknown). Stages may be nested; the inner is shown below.

        `costs`: about how long each unit takes in its turn, in any measure, where they are not alike.
        """
        bar = Bar(self, name, total, unit, costs=costs)
        self.sample(name, force=True)
        self._open += 1
        if not self._quiet and self._stream.isatty():
            if self._bars is None:
                self._bars = _rich_bars(self._stream)
                self._bars.start()
            bar.row = self._bars.add_task(name, total=total, bar=bar, note="", memory=_memory())
        try:
            yield bar
        finally:
            self.sample(name, force=True)
            self._open -= 1
            if self._bars is not None:
                self._bars.remove_task(bar.row)
                if self._open == 0:
                    self._bars.stop()
                    self._bars = None
            self.print(f"{name}: {plural(bar.done, unit)} in {_clock(time.monotonic() - bar.started)}, {_memory()}")

    def sample(self, stage: str, *, force: bool = False) -> None:
        """Note the present memory under `stage`; at most four times a second unless forced."""
        now = time.monotonic() - self._start
        if not force and now - self._last_sample < self._sample_every_s:
            return
        self._last_sample = now
        self.memory.append((round(now, 3), stage, current_rss_bytes()))
        if len(self.memory) > MAX_SAMPLES:
            self.memory = self.memory[::2]
            self._sample_every_s *= 2

    def print(self, text: str) -> None:
        """One line of text on stderr, above the bars; nothing when quiet."""
        if self._quiet:
            return
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def _show(self, bar: Bar, note: str) -> None:
        self.sample(bar.name)
        if self._bars is not None:
            self._bars.update(bar.row, completed=bar.done, note=note, memory=_memory())
            return
        now = time.monotonic()
        if self._quiet or now - bar.last_line < self._line_every_s:
            return
        bar.last_line = now
        self.print(f"{bar.name}: {bar.unit} {bar.count}{bar.left}, {_memory()}{f', {note}' if note else ''}")


@dataclass
class Bar:
    """The handle of one stage; `advance` after each unit of work."""

    progress: Progress
    name: str
    total: int | None
    unit: str
    costs: Sequence[float] = ()
    done: int = 0
    begun: float = 0.0
    found: int = 0
    row: Any = None
    started: float = field(default_factory=time.monotonic)
    last_line: float = field(default_factory=time.monotonic)
    last_advance: float = field(default_factory=time.monotonic)

    def advance(self, units: int = 1, note: str = "", *, begun: float = 0.0, found: bool = False) -> None:
        """Count finished units and show `note` (a loss, a block's name) beside the bar.

        `begun`: how much is done, in units, of those that are not finished. `found`: an earlier run finished them.
        """
        self.done, self.begun, self.last_advance = self.done + units, begun, time.monotonic()
        self.found += units if found else 0
        self.progress._show(self, note)

    @property
    def count(self) -> str:
        """ "3 of 30", or "3" when the total is unknown."""
        return f"{self.done} of {self.total}" if self.total is not None else str(self.done)

    @property
    def left(self) -> str:
        """ ", 0:42 left" once it can be told: as foretold when the bar advanced last, less the time since."""
        if self.total is None or self.done > self.total:
            return ""
        spent, ahead = self.done - self.found + self.begun, self.total - self.done - self.begun
        if self.costs:
            spent, ahead = sum(self.costs[self.found : self.done]), sum(self.costs[self.done :])
        if spent <= 0:
            return ""
        seconds = (self.last_advance - self.started) * ahead / spent - (time.monotonic() - self.last_advance)
        return f", {_clock(max(0.0, seconds))} left"


def _rich_bars(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(task.fields["bar"].left.removeprefix(", "))

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    told = (TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("memory", "note"))
    return Bars(*columns, Left(), *told, console=Console(file=stream), transient=True)


def plural(count: int, noun: str) -> str:
    """ "1 batch", "2 batches", "0 tokens", "3 queries", "100 percent"."""
    if count == 1 or noun == "percent":
        return f"{count} {noun}"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{count} {noun[:-1]}ies"
    return f"{count} {noun}{'es' if noun.endswith(('s', 'x', 'z', 'ch', 'sh')) else 's'}"


def _memory() -> str:
    return f"{current_rss_bytes() / 1e6:.0f} MB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
