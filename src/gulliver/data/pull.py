"""Step `pull`: a model (or a catalog dataset) from outside becomes an artifact, checked before it is believed.

Weights must be safetensors, finite, and of the shapes that config.json asks for. Nothing is unpickled and no code from
a model's folder is run. Names that transformers itself translates when it loads (older or re-packed checkpoints) are
written under the network's own names, so that every later step can read one tensor by name.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gulliver.core import catalog
from gulliver.core.context import Context
from gulliver.core.errors import ArtifactError, ConfigError, DataError
from gulliver.core.progress import plural
from gulliver.core.records import Origin
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.files import named_path
from gulliver.core.store.manifest import PACKING
from gulliver.data import read
from gulliver.data.options import PullOptions, ReadOptions
from gulliver.nets.files import INDEX, copy_companions, plain_files, weight_files
from gulliver.nets.kinds import model_config
from gulliver.nets.selection import select
from gulliver.nets.weights import canonical_names, read_safetensors
from gulliver.runtime.network import settled
from gulliver.tasks import converter, detect_task, foreign_files, get_task, rewriter
from gulliver.tasks.base import Task

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(cfg: PullOptions, inputs: dict[str, Artifact], ctx: Context) -> Artifact:
    """The artifact of `cfg.source`. ArtifactError for a model that cannot be used, DataError for a failed download."""
    origin = Origin(source=cfg.source)
    if cfg.source.startswith(catalog.PREFIX):
        entry = catalog.lookup(cfg.source)
        if entry.kind == "dataset":
            return read.run(ReadOptions.model_validate({"data": cfg.source, "task": entry.task}), {}, ctx)
        origin = Origin(source=cfg.source, license=entry.license)
        with ctx.progress.stage("download"):
            path = catalog.fetch(cfg.source, ctx.store.cache)
    elif cfg.source.startswith("hf:"):
        with ctx.progress.stage("download"):
            path = download(cfg.source.removeprefix("hf:"), ctx.store.cache)
        origin = Origin(source=cfg.source, revision=path.name)
    else:
        path = named_path(cfg.source)
        origin = Origin(source=path.name)
    return _model(path, cfg, origin, ctx)


def _model(path: Path, cfg: PullOptions, origin: Origin, ctx: Context) -> Artifact:
    if not path.exists():
        raise ConfigError(f"{cfg.source} does not exist; give a folder, a GGUF file, catalog:NAME or hf:ORG/NAME")
    foreign = foreign_files(path)
    if foreign or path.is_file():
        return _converted(foreign[0] if foreign else path, cfg, origin, ctx)
    name = cfg.task or detect_task(path)
    with ctx.writer(kind="model", task=name, config={"source": origin.source, "task": name}) as writer:
        with ctx.progress.stage("check"):
            found = bring_in(get_task(name), path, writer.path)
        files = weight_files(path)
        for note in found.notes:
            ctx.progress.print(f"{path.name}: {note}")
        origin.model_copy(
            update={
                "original_file": files[0].name if len(files) == 1 else None,
                "original_format": found.original,
                "original_bytes": sum(file.stat().st_size for file in files),
                "bfloat16_bytes": 2 * found.weights,
                "notes": "; ".join(found.notes) or None,
            }
        ).write(writer.path)
        return writer.commit()


def _converted(file: Path, cfg: PullOptions, origin: Origin, ctx: Context) -> Artifact:
    """The artifact of a model in another tool's format, whose converter checks every number."""
    name, convert = converter(file)
    if cfg.task not in (None, name):
        raise ConfigError(f"{file.name} holds a {name} model; leave --task out, or say {name}")
    with ctx.writer(kind="model", task=name, config={"source": origin.source, "task": name}) as writer:
        with ctx.progress.stage("convert"):
            found = convert(file, writer.path)
        if found.note:
            ctx.progress.print(f"{file.name}: {found.note}")
        origin.model_copy(
            update={
                "name": found.name,
                "original_file": found.files[0].name,
                "original_format": found.format,
                "original_bytes": sum(one.stat().st_size for one in found.files),
                "bfloat16_bytes": 2 * found.weights,
                "notes": found.note or None,
            }
        ).write(writer.path)
        return writer.commit()


