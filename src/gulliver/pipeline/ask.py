"""Any model answers: `gulliver ask` and `gulliver.ask`. And the one way in which a model that users name is opened.

A folder on this machine is used where it lies: it is neither copied nor hashed, and for what the native backend runs
nothing here imports torch, so that the first word comes a fraction of a second after the command.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gulliver.core.errors import ArtifactError, ConfigError, DataError
from gulliver.core.progress import Progress
from gulliver.core.store.manifest import MANIFEST, ORIGIN, read_json
from gulliver.nets.selection import select
from gulliver.pipeline.spec import ID, Spec, local_folder
from gulliver.runtime.packing import is_packed
from gulliver.tasks import family, open_model
from gulliver.tasks.answerer import Answerer, Can, OpenOptions

if TYPE_CHECKING:
    from gulliver.core.store.store import Store


def open_store(home: Path | str | None = None, database_url: str | None = None) -> Store:
    """The store under `home` (default ~/.gulliver), its database there or at `database_url`; both are imported now."""
    from gulliver.core.store.store import Store

    return Store(home, database_url)


def open_answerer(
    spec: Spec,
    options: OpenOptions | None = None,
    *,
    store: Callable[[], Store],
    name: str | None = None,
    can: Can = "predict",
    progress: Progress | None = None,
) -> Answerer:
    """The model that `spec` names, ready to answer; `store` is called only where an artifact must be looked up or made.

    `name` is what it is called (default: its folder's name), `can` what it must be able to do. ConfigError when it is
    not, and for an option its family has no use for; BudgetError when the memory limit is too little; ArtifactError for
    a damaged model.
    """
    options = options or OpenOptions()
    found = local_folder(spec)
    if found is not None:
        folder, task = found
        _check(spec, task, can)
        if progress is not None and (told := select(folder).told()):
            progress.print(f"{folder.name}: {told}")
        try:
            return open_model(folder, task, name or own_name(folder) or folder.name, options)
        except ArtifactError:
            if (folder / MANIFEST).is_file() or is_packed(folder):
                raise
            # An older checkpoint, whose names `pull` translates, or a damaged one, of which it says what is wrong.
    folder, task = resolved(spec, store, progress)
    _check(spec, task, can)
    return open_model(folder, task, name or own_name(folder) or folder.name, options)


def own_name(folder: Path) -> str | None:
    """What the file that the model in `folder` was pulled from calls it, without spaces; None when it does not say."""
    if not (folder / ORIGIN).is_file():
        return None
    found = read_json((folder / ORIGIN).read_bytes(), ORIGIN)
    name = found.get("name") if isinstance(found, dict) else None
    return "-".join(name.split()) if isinstance(name, str) else None


def shown_name(answerer: Answerer) -> str:
    """The name of an open model for people: an artifact that has none is called by the first digits of its id."""
    return answerer.name[:12] if len(answerer.name) == 64 and ID.fullmatch(answerer.name) else answerer.name


def resolved(spec: Spec, store: Callable[[], Store], progress: Progress | None = None) -> tuple[Path, str]:
    """(folder, family) of a model that must be looked up or made."""
    from gulliver.pipeline.resolve import resolve_model  # after the lines that need no store: its database takes 30 MB

    artifact = resolve_model(spec, store(), progress=progress)
    return artifact.path, artifact.task


def _check(spec: Spec, task: str, can: Can) -> None:
    """ConfigError, before anything is opened, when models of the family cannot do what is asked."""
    if can not in family(task).can:
        raise ConfigError(f"{spec} is of the family {task}, whose models cannot {can}; use `gulliver ask`")


def ask(
    model: Spec | Answerer,
    input: str | Sequence[str] | Mapping[str, Any],
    *,
    options: OpenOptions | None = None,
    home: Path | str | None = None,
) -> dict[str, Any]:
    """One answer of a model of any family, as a JSON object.

    `input` is a request of the model's family as a mapping, or what a person would write: a prompt, texts, the path of
    a picture. DataError for a request that the family does not understand, naming the field.
    """
    if isinstance(model, Answerer):
        return answered(model, input).model_dump()
    with open_answerer(model, options, store=lambda: open_store(home)) as answerer:
        return answered(answerer, input).model_dump()


def answered(answerer: Answerer, input: str | Sequence[str] | Mapping[str, Any]) -> Any:
    """The response of an open model; see `ask`."""
    from pydantic import ValidationError

    try:
        if isinstance(input, Mapping):
            request = answerer.request_model.model_validate(input)
        else:
            request = answerer.read([input] if isinstance(input, str) else list(input))
    except ValidationError as failure:
        problem = failure.errors(include_url=False)[0]
        field = ".".join(map(str, problem["loc"])) or "the request"
        known = ", ".join(answerer.request_model.model_fields)
        raise DataError(f"{field}: {problem['msg'][:1].lower()}{problem['msg'][1:]}; a request has {known}") from None
    return answerer.answer(request)
