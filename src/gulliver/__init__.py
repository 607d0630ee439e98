"""Gulliver: fit a large model into a stated budget on the machine you have, with every claim measured.

The public names are the steps of the table in pipeline/steps.py and the functions below, named as on the command line:
`gulliver.fit(model, size="64MB", data=…)`. They are imported when they are first used, so `import gulliver` is quick;
__init__.pyi, made from the same tables, tells editors what they take.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from gulliver.core.names import named

__version__ = "0.1.0"

FUNCTIONS = {
    "ask": "gulliver.pipeline.ask:ask",
    "audit": "gulliver.pipeline.api:audit",
    "bench": "gulliver.pipeline.bench:bench",
    "fit": "gulliver.pipeline.fit:fit",
    "generate": "gulliver.pipeline.generate:generate",
    "list_artifacts": "gulliver.pipeline.api:list_artifacts",
    "repair": "gulliver.core.repair:repair",
    "run": "gulliver.pipeline.run:run_recipe",
    "show": "gulliver.pipeline.api:show",
    "verify": "gulliver.pipeline.api:verify",
    "verify_home": "gulliver.pipeline.api:verify_home",
}
"""Public functions that are not steps: name -> "module:function"."""


class _Package(ModuleType):
    """Public functions win over the stages of the same name: `gulliver.train` is the step, wherever the folder
    `train` has been imported from. So importing a folder sets no attribute, and `__getattr__` finds it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, ModuleType):
            super().__setattr__(name, value)


def _names() -> list[str]:
    """`__all__`. The table of steps is read when a name is asked for: an engine that opens a model needs none of it."""
    from gulliver.pipeline.steps import STEPS

    return sorted([*FUNCTIONS, *(row.name for row in STEPS)])


def __getattr__(name: str) -> Any:
    if name in FUNCTIONS:
        return named(FUNCTIONS[name])
    names = _names()
    if name == "__all__":
        return names
    if name in names:
        return named("gulliver.pipeline.api:step_function")(name)
    if f"gulliver.{name}" in sys.modules:
        return sys.modules[f"gulliver.{name}"]
    raise AttributeError(f"module 'gulliver' has no attribute {name!r}; it has: {', '.join(names)}")


def __dir__() -> list[str]:
    return [*_names(), "__version__"]


sys.modules[__name__].__class__ = _Package
