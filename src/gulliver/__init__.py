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
    from gulliver.api import audit, list_artifacts, show, verify
    from gulliver.bench import bench
    from gulliver.fit import fit
    from gulliver.generate import generate
    from gulliver.run import run_recipe as run

__version__ = "0.1.0"

__all__ = [
    "audit",
    "bench",
    "calibrate",  # pyright: ignore[reportUnsupportedDunderAll]
    "export",  # pyright: ignore[reportUnsupportedDunderAll]
    "fit",
    "generate",
    "heal",  # pyright: ignore[reportUnsupportedDunderAll]
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
    "audit": "gulliver.api:audit",
    "bench": "gulliver.bench:bench",
    "fit": "gulliver.fit:fit",
    "generate": "gulliver.generate:generate",
    "list_artifacts": "gulliver.api:list_artifacts",
    "run": "gulliver.run:run_recipe",
    "show": "gulliver.api:show",
    "verify": "gulliver.api:verify",
}
_FILES = ("audit", "bench", "fit", "generate", "run", "train")
"""Public functions that share their name with a file or folder of this package."""


class _CallableModule(ModuleType):
    """`gulliver.fit` is a file, which Python sets as an attribute when it is imported, and a function: be both."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return _function(self.__name__.rpartition(".")[2])(*args, **options)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FILES and isinstance(value, ModuleType):
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


def _function(name: str) -> Any:
    if name not in _FUNCTIONS:
        return importlib.import_module("gulliver.api").step_function(name)
    module, _, attribute = _FUNCTIONS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __getattr__(name: str) -> Any:
    if name in _FILES:
        return importlib.import_module(f"gulliver.{name}")
    if name in __all__:
        return _function(name)
    raise AttributeError(f"module 'gulliver' has no attribute {name!r}; it has: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


sys.modules[__name__].__class__ = _Package
