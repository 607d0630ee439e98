"""The network of the digits family: the last digits, looked up and joined, through two linear layers."""

from __future__ import annotations

import json
from pathlib import Path

from gulliver.tasks.digits_toy.config import CONTEXT, MODEL_TYPE
from safetensors.torch import save_file
from torch import Tensor, nn

from gulliver.core.errors import ArtifactError
from gulliver.nets.weights import assign, empty_parameters, unfilled
from gulliver.runtime.reference import read_tensors

WIDTH = 32


class DigitsNetwork(nn.Module):
    """int64 [batch, CONTEXT] -> logits float32 [batch, 10]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.table = nn.Embedding(10, WIDTH)
        self.hidden = nn.Linear(CONTEXT * WIDTH, 64 * size)
        self.head = nn.Linear(64 * size, 10)

    def looked_up(self, digits: Tensor) -> Tensor:
        """Activations of the first layer, float32 [batch, CONTEXT * WIDTH]."""
        return self.table(digits).flatten(1)

    def forward(self, digits: Tensor) -> Tensor:
        return self.head(self.hidden(self.looked_up(digits)).relu())


def load(folder: Path, empty: bool = False) -> DigitsNetwork:
    """The network in a folder, plain or packed. ArtifactError when it cannot be read."""
    path = folder / "config.json"
    try:
        size = int(json.loads(path.read_text(encoding="utf-8"))["size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} does not describe a network of digits: {error}") from error
    with empty_parameters():
        model = DigitsNetwork(size)
    if not empty:
        assign(model, read_tensors(folder))
        if unfilled(model):
            raise ArtifactError(f"{folder} holds no weights for {unfilled(model)[0]}")
    return model


def save(model: nn.Module, folder: Path) -> None:
    """Config and weights."""
    assert isinstance(model, DigitsNetwork)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["DigitsNetwork"], "model_type": MODEL_TYPE, "size": model.size}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()},
        folder / "model.safetensors",
    )
