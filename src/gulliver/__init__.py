"""Gulliver: fit a large model into a stated budget on the machine you have, with every claim measured.

The public names are the steps of the table in pipeline/steps.py and the functions below, named as on the command line:
`gulliver.fit(model, size="64MB", data=…)`. They are imported when they are first used, so `import gulliver` is quick;
__init__.pyi, made from the same tables, tells editors what they take.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from gulliver.pipeline.steps import STEPS
from gulliver.tasks.family import named

__version__ = "0.1.0"

FUNCTIONS = {
    "ask": "gulliver.pipeline.ask:ask",
    "audit": "gulliver.pipeline.api:audit",
    "bench": "gulliver.pipeline.bench:bench",
    "fit": "gulliver.pipeline.fit:fit",
    "generate": "gulliver.pipeline.generate:generate",
    "list_artifacts": "gulliver.pipeline.api:list_artifacts",
    "run": "gulliver.pipeline.run:run_recipe",
    "show": "gulliver.pipeline.api:show",
    "verify": "gulliver.pipeline.api:verify",
}
"""Public functions that are not steps: name -> "module:function"."""

NAMES = sorted([*FUNCTIONS, *(row.name for row in STEPS)])
"""`__all__`."""


class _Package(ModuleType):
    """Public functions win over the stages of the same name: `gulliver.train` is the step, wherever the folder
    `train` has been imported from."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in NAMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return NAMES
    if name not in NAMES:
        raise AttributeError(f"module 'gulliver' has no attribute {name!r}; it has: {', '.join(NAMES)}")
    return named(FUNCTIONS[name]) if name in FUNCTIONS else named("gulliver.pipeline.api:step_function")(name)


def __dir__() -> list[str]:
    return [*NAMES, "__version__"]


sys.modules[__name__].__class__ = _Package
