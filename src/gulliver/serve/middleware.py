"""What every HTTP request passes, as plain ASGI: key, limits, size of the body, and the log line at the end."""

from __future__ import annotations

import asyncio
import time
from http import HTTPMethod, HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gulliver.core.memory import give_back_freed_memory
from gulliver.serve import logs
from gulliver.serve.errors import CLIENT_CLOSED, ApiError, crowded, draining
from gulliver.serve.hosts import OwnNames
from gulliver.serve.state import CALL, RequestRecord, Route, State

LARGE_BODY_BYTES = 2**18
GIVE_BACK_SECONDS = 0.5  # after a large body; once for all that end meanwhile
GUARDED = ("/v1/", "/api/")  # paths that need a key where there are keys; the page, health and metrics do not


class Middleware:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app = app
        self._state = state
        settings = state.settings
        self._gives_back = False
        self._names = OwnNames(settings.host, settings.allowed_hosts) if state.keys is None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = RequestRecord()
        scope[CALL] = call
        route = self._state.route(scope["path"])
        works = route is not None and route.costs
        self._state.active += works

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_headers(call)]
            await send(message)

        try:
            self._admit(scope, call, route)
            await self._app(scope, self._limited(scope, call, receive), sent)
        except ApiError as error:
            await error.response()(scope, receive, sent)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a library in another language may raise past Exception
            logs.event("failure", level=logs.ERROR, error=error, request=call.id, path=_shown(route))
            if call.status:
                raise  # the answer has begun; only closing the connection tells the client
            failed = ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed on this request; see its log")
            await failed.response()(scope, receive, sent)
        finally:
            self._state.active -= works
            self._note(scope, call, route)

    def _admit(self, scope: Scope, call: RequestRecord, route: Route | None) -> None:
        """ApiError when the request is refused before its body is read."""
        if self._names is not None:
            self._names.check(scope["headers"], scope["server"][0] if scope.get("server") else "")
        if self._state.crowded and not (route is not None and route.quiet):
            raise crowded()
        headers = {name: value for name, value in scope["headers"] if name in (b"authorization", b"content-length")}
        keys = self._state.keys
        if keys is not None and scope["path"].startswith(GUARDED):
            kind, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
            call.caller = keys.find(key.strip() if kind.lower() == "bearer" else "")
            if call.caller is None:
                message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                raise ApiError(HTTPStatus.UNAUTHORIZED, message, code="invalid_api_key")
        if route is None or not route.costs or scope["method"] != "POST":
            return
        if self._state.draining:
            raise draining()
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._state.settings.max_body_bytes:
            raise self._too_long()
        if call.caller is not None and (short := call.caller.admit()) is not None:
            message = f"rate limit reached for this key ({short[0]} per minute); retry in {short[1]:.0f} s"
            code = "rate_limit_exceeded"
            raise ApiError(HTTPStatus.TOO_MANY_REQUESTS, message, code=code, retry_after=short[1])

    def _too_long(self) -> ApiError:
        message = f"the body is longer than {self._state.settings.max_body_bytes} bytes"
        return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, code="body_too_long")

    def _limited(self, scope: Scope, call: RequestRecord, receive: Receive) -> Receive:
        """`receive` with a limit on the body's bytes and time; past the body it is untouched."""
        if scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            return receive
        settings = self._state.settings
        deadline = asyncio.get_running_loop().time() + settings.body_seconds
        whole = False

        async def limited() -> Message:
            nonlocal whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                message = "the body did not arrive in time"
                raise ApiError(HTTPStatus.REQUEST_TIMEOUT, message, code="request_timeout") from None
            call.body_bytes += len(message.get("body", b""))
            if call.body_bytes > settings.max_body_bytes:
                raise self._too_long()
            whole = not message.get("more_body", False)
            return message

        return limited

    def _note(self, scope: Scope, call: RequestRecord, route: Route | None) -> None:
        """Count, charge and log."""
        if call.body_bytes > LARGE_BODY_BYTES and not self._gives_back:
            self._gives_back = True
            asyncio.get_running_loop().call_later(GIVE_BACK_SECONDS, self._give_back)
        path = _shown(route)
        status = call.status or CLIENT_CLOSED
        seconds = time.monotonic() - call.arrived
        metrics = self._state.metrics
        metrics.requests.labels(path, _method(scope), str(status), call.model).inc()
        metrics.seconds.labels(path).observe(seconds)
        tokens = call.prompt_tokens + call.completion_tokens
        if call.caller is not None and tokens:
            call.caller.charge(tokens)
        if route is not None and route.quiet and status < HTTPStatus.BAD_REQUEST:
            return
        fields = {"request": call.id, "method": _method(scope), "path": path, "status": status}
        fields["milliseconds"] = round(seconds * 1000, 1)
        if call.caller is not None:
            fields["key"] = call.caller.key.name
        if call.model:
            counts = ("choices", "finish", "prompt_tokens", "cached_tokens", "completion_tokens")
            fields |= {name: getattr(call, name) for name in ("model", *counts)}
        if call.first_token is not None:
            fields["first_token_milliseconds"] = round((call.first_token - call.arrived) * 1000, 1)
        logs.event("request", **fields)

    def _give_back(self) -> None:
        """Return what large bodies left behind to the system: glibc would keep it for ever."""
        self._gives_back = False
        asyncio.get_running_loop().run_in_executor(None, give_back_freed_memory, False)


def _headers(call: RequestRecord) -> list[tuple[bytes, bytes]]:
    """What every answer carries."""
    headers = [(b"x-request-id", call.id.encode()), (b"x-content-type-options", b"nosniff")]
    return headers + call.caller.headers() if call.caller is not None else headers


def _shown(route: Route | None) -> str:
    """The path as it is counted and logged: what clients choose is not kept."""
    if route is None:
        return "other"
    start, brace, _ = route.path.partition("{")
    return start + "…" if brace else start


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in HTTPMethod.__members__ else "other"
