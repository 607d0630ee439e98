"""A model folder, opened to be served: its text side, the fastest decoder that runs it, and an engine over both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gulliver.core.errors import ConfigError
from gulliver.runtime.batching.engine import Engine
from gulliver.runtime.decode import open_decoder
from gulliver.runtime.text.tokenizer import Text


def load_engine(
    folder: Path,
    *,
    name: str | None = None,
    threads: int | None = None,
    cache_tokens: int | None = None,
    slots: int = 16,
    backend: str = "auto",
    isa: str = "auto",
    max_ram_bytes: int | None = None,
    **options: Any,
) -> Engine:
    """An engine that answers for the model in `folder`, called `name` (the folder's own name when not given).

    `threads`, `cache_tokens`, `backend`, `isa` and `max_ram_bytes` are for `open_decoder`; `options` are Engine's
    (`queue`, `lookup`, `reuse`, …). ArtifactError when the folder holds no usable model, ConfigError when it cannot
    generate text.
    """
    if slots < 1:
        raise ConfigError(f"slots is {slots}; it must be at least 1")
    text = Text(folder)
    decoder = open_decoder(
        folder,
        threads=threads,
        cache_tokens=cache_tokens,
        slots=slots,
        backend=backend,
        isa=isa,
        max_ram_bytes=max_ram_bytes,
    )
    return Engine(decoder, text, name or folder.name, slots=slots, **options)
