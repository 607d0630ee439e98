"""The commands `serve` and `keys`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gulliver.cli.options import KeysOptions, ServeOptions
from gulliver.cli.session import Session, opening
from gulliver.core.errors import ConfigError


def serve(options: ServeOptions, session: Session) -> tuple[Any, list[str]]:
    """Serve until a signal comes. ConfigError for a wrong option, a port that is taken, two models of one name.

    A signal while models are loaded ends it too, with nothing served.
    """
    from gulliver.core.quantities import parse_size
    from gulliver.serve import logs, process
    from gulliver.serve.app import make_state
    from gulliver.serve.hosts import checked_names
    from gulliver.serve.keys import KeyRing
    from gulliver.serve.state import Settings

    settings = Settings(
        max_body_bytes=parse_size(options.max_body, "--max-body"),
        timeout_seconds=options.timeout,
        grace_seconds=options.grace,
        host=options.host,
        allowed_hosts=tuple(sorted(checked_names(options.allowed_host))),
    )
    logs.configure()
    keys = None
    if options.api_keys is not None:
        keys = KeyRing(Path(options.api_keys), lambda problem: logs.event("keys", level=logs.ERROR, problem=problem))
    named = named_models(options.models)
    sock = process.listen(options.host, options.port)
    models: list[Any] = []
    try:
        _check_reach(options, sock.getsockname()[0])
        with process.stoppable():
            for name, spec in named:
                models.append(opened(name, spec, options, session))
            process.run(make_state(models, settings, keys), sock)
    except process.Stopped:
        return {"served": []}, ["stopped before it served"]
    finally:
        sock.close()
        for model in models:
            model.answerer.close()
    return {"served": [model.name for model in models]}, ["stopped"]


def _check_reach(options: ServeOptions, address: str) -> None:
    """ConfigError when others than this machine could reach a server that asks for no keys."""
    from gulliver.serve.hosts import is_loopback

    if options.api_keys is not None and options.without_keys:
        raise ConfigError("--api-keys and --without-keys exclude each other; leave one out")
    if options.api_keys is not None and options.allowed_host:
        raise ConfigError("--allowed-host is for a server without keys; with --api-keys every name is answered")
    if options.api_keys is None and not options.without_keys and not is_loopback(address):
        told = "make some (gulliver keys FILE --add NAME) and give --api-keys FILE, or insist with --without-keys"
        raise ConfigError(f"--host {options.host} lets other machines in, and there are no keys; {told}")


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
            name = name.removeprefix("catalog:").removeprefix("hf:")
            name = name[:-5] if name.lower().endswith(".gguf") else name
        if not name or not model:
            raise ConfigError(f"{spec!r} names no model; write MODEL or NAME=MODEL")
        if any(name == other for other, _ in found):
            raise ConfigError(f"two models would be called {name!r}; give one another name: NAME={model}")
        found.append((name, model))
    return found


def opened(name: str, spec: str, options: ServeOptions, session: Session) -> Any:
    """A model, loaded and ready to be served. A folder on this machine is used in place, without a store."""
    from gulliver.core.store.artifact import MANIFEST, open_artifact
    from gulliver.pipeline.ask import open_answerer
    from gulliver.pipeline.spec import ID
    from gulliver.serve.state import ServedModel

    if options.verify:
        verified(spec, session)
    how = opening(options, slots=options.slots, cache_tokens=options.cache_tokens, queue=options.queue)
    given = None if name == spec and ID.fullmatch(name) else name  # an id gives way to the name in the file
    answerer = open_answerer(spec, how, store=lambda: session.store, name=given, progress=session.progress)
    folder = answerer.folder
    name = answerer.name if given is None and answerer.name != folder.name else name
    artifact = open_artifact(folder) if (folder / MANIFEST).is_file() else None
    return ServedModel(
        name=name,
        answerer=answerer,
        artifact_id=artifact.id if artifact is not None else None,
        size_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
    )


def verified(spec: str, session: Session) -> None:
    """Hash the files of a model again. ArtifactError for one that differs, ConfigError where no hash was ever taken."""
    from gulliver.core.store.artifact import MANIFEST, open_artifact, verify
    from gulliver.pipeline.ask import resolved
    from gulliver.pipeline.spec import local_folder

    found = local_folder(spec) or resolved(spec, lambda: session.store, session.progress)
    if not (found[0] / MANIFEST).is_file():
        told = f"make an artifact of it first: gulliver pull {spec}"
        raise ConfigError(f"--verify: {spec} has no {MANIFEST} with hashes to compare its files with; {told}")
    verify(open_artifact(found[0]))


def keys(options: KeysOptions, session: Session) -> tuple[Any, list[str]]:
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
    rows = [{name: getattr(key, name) for name in ("name", *limits)} for key in read_keys(path)]
    lines = []
    for name, requests, tokens in (row.values() for row in rows):
        lines.append(f"{name}: {requests or 'any number of'} requests, {tokens or 'any number of'} tokens a minute")
    return {"keys": rows}, lines or ["no keys yet"]
