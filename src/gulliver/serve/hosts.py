"""Which names a server without keys answers to, so that no web page reaches it through the browser of its user.

A page can point a name of its own at 127.0.0.1 after it was loaded (DNS rebinding): its requests come here, and the
browser believes that page and server are one. They still carry the page's name as Host, so a server that anyone may use
answers only to the loopback names and addresses, the address that the client reached (an address cannot be rebound),
and what `--allowed-host` names. A page that sends a request under our own name says in Origin where it comes from.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache
from http import HTTPStatus

from gulliver.core.errors import ConfigError
from gulliver.serve.errors import ApiError

MAX_AUTHORITY_BYTES = 300  # a name has at most 253, a port 5
WATCHED = frozenset((b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode"))
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\[\]:@/?#\s]+)(?::([0-9]{0,5}))?")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")


def name_of(authority: str) -> str | None:
    """The name or address in `name:port`, in small letters, without brackets and the final dot; None when malformed."""
    found = _AUTHORITY.fullmatch(authority) if len(authority) <= MAX_AUTHORITY_BYTES else None
    return found[1].strip("[]").removesuffix(".").lower() if found is not None else None


def is_loopback(name: str) -> bool:
    """Whether a name or address is this machine's alone: 127.0.0.0/8, ::1, localhost and the names below it."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def checked_names(names: Iterable[str]) -> frozenset[str]:
    """What `--allowed-host` names, as `name_of` writes it. ConfigError for what no Host header can be."""
    found = set()
    for name in names:
        try:
            address = ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            if not _NAME.fullmatch(name):
                told = "give a name or an address alone, for example models.example.org, without http:// and port"
                raise ConfigError(f"--allowed-host is {name[:80]!r}; {told}") from None
            found.add(name.lower())
        else:
            found.add(str(address))
    return frozenset(found)


class OwnNames:
    """The names of one server: loopback's, `bound` (its --host) and those of --allowed-host."""

    def __init__(self, bound: str, allowed: Iterable[str]) -> None:
        self._bound = name_of(f"[{bound}]" if ":" in bound else bound)
        self._allowed = checked_names(allowed)
        self._own = lru_cache(maxsize=256)(self._look)

    def check(self, headers: Iterable[tuple[bytes, bytes]], reached: str) -> None:
        """ApiError 403 for a request under a foreign name, or one that a page of another origin sends.

        `reached` is the address of this machine on which the connection came in.
        """
        asked: dict[bytes, bytes] = {}
        for name, value in headers:
            if name in WATCHED:
                if name in asked:
                    raise _foreign(f"the request has two headers {name.decode()}")
                asked[name] = value
        host = asked.get(b"host", b"")
        if not self._own(host, reached):
            raise _foreign("this server answers only its own names; allow another with --allowed-host NAME")
        origin = asked.get(b"origin")
        if origin is not None and not self._same(origin, host):
            raise _foreign("a page of another origin may not use this server; allow its name with --allowed-host NAME")
        followed = asked.get(b"sec-fetch-mode") == b"navigate"  # a link to the chat page
        if origin is None and asked.get(b"sec-fetch-site") == b"cross-site" and not followed:
            raise _foreign("a page of another site may not load this")

    def _look(self, authority: bytes, reached: str) -> bool:
        name = name_of(authority.decode("latin-1"))
        if name is None:
            return False
        return is_loopback(name) or name in self._allowed or name in (self._bound, reached.removeprefix("::ffff:"))

    def _same(self, origin: bytes, host: bytes) -> bool:
        """Whether a page's origin is the authority it asks, or a name that was allowed (a proxy may rewrite Host)."""
        _, sign, authority = origin.lower().partition(b"://")
        return bool(sign) and (authority == host.lower() or name_of(authority.decode("latin-1")) in self._allowed)


def _foreign(message: str) -> ApiError:
    return ApiError(HTTPStatus.FORBIDDEN, message, code="host_not_allowed")
