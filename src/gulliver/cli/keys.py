"""The command `keys`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gulliver.cli.options import KeysOptions
from gulliver.cli.session import Session
from gulliver.core.errors import ConfigError


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
