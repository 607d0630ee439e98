"""Three steps with no arithmetic to speak of, in a table of their own: they test the machinery that runs steps."""

from __future__ import annotations

from gulliver.pipeline.steps import Step

TABLE = (
    Step(
        "make",
        "toys.make:run",
        "toys.make:Config",
        needs=(),
        makes=("model",),
        reads=("source",),
        help="write a model of some size",
    ),
    Step(
        "shrink",
        "toys.shrink:run",
        "toys.shrink:Config",
        needs=("model",),
        makes=("model",),
        compresses=True,
        help="keep some of it",
    ),
    Step(
        "measure",
        "toys.measure:run",
        "toys.measure:Config",
        needs=("model",),
        optional=("parent",),
        makes=("report",),
        help="measure it",
    ),
)
