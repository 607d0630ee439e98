"""The command `bench`."""

from __future__ import annotations

from typing import Any

from gulliver.cli.options import BenchOptions
from gulliver.cli.session import Session


def bench(options: BenchOptions, session: Session) -> tuple[Any, list[str]]:
    """Measure speed and memory now; the medians and their intervals."""
    from gulliver.pipeline.bench import bench, lines

    document = bench(**options.model_dump(), store=lambda: session.store, progress=session.progress)
    return document, lines(document)
