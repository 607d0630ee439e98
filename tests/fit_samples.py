"""Small efforts of `fit`, and a command line over the store of the toy language model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compress_samples import Lab

import gulliver
from gulliver.cli import main as cli
from gulliver.core.progress import Progress
from gulliver.core.store.artifact import Artifact
from gulliver.pipeline import fitting

SIZE = 60_000
SMALL: dict[str, dict[str, Any]] = {
    "sample": {"count": 8, "tokens": 160},
    "calibrate": {"examples": 8, "gradient_examples": 4},
    "plan": {"probe_rows": 4, "gptq": False},
    "quantize": {},
    "quality": {},
    "distill": {"steps": 2, "batch_size": 2},
}


@pytest.fixture(autouse=True)
def small_efforts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps in every effort, with smaller numbers; what an effort leaves out stays out."""
    given = {
        effort: {step: None if options is None else {**options, **SMALL[step]} for step, options in steps.items()}
        for effort, steps in fitting.EFFORTS.items()
    }
    monkeypatch.setattr(fitting, "EFFORTS", given)


def fit(lab: Lab, size: int | str = SIZE, **options: Any) -> Artifact:
    quiet = Progress(quiet=True)
    return gulliver.fit(lab.model, size=size, store=lab.store, progress=quiet, **({"data": lab.dataset} | options))


@pytest.fixture
def at_home(language: Lab, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A command line over the store of the toy language model."""

    def command(*words: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([*map(str, words), "--home", str(language.store.home), "--quiet"])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return command
