"""The command of a step: inputs by role, its options as text, one call."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from gulliver.cli.session import Session, described
from gulliver.pipeline.steps import Step, fields_of, options_class


def run_step(row: Step, given: Mapping[str, Any], session: Session) -> tuple[Any, list[str]]:
    """Call the step with what was given on the command line: its inputs, its options, `seed` and `out`."""
    from gulliver.pipeline.call import Call, call
    from gulliver.pipeline.resolve import resolve_inputs

    fields = fields_of(options_class(row))
    config = {name: _value(given[name], info.annotation) for name, info in fields.items() if name in given}
    roles = {role: given[role] for role in (*row.needs, *row.optional) if role in given}
    inputs = resolve_inputs(row, roles, config, session.store, session.progress)
    log: list[Call] = []
    made = call(
        row.name,
        config,
        inputs,
        store=session.store,
        seed=given.get("seed", 0),
        progress=session.progress,
        command=session.command,
        log=log,
    )
    return described(made, session, given.get("out"), reused=log[-1].reused)


def _value(text: Any, annotation: Any) -> Any:
    """An option's text as the field's type: text itself, or the JSON it holds, or a list cut at commas."""
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(text, str):
        return text
    readings: list[Any] = [text]
    with contextlib.suppress(ValueError):
        readings.append(json.loads(text))
    readings.append([_json_or_text(part.strip()) for part in text.split(",")])
    for reading in readings:
        with contextlib.suppress(ValidationError):
            TypeAdapter(annotation).validate_python(reading)
            return reading
    return text


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