# ---- the three sources ----------------------------------------------------------------------------------------------
def download(name: str, cache: Path) -> Path:
    """A model of the Hugging Face hub, "ORG/NAME" or "ORG/NAME@REVISION": safetensors, configs and tokenizer only."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repository, _, revision = name.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision or None,
            cache_dir=cache / "hub",
            allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "1_Pooling/config.json"],
            ignore_patterns=["onnx/*", "openvino/*", "original/*", "consolidated*", "*.fp16.safetensors"],
        )
    except HFValidationError as error:
        raise ConfigError(f"hf:{name} is not a model id on the hub; write it hf:ORG/NAME") from error
    except (HfHubHTTPError, OSError) as error:
        raise DataError(
            f"hf:{name} could not be downloaded: {str(error).splitlines()[0]}. Check the name and the network, "
            "or download the folder elsewhere and pull that"
        ) from error
    return Path(folder)


# ---- checking and copying -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Brought:
    """What is known of a model that was checked: how many weights its network has, and in which format they came.

    `notes` are sentences about what of the source was left out.
    """

    weights: int
    original: str
    notes: tuple[str, ...] = ()


def bring_in(task: Task, source: Path, folder: Path) -> Brought:
    """Check the model in `source` and put it into `folder`, which may be the same. ArtifactError if not whole."""
    if (source / PACKING).is_file():
        raise ArtifactError(f"{source} holds a model that is quantized already; pull the original in full precision")
    write = rewriter(source) if source != folder else None
    if write is not None:
        rewritten = write(source, folder)
        try:
            found = bring_in(task, folder, folder)
        except ArtifactError as error:  # of what was made of the source, which is what the user knows
            raise ArtifactError(str(error).replace(str(folder), str(source))) from error
        return replace(found, original=rewritten.format, notes=(*rewritten.notes, *found.notes))
    model = task.load(source, empty=True)
    dtype, whole = _checked(model, source)
    told = select(source).told()
    notes = (told,) if told else ()
    if not whole:
        loaded = task.load(source)  # which knows other names
        for parameter in loaded.parameters():
            parameter.data = narrowed(parameter.data, dtype)
        spare = getattr(loaded, "left_out", ())
        if spare:
            notes += (f"{type(loaded).__name__} has no place for {spare[0]} ({plural(len(spare), 'tensor')} left out)",)
        if source == folder:
            for file in (*weight_files(folder), folder / INDEX):
                file.unlink(missing_ok=True)
        task.save(loaded, folder)
    elif source != folder:
        selected = select(source)
        for file in (*selected.files, *([source / INDEX] if selected.places else [])):
            shutil.copyfile(file, folder / file.name)
        copy_companions(plain_files(source), folder, (Origin.file,))
        _settle(model, source, folder)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return Brought(weights, f"safetensors {str(dtype).removeprefix('torch.')}", notes)


def _checked(model: nn.Module, source: Path) -> tuple[torch.dtype, bool]:
    """The dtype of most weights in `source`, and whether they are all that the network has, under its own names.

    ArtifactError for a weight of a type, value or shape that cannot be.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    known = canonical_names(model)
    buffers = {name for name, _ in model.named_buffers()}
    found: set[str] = set()
    strange = False
    values = Counter[torch.dtype]()
    for name, tensor in read_safetensors(source):
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            raise ArtifactError(f"{name} is {tensor.dtype}; pull the model in bfloat16, float16 or float32")
        values[tensor.dtype] += tensor.numel()
        if name not in known:
            strange = strange or name not in buffers
        elif tuple(tensor.shape) != wanted[known[name]]:
            raise ArtifactError(
                f"{name} has shape {list(tensor.shape)}, but config.json makes it {list(wanted[known[name]])}; "
                "the config and the weights are of different models"
            )
        else:
            found.add(known[name])
    dtype = values.most_common(1)[0][0] if values else torch.float32
    return dtype, not strange and found == set(wanted)


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of any shape as `dtype` where that holds each of its values, else as it is."""
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _settle(model: nn.Module, source: Path, folder: Path) -> None:
    """Correct the copied config.json where the weights say something else."""
    raw = model_config(source)
    if (changed := settled(raw, model)) != raw:
        text = json.dumps(changed, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
