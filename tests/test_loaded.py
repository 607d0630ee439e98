"""A folder becomes an engine: names, sizes, switches, and folders that cannot be served."""

from __future__ import annotations

from pathlib import Path

import pytest
from language_samples import write_causal, write_encoder

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.runtime.batching.engine import Request, Sampling, load_engine


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_folder_is_opened_and_answers(backend: str, tmp_path: Path) -> None:
    folder = write_causal(tmp_path / "model")
    engine = load_engine(folder, backend=backend, threads=1, cache_tokens=256, slots=2, queue=3, lookup=False)
    assert engine.name == "model" and engine.context == 128
    prompt = tuple(engine.text.encode("the giant"))
    pieces = list(engine.stream(Request(prompt, 5, Sampling(temperature=0), ignore_end=True)))
    assert pieces[-1].completion_tokens == 5
    assert (engine.decoder.backend == "reference") or backend == "auto"
    engine.close()


def test_folders_that_cannot_be_served(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no language model head"):
        load_engine(write_encoder(tmp_path / "encoder"), backend="reference")
    with pytest.raises(ArtifactError):
        load_engine(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="slots is 0"):
        load_engine(tmp_path, slots=0)
