"""Gulliver: fit a large model into a stated budget on the machine you have, with every claim measured.

The public names are the steps of the table in steps.py and the commands of the command line, with the same names:
`gulliver.fit(model, size="64MB", data=…)`. They are imported when they are first used, so `import gulliver` is quick.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gulliver.pipeline.api import audit, list_artifacts, show, verify
    from gulliver.pipeline.bench import bench
    from gulliver.pipeline.fit import fit
    from gulliver.pipeline.generate import generate
    from gulliver.pipeline.run import run_recipe as run

__version__ = "0.1.0"

__all__ = [
    "audit",
    "bench",
    "calibrate",  # pyright: ignore[reportUnsupportedDunderAll]
    "distill",  # pyright: ignore[reportUnsupportedDunderAll]
    "export",  # pyright: ignore[reportUnsupportedDunderAll]
    "fit",
    "generate",
    "list_artifacts",
    "plan",  # pyright: ignore[reportUnsupportedDunderAll]
    "pull",  # pyright: ignore[reportUnsupportedDunderAll]
    "quality",  # pyright: ignore[reportUnsupportedDunderAll]
    "quantize",  # pyright: ignore[reportUnsupportedDunderAll]
    "read",  # pyright: ignore[reportUnsupportedDunderAll]
    "run",
    "sample",  # pyright: ignore[reportUnsupportedDunderAll]
    "show",
    "speed",  # pyright: ignore[reportUnsupportedDunderAll]
    "train",  # pyright: ignore[reportUnsupportedDunderAll]
    "verify",
]

_FUNCTIONS = {
    "audit": "gulliver.pipeline.api:audit",
    "bench": "gulliver.pipeline.bench:bench",
    "fit": "gulliver.pipeline.fit:fit",
    "generate": "gulliver.pipeline.generate:generate",
    "list_artifacts": "gulliver.pipeline.api:list_artifacts",
    "run": "gulliver.pipeline.run:run_recipe",
    "show": "gulliver.pipeline.api:show",
    "verify": "gulliver.pipeline.api:verify",
}


class _Package(ModuleType):
    """Public functions win over the stages of the same name: `gulliver.train` is the step, wherever the folder
    `train` has been imported from."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gulliver' has no attribute {name!r}; it has: {', '.join(__all__)}")
    if name not in _FUNCTIONS:
        return importlib.import_module("gulliver.pipeline.api").step_function(name)
    module, _, attribute = _FUNCTIONS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


sys.modules[__name__].__class__ = _Package
