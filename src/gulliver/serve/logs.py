"""Structured logs: one JSON object a line on stderr. No prompt, no answer and no key is ever written.

An error is logged by its type and the places it passed, without its message: a message may repeat what a user sent.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from typing import Any, TextIO

import orjson

ERROR, WARNING, INFO = logging.ERROR, logging.WARNING, logging.INFO
LOGGER = logging.getLogger("gulliver.serve")
_FIELDS = "gulliver_fields"


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, event, and the fields given to `event`."""

    def format(self, record: logging.LogRecord) -> str:
        milliseconds = int(record.msecs)
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{moment}.{milliseconds:03d}Z", "level": record.levelname.lower()}
        fields = getattr(record, _FIELDS, None)
        line["event"] = record.msg if fields is not None else "message"
        if fields is not None:
            line.update(fields)
        else:
            line.update(logger=record.name, message=str(record.msg).strip())
        if record.exc_info and record.exc_info[1] is not None:
            line.update(failure(record.exc_info[1]))
        return orjson.dumps(line, default=str).decode()


def failure(error: BaseException) -> dict[str, Any]:
    """What may be logged of an error: its type, and file, line and function of the last places it passed."""
    places = traceback.extract_tb(error.__traceback__)[-8:]
    return {
        "error": type(error).__name__,
        "where": [f"{place.filename}:{place.lineno} {place.name}" for place in places],
    }


def event(name: str, *, level: int = INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Log one event. `fields` must hold neither text of users nor keys."""
    if LOGGER.isEnabledFor(level):
        LOGGER.log(level, name, extra={_FIELDS: fields}, exc_info=error)


def configure(stream: TextIO | None = None, level: int = INFO) -> None:
    """Send the server's and uvicorn's logs to `stream` (stderr) as JSON, once; uvicorn's own lines from warnings up."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, least in (("gulliver.serve", level), ("uvicorn.error", max(level, WARNING))):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(least)
        logger.propagate = False
