"""The client that others must not disturb: one stream after the other, and when each token came."""

from __future__ import annotations

import array
import contextlib
import http.client
import json
import time
from pathlib import Path

BREAK = -1.0
"""Stands in the file of times where a stream began anew, which is no gap between tokens."""


def stream(port: int, model: str, times: str) -> None:
    """Read streams until the process is killed; the moments (time.monotonic) of all tokens go into a file."""
    body = {"model": model, "prompt": "Once", "max_tokens": 1900, "stream": True, "ignore_eos": True, "temperature": 0}
    with open(times, "ab", buffering=0) as file:
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
                file.write(array.array("d", [BREAK, time.monotonic()]).tobytes())
                connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
                for line in connection.getresponse():
                    if line.startswith(b"data: {"):
                        file.write(array.array("d", [time.monotonic()]).tobytes())
                connection.close()
            time.sleep(0.01)


def gaps_between(times: Path, began: float, ended: float) -> list[float]:
    """Seconds between tokens, of the gaps that end after `began`; the one that has not ended by `ended` too.

    The wait for a stream's first token counts as one: a server that stands still shows there.
    """
    data = times.read_bytes()
    moments = array.array("d", data[: len(data) // 8 * 8])
    gaps, last = [], None
    for moment in moments:
        if moment == BREAK:
            last = None
            continue
        if last is not None and moment >= began:
            gaps.append(moment - last)
        last = moment
    if last is not None:
        gaps.append(ended - last)
    return gaps
