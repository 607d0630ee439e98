"""The commands `serve` and `keys`. Each is a row like those in commands.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gulliver.core.errors import ConfigError

MODEL_HELP = "what to serve, as MODEL or NAME=MODEL; MODEL is an artifact id, a folder, a .gguf file, catalog:… or hf:…"


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `serve`."""
    parser.add_argument("models", metavar="MODEL", nargs="+", help=MODEL_HELP)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default 8000)")
    parser.add_argument("--threads", type=int, help="threads of each model (default: one per core)")
    parser.add_argument("--slots", type=int, default=16, help="most completions in one step of a model (default 16)")
    parser.add_argument("--cache-tokens", type=int, help="tokens that a model's cache holds (default: by memory)")
    parser.add_argument("--queue", type=int, default=256, help="most requests that wait for a model (default 256)")
    parser.add_argument("--api-keys", metavar="FILE", help="serve only who has a key; see `gulliver keys`")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a request may take (default 600)")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds running answers get on SIGTERM (default 30)")
    parser.add_argument("--max-body", default="4MiB", help="longest body of a request (default 4MiB)")
    parser.add_argument("--ram", help="most memory of the whole process, e.g. 1GB; weights beyond it are read anew")
    parser.add_argument("--path", default="auto", help="what runs the models: auto, native or reference (default auto)")
    parser.add_argument("--isa", default="auto", help="instruction set of the native path, as doctor names it")


def serve(options: argparse.Namespace, session: Any) -> tuple[Any, list[str]]:
    """Serve until a signal comes. ConfigError for a wrong option, a port that is taken, two models of one name."""
    from gulliver.core.evidence.budget import parse_size
    from gulliver.serve import logs, process
    from gulliver.serve.app import make_state
    from gulliver.serve.keys import KeyRing
    from gulliver.serve.state import Settings

    for name in ("threads", "slots", "cache_tokens", "queue", "timeout"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    if options.grace < 0:
        raise ConfigError(f"--grace is {options.grace}; it must be 0 or more seconds")
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
            model.engine.close()
    return {"served": [model.name for model in models]}, ["stopped"]


def named_models(specs: Sequence[str]) -> list[tuple[str, str]]:
    """(name, model) of each argument: NAME=MODEL, or MODEL under the last part of what it is called.

    ConfigError for an empty name and for one that comes twice.
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


def opened(name: str, spec: str, options: argparse.Namespace, session: Any) -> Any:
    """A model, loaded and ready to be served. A folder on this machine is used where it lies, without a store."""
    from gulliver.core.errors import ArtifactError
    from gulliver.core.store.artifact import MANIFEST
    from gulliver.pipeline.generate import local_folder
    from gulliver.runtime.packing import is_packed

    folder = local_folder(spec)
    if folder is not None:
        try:
            return _loaded(name, folder, options)
        except ArtifactError:
            if (folder / MANIFEST).is_file() or is_packed(folder):
                raise
            # An older checkpoint, whose names `pull` translates, or a damaged one, of which it says what is wrong.
    from gulliver.pipeline.resolve import resolve_model  # after the lines that need no store: its database takes 30 MB

    artifact = resolve_model(spec, session.store, progress=session.progress)
    if artifact.task != "language":
        raise ConfigError(f"{spec} is of the family {artifact.task}; this server answers for language models")
    return _loaded(name, artifact.path, options)


def _loaded(name: str, folder: Path, options: argparse.Namespace) -> Any:
    from gulliver.core.evidence.budget import parse_size
    from gulliver.core.store.artifact import MANIFEST, open_artifact
    from gulliver.runtime.batching.encoder import Encoder, is_encoder
    from gulliver.runtime.batching.open import load_engine
    from gulliver.serve.state import ServedModel

    if is_encoder(folder):
        engine: Any = Encoder(folder, name, queue=options.queue, threads=options.threads)
        kind, backend, why = "embeddings", "reference", "sentence encoders run on the reference path (torch)"
    else:
        engine = load_engine(
            folder,
            name=name,
            threads=options.threads,
            cache_tokens=options.cache_tokens,
            slots=options.slots,
            queue=options.queue,
            backend=options.path,
            isa=options.isa,
            max_ram_bytes=parse_size(options.ram, "--ram") if options.ram else None,
        )
        kind, backend, why = "chat", engine.decoder.backend, engine.decoder.why
    artifact = open_artifact(folder) if (folder / MANIFEST).is_file() else None
    return ServedModel(
        name=name,
        kind=kind,
        engine=engine,
        folder=folder,
        artifact_id=artifact.id if artifact is not None else None,
        size_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        backend=backend,
        why=why,
        context=engine.context,
    )


def keys_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `keys`."""
    parser.add_argument("file", metavar="FILE", help="the file of keys; it holds their hashes, never the keys")
    parser.add_argument("--add", metavar="NAME", help="make a key, print it once, and keep its hash under this name")
    parser.add_argument("--remove", metavar="NAME", help="take a key out; running servers refuse it within a second")
    parser.add_argument("--requests-per-minute", type=int, metavar="N", help="limit of the new key (default: none)")
    parser.add_argument("--tokens-per-minute", type=int, metavar="N", help="limit of the new key (default: none)")


def keys(options: argparse.Namespace, session: Any) -> tuple[Any, list[str]]:
    """Make, remove or list keys. ConfigError for a name that is taken, unknown or malformed."""
    from gulliver.serve.keys import add_key, read_keys, remove_key

    del session
    path = Path(options.file)
    if options.add and options.remove:
        raise ConfigError("--add and --remove exclude each other; run the command twice")
    limits = {"requests_per_minute": options.requests_per_minute, "tokens_per_minute": options.tokens_per_minute}
    if not options.add and any(limit is not None for limit in limits.values()):
        raise ConfigError("limits belong to a new key; use them with --add NAME")
    if options.add:
        secret = add_key(path, options.add, **limits)
        return {"name": options.add, "key": secret}, [secret, "this is shown once; keep it safe"]
    if options.remove:
        remove_key(path, options.remove)
        return {"removed": options.remove}, [f"{options.remove} is removed"]
    rows = [
        {"name": key.name, "requests_per_minute": key.requests_per_minute, "tokens_per_minute": key.tokens_per_minute}
        for key in read_keys(path)
    ]
    lines = [
        f"{row['name']}: {row['requests_per_minute'] or 'any number of'} requests, "
        f"{row['tokens_per_minute'] or 'any number of'} tokens a minute"
        for row in rows
    ]
    return {"keys": rows}, lines or ["no keys yet"]
