"""One request, one response: await a model's future; end its work when the client disconnects or at the time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Event
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.types import Receive

from gulliver.core.errors import GulliverError
from gulliver.serve.errors import gone, refused, timed_out
from gulliver.serve.state import RequestRecord, ServedModel, State


async def result_of(
    submit: Callable[[Event], Future[Any]], request: HttpRequest, state: State, model: ServedModel, call: RequestRecord
) -> Any:
    """What the future of `submit` gives, which is called in a thread of the model.

    The event given to it is set when nothing waits for the result. ApiError when the model refuses the request
    or fails on it, at the server's time limit, and when the client disconnected before.
    """
    stop = Event()
    watch = asyncio.ensure_future(disconnected(request.receive))
    future: asyncio.Future[Any] | None = None
    try:
        async with asyncio.timeout(state.left(call)):
            future = asyncio.wrap_future(await asyncio.wrap_future(model.threads.submit(submit, stop)))
            await asyncio.wait((future, watch), return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            call.finish = "gone"
            raise gone()
        result = future.result()
        call.finish = "stop"
        return result
    except GulliverError as error:
        call.finish = "error"
        raise refused(error, "input") from None
    except TimeoutError:
        call.finish = "timeout"
        raise timed_out() from None
    finally:
        stop.set()
        watch.cancel()
        if future is not None:
            future.cancel()


async def disconnected(receive: Receive) -> None:
    """Return when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass
