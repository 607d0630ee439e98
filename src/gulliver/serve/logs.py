"""Structured logs: one JSON object a line on stderr. No prompt, no answer and no key is ever written.

An error is logged by its type and the places it passed, without its message: a message may repeat what a user sent.
"""

from __future__ import annotations

import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, TextIO

import orjson

ERROR, WARNING, INFO = logging.ERROR, logging.WARNING, logging.INFO
LOGGER = logging.getLogger("gulliver.serve")


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, event, and the fields given to `event`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": moment.replace("+00:00", "Z"), "level": record.levelname.lower()}
        if isinstance(record.msg, dict):
            line |= record.msg
        else:
            line |= {"event": "message", "logger": record.name, "message": str(record.msg).strip()}
        if record.exc_info and record.exc_info[1] is not None:
            places = traceback.extract_tb(record.exc_info[2])[-8:]  # the last that it passed
            line["error"] = type(record.exc_info[1]).__name__
            line["where"] = [f"{place.filename}:{place.lineno} {place.name}" for place in places]
        return orjson.dumps(line, default=str).decode()


def event(name: str, *, level: int = INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Log one event. `fields` must hold neither text of users nor keys."""
    LOGGER.log(level, {"event": name, **fields}, exc_info=error)


def configure(stream: TextIO | None = None, level: int = INFO) -> None:
    """Send the server's and uvicorn's logs to `stream` (stderr) as JSON, once; uvicorn's own lines from warnings up."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, least in (("gulliver.serve", level), ("uvicorn.error", max(level, WARNING))):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(least)
        logger.propagate = False
