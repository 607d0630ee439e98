"""One server process: uvicorn, and an end that keeps its promises.

On SIGTERM or SIGINT /readyz turns 503 and new work is refused with 503, while the port stays open so that load
balancers see it; running answers have a grace time to finish; then engines and sockets are closed and the process ends
with 0. A second signal ends the grace time at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn

from gulliver.core.errors import ConfigError
from gulliver.serve import logs
from gulliver.serve.app import make_app
from gulliver.serve.connections import Crowd
from gulliver.serve.state import State

SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKLOG = 2048
POLL_SECONDS = 0.05
CLOSE_SECONDS = 5.0  # for connections to close once nothing runs any more


class Server(uvicorn.Server):
    """uvicorn without its own signals: they are `serve`'s."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Stopped(KeyboardInterrupt):
    """A signal came before the server served. A KeyboardInterrupt: no boundary takes it for a fault of a library."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGINT raise Stopped in the block, until `run` takes them over; in a thread, nothing changes."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {name: signal.signal(name, stop) for name in SIGNALS}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. ConfigError when it is taken or not permitted.

    It listens at once: of two servers that load their models, both could bind the port, and the slower would fail late.
    """
    if not host:
        raise ConfigError("--host is empty; give an address, for example 127.0.0.1 (this machine) or 0.0.0.0 (all)")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{host} port {port} cannot be used ({reason}); choose another --port or --host") from None
    return found


def make_server(state: State) -> Server:
    """A server that has not begun. Access is logged by the gate, so uvicorn logs warnings alone."""
    protocol: Any = Crowd(state).protocol
    config = uvicorn.Config(
        make_app(state),
        http=protocol,
        loop="uvloop",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(CLOSE_SECONDS),
    )
    return Server(config)


def run(state: State, sock: socket.socket) -> None:
    """Serve on `sock` until a signal comes, then drain and return. Engines are closed by the caller."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each client takes a descriptor; the usual limit is 1024
    server = make_server(state)
    # A full collection comes when a quarter as many objects as it would look at are new; with the hundreds of thousands
    # of the models and libraries among them, requests that ended would stay for minutes. So those are not looked at.
    gc.collect()
    gc.freeze()
    gc.collect()  # resets the count of new objects
    uvicorn_loop: Any = server.config.get_loop_factory()
    with asyncio.Runner(loop_factory=uvicorn_loop) as runner, state.threads:
        runner.run(_serve(server, state, sock))


async def _serve(server: Server, state: State, sock: socket.socket) -> None:
    asked, hurried = asyncio.Event(), asyncio.Event()

    def stop() -> None:
        (hurried if asked.is_set() else asked).set()

    loop = asyncio.get_running_loop()
    for name in SIGNALS:
        loop.add_signal_handler(name, stop)
    serving = asyncio.ensure_future(server.serve(sockets=[sock]))
    while not server.started and not serving.done():
        await asyncio.sleep(POLL_SECONDS / 10)
    host, port = sock.getsockname()[:2]
    logs.event("serving", host=host, port=port, models=list(state.models))
    waiting = asyncio.ensure_future(asked.wait())
    await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        await drain(state, hurried)
        server.should_exit = True
    waiting.cancel()
    await serving
    logs.event("stopped")


async def drain(state: State, hurried: asyncio.Event) -> None:
    """Refuse new work; wait for what runs until it is done, the grace time is over, or `hurried` is set.

    What still runs then is cancelled in the engines, so that every client receives an error.
    """
    state.draining = True
    logs.event("draining", active=state.active, grace_seconds=state.settings.grace_seconds)
    loop = asyncio.get_running_loop()
    end = loop.time() + state.settings.grace_seconds
    while state.active and loop.time() < end and not hurried.is_set():
        await asyncio.sleep(POLL_SECONDS)
    if state.active:
        logs.event("grace_over", level=logs.WARNING, active=state.active)
        await asyncio.gather(*(asyncio.to_thread(model.engine.drain, 0.0) for model in state.models.values()))
        end = loop.time() + CLOSE_SECONDS
        while state.active and loop.time() < end:
            await asyncio.sleep(POLL_SECONDS)
