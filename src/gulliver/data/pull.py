"""Step `pull`: a model (or a catalog dataset) from outside becomes an artifact, checked before it is believed.

Weights must be safetensors, finite, and of the shapes that config.json asks for. Nothing is unpickled and no code from
a model's folder is run. Names that transformers itself translates when it loads (older or re-packed checkpoints) are
written under the network's own names, so that every later step can read one tensor by name.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import torch

from gulliver.core import catalog
from gulliver.core.context import Context
from gulliver.core.errors import ArtifactError, ConfigError, DataError
from gulliver.core.records import Origin
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.files import named_path
from gulliver.core.store.manifest import PACKING
from gulliver.data import read
from gulliver.data.options import PullOptions, ReadOptions
from gulliver.nets.files import INDEX, copy_companions, plain_files, weight_files
from gulliver.nets.weights import canonical_names, read_safetensors
from gulliver.tasks import converter, detect_task, get_task
from gulliver.tasks.base import Task

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


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
        raise ConfigError(f"{cfg.source} does not exist; give a folder, a .gguf file, catalog:NAME or hf:ORG/NAME")
    task, convert = converter(path) if path.is_file() else (detect_task(path), None)
    name = cfg.task or task
    with ctx.writer(kind="model", task=name, config={"source": origin.source, "task": name}) as writer:
        with ctx.progress.stage("check" if convert is None else "convert"):
            original = None if convert is None else convert(path, writer.path)
            weights, dtype = bring_in(get_task(name), path if convert is None else writer.path, writer.path)
        files = weight_files(path) if convert is None else [path]
        origin.model_copy(
            update={
                "original_file": files[0].name if len(files) == 1 else None,
                "original_format": original or f"safetensors {str(dtype).removeprefix('torch.')}",
                "original_bytes": sum(file.stat().st_size for file in files),
                "bfloat16_bytes": 2 * weights,
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
            ignore_patterns=["onnx/*", "openvino/*", "original/*"],
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
def bring_in(task: Task, source: Path, folder: Path) -> tuple[int, torch.dtype]:
    """Check the model in `source` and put it into `folder`, which may be the same. ArtifactError if not whole.

    Returns how many weights the network has, and the dtype of most of them as they came.
    """
    _refuse(source)
    files = weight_files(source)
    model = task.load(source, empty=True)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    known = canonical_names(model)
    buffers = {name for name, _ in model.named_buffers()}
    found: set[str] = set()
    strange = False
    values = Counter[torch.dtype]()
    for name, tensor in read_safetensors(source):
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            raise ArtifactError(f"{name} is {tensor.dtype}; pull the model in bfloat16, float16 or float32")
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{name} holds values that are not finite; the file is damaged or diverged")
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
    if strange or found != set(wanted):
        whole = task.load(source)  # which knows other names
        for parameter in whole.parameters():
            parameter.data = parameter.data.to(dtype)
        task.save(whole, folder)
    elif source != folder:
        for file in (*files, source / INDEX):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        copy_companions(plain_files(source), folder, (Origin.file,))
    return sum(parameter.numel() for parameter in model.parameters()), dtype


def _refuse(folder: Path) -> None:
    """ArtifactError for weights in a format that runs code, and for a model that is quantized already."""
    pickles = [file.name for pattern in PICKLES for file in sorted(folder.glob(pattern))]
    if pickles and not list(folder.glob("*.safetensors")):
        raise ArtifactError(
            f"{folder} holds its weights as {pickles[0]}, a format that can run code when it is opened; convert it "
            "with transformers: AutoModel.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))  # detect_task has read it
    if (folder / PACKING).is_file() or "quantization_config" in config:
        raise ArtifactError(f"{folder} holds a model that is quantized already; pull the original in full precision")
