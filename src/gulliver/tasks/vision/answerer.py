"""An open image classifier: a picture -> classes with probabilities."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, ClassVar

from gulliver.core.errors import DataError
from gulliver.core.foreign import read_bytes
from gulliver.core.store.files import named_path
from gulliver.runtime.batching.queue import BatchQueue
from gulliver.tasks.answerer import Batched, Can, OpenOptions, then

if TYPE_CHECKING:
    import numpy as np

    from gulliver.tasks.vision.requests import ImageRequest

MAX_BATCH = 32
SHOWN = 5
"""Classes shown on a terminal."""

MAX_FILE_BYTES = 2**28
"""A picture of the most pixels that are read, stored as they are."""


class VisionAnswerer(Batched):
    """Pictures that wait together are classified together."""

    can: ClassVar[frozenset[Can]] = frozenset({"predict"})
    request_schema: ClassVar[str] = "gulliver.tasks.vision.requests:ImageRequest"
    response_schema: ClassVar[str] = "gulliver.tasks.vision.requests:ClassesResponse"
    family: ClassVar[str] = "vision"
    engine: BatchQueue[Any, list[float]]

    def __init__(self, folder: Path, name: str, options: OpenOptions) -> None:
        super().__init__(folder, name, options)
        import numpy as np
        import torch

        from gulliver.tasks.vision.task import load_inception, read_config

        self._shape = read_config(folder).shape
        model = load_inception(folder).eval()

        def classify(images: Sequence[np.ndarray]) -> list[list[float]]:
            with torch.inference_mode():
                return model(torch.tensor(np.stack(images))).float().softmax(-1).tolist()

        self.engine = BatchQueue(name, classify, queue=options.queue, batch=MAX_BATCH)

    def read(self, words: Sequence[str]) -> Any:
        """The path of a picture, or its pixels as JSON."""
        if len(words) != 1:
            raise DataError(f"one picture is classified at a time; {len(words)} were given")
        with contextlib.suppress(ValueError, RecursionError):
            return self.request_model(image=json.loads(words[0]))
        if not (path := named_path(words[0])).is_file():
            told = f"{words[0][:80]!r} is neither the path of a picture nor a JSON list of pixels"
            raise DataError(f"{told}; give a PNG, JPEG, WebP, GIF or BMP file")
        return self.request_model(image=base64.b64encode(read_bytes(path, MAX_FILE_BYTES, DataError)).decode())

    def submit(self, request: ImageRequest, stop: Event | None = None) -> Future[Any]:
        from gulliver.tasks.vision.pictures import decoded, from_numbers

        image = request.image
        if isinstance(image, str):
            try:
                pixels = decoded(base64.b64decode(image, validate=True), self._shape)
            except ValueError as error:
                raise DataError(f"'image' is not base64: {error}; send the bytes of a picture's file") from None
        else:
            pixels = from_numbers(image, self._shape)
        return then(self.engine.submit(pixels, stop), self._response)

    def _response(self, probabilities: list[float]) -> Any:
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        return self.response_model(label=best, probabilities=probabilities)

    def show(self, response: Any) -> list[str]:
        """The likeliest classes, best first."""
        order = sorted(range(len(response.probabilities)), key=lambda label: -response.probabilities[label])
        return [f"class {label}: {response.probabilities[label]:.1%}" for label in order[:SHOWN]]
