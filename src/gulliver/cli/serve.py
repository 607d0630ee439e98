"""The command `serve`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gulliver.cli.options import ServeOptions
from gulliver.cli.session import Session
from gulliver.core.errors import ConfigError


def serve(options: ServeOptions, session: Session) -> tuple[Any, list[str]]:
    """Serve until a signal comes. ConfigError for a wrong option, a port that is taken, two models of one name."""
    from gulliver.core.quantities import parse_size
    from gulliver.serve import logs, process
    from gulliver.serve.app import make_state
    from gulliver.serve.keys import KeyRing
    from gulliver.serve.state import Settings

    settings = Settings(
        max_body_bytes=parse_size(options.max_body, "--max-body"),
        timeout_seconds=options.timeout,
        grace_seconds=options.grace,
    )
    logs.configure()
    keys = None
    if options.api_keys is not None:
        keys = KeyRing(Path(options.api_keys), lambda problem: logs.event("keys", level=logs.ERROR, problem=problem))
    named = named_models(options.models)
    sock = process.listen(options.host, options.port)
    models: list[Any] = []
    try:
        for name, spec in named:
            models.append(opened(name, spec, options, session))
        process.run(make_state(models, settings, keys), sock)
    finally:
        sock.close()
        for model in models:
            model.answerer.close()
    return {"served": [model.name for model in models]}, ["stopped"]


def named_models(specs: Sequence[str]) -> list[tuple[str, str]]:
    """(name, model) of each argument: NAME=MODEL, or MODEL under the last part of what it is called.

    ConfigError for an empty name and for one given twice.
    """
    found: list[tuple[str, str]] = []
    for spec in specs:
        name, sign, model = spec.partition("=")
        if not sign:
            model = spec
            name = Path(spec).resolve().name if Path(spec).exists() else spec.rstrip("/").rpartition("/")[2]
            name = name.removeprefix("catalog:").removeprefix("hf:").removesuffix(".gguf")
        if not name or not model:
            raise ConfigError(f"{spec!r} names no model; write MODEL or NAME=MODEL")
        if any(name == other for other, _ in found):
            raise ConfigError(f"two models would be called {name!r}; give one another name: NAME={model}")
        found.append((name, model))
    return found


def opened(name: str, spec: str, options: ServeOptions, session: Session) -> Any:
    """A model, loaded and ready to be served. A folder on this machine is used in place, without a store."""
    from gulliver.core.quantities import parse_size
    from gulliver.core.store.artifact import MANIFEST, open_artifact
    from gulliver.pipeline.ask import open_answerer
    from gulliver.serve.state import ServedModel
    from gulliver.tasks.answerer import OpenOptions

    opening = OpenOptions(
        threads=options.threads,
        cache_tokens=options.cache_tokens,
        slots=options.slots,
        queue=options.queue,
        backend=options.backend,
        isa=options.isa,
        max_ram_bytes=parse_size(options.ram, "--ram") if options.ram else None,
    )
    answerer = open_answerer(spec, opening, store=lambda: session.store, name=name, progress=session.progress)
    folder = answerer.folder
    artifact = open_artifact(folder) if (folder / MANIFEST).is_file() else None
    return ServedModel(
        name=name,
        answerer=answerer,
        artifact_id=artifact.id if artifact is not None else None,
        size_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    )
