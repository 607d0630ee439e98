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
from gulliver.tasks.answerer import Answerer, Can, OpenOptions, then, torch_only


class DigitsAnswerer(Answerer):
    """Sequences that wait together are answered together."""

    can: ClassVar[frozenset[Can]] = frozenset({"predict"})
    engine: BatchQueue[list[int], list[float]]
    context: None = None

    def __init__(self, folder: Path, name: str, options: OpenOptions) -> None:
        import torch
        from gulliver.tasks.digits_toy.network import load

        self.backend, self.why = torch_only("digits_toy", options)
        self.folder, self.name = folder, name
        model = load(folder).eval()

        def tell(rows: Sequence[list[int]]) -> list[list[float]]:
            with torch.inference_mode():
                return model(torch.tensor(rows)).softmax(-1).tolist()

        self.engine = BatchQueue(name, tell, queue=options.queue)

    @property
    def request_model(self) -> type[DigitsRequest]:
        return DigitsRequest

    @property
    def response_model(self) -> type[DigitResponse]:
        return DigitResponse

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


def open_answerer(folder: Path, name: str, options: OpenOptions) -> DigitsAnswerer:
    """The network in `folder`. ArtifactError when it cannot be read, ConfigError for an option it has no use for."""
    return DigitsAnswerer(folder, name, options)
