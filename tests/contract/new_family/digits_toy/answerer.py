"""An open network of the digits family: a sequence -> its next digit."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Event
from typing import Any, ClassVar

from gulliver.tasks.digits_toy.config import CONTEXT
from gulliver.tasks.digits_toy.requests import DigitResponse, DigitsRequest

from gulliver.runtime.batching.queue import BatchQueue
from gulliver.tasks.answerer import Batched, Can, OpenOptions, then


class DigitsAnswerer(Batched):
    """Sequences that wait together are answered together."""

    can: ClassVar[frozenset[Can]] = frozenset({"predict"})
    request_schema: ClassVar[str] = "gulliver.tasks.digits_toy.requests:DigitsRequest"
    response_schema: ClassVar[str] = "gulliver.tasks.digits_toy.requests:DigitResponse"
    family: ClassVar[str] = "digits_toy"

    def __init__(self, folder: Path, name: str, options: OpenOptions) -> None:
        super().__init__(folder, name, options)
        import torch
        from gulliver.tasks.digits_toy.network import load

        model = load(folder).eval()

        def tell(rows: Sequence[list[int]]) -> list[list[float]]:
            with torch.inference_mode():
                return model(torch.tensor(rows)).softmax(-1).tolist()

        self.engine = BatchQueue(name, tell, queue=options.queue)

    def read(self, words: Sequence[str]) -> DigitsRequest:
        """Digits, with or without spaces."""
        return DigitsRequest(digits="".join(words).replace(" ", ""))

    def submit(self, request: DigitsRequest, stop: Event | None = None) -> Future[Any]:
        return then(self.engine.submit([int(digit) for digit in request.digits[-CONTEXT:]], stop), _response)

    def show(self, response: DigitResponse) -> list[str]:
        """The digit with its probability."""
        return [f"{response.digit} ({response.probability:.0%})"]


def _response(probabilities: list[float]) -> DigitResponse:
    best = max(range(10), key=probabilities.__getitem__)
    return DigitResponse(digit=best, probability=probabilities[best])
