"""Which files of a model folder are its weights: those that transformers would load. Knows no torch.

That is the file that config.json names, else `model.safetensors`, else what `model.safetensors.index.json` lists. Other
*.safetensors beside them are left aside: an adapter, Mistral's second copy (`consolidated.safetensors`), a
half-precision twin; and so is an index beside `model.safetensors`. Where there is neither, the files of other names are
taken together, since nothing else can be meant: one, or numbered shards without a gap.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gulliver.core.errors import ArtifactError
from gulliver.core.foreign import foreign, read_bytes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NAMED = "transformers_weights"
"""The key of config.json that names the weight file, or the index, where it is another."""
ADAPTER = "adapter_config.json"
MAX_HEADER_BYTES = 100_000_000
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
OTHER = re.compile(
    r"adapter|pytorch_lora|consolidated|optimizer|scheduler|training_args|random_states|non_lora|trainer"
)
"""How the names of files begin that are not a model's weights."""
ADAPTERS = ("adapter_model.*", "pytorch_lora_weights.*")
"""The files of an adapter, as peft and diffusers call them."""
MMPROJ = "mmproj"
"""How the name of a GGUF file begins that is the eyes or ears of a model, and not the model."""
_IN_ADAPTER = re.compile(
    r"base_model\.model\.|(.*[._])?(lora_|ia3_|hada_|lokr_|oft_|boft_|vera_|vblora_|randlora_|shira_|hra_u|bone_|"
    r"fourierft_|adaption_|prompt_embeddings|trainable_tokens_)"
)
"""How the names of peft's tensors begin, or a part of them: LoRA, IA³, LoHa, LoKr, OFT, VeRA, prompts and others."""
_SHARD = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})\.safetensors")


@dataclass(frozen=True)
class Selection:
    """The weight files of a folder; `places` is tensor -> file as the index says, {} where none is followed.

    `aside` are the names of the other *.safetensors, and of an index that is not followed. `usual` is whether the files
    have the names that transformers looks for.
    """

    files: tuple[Path, ...]
    aside: tuple[str, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)
    usual: bool = True

    def told(self) -> str:
        """One sentence about what was left aside and what was taken in its place, "" when there is nothing to say."""
        names = [path.name for path in self.files]
        taken = f"{names[0]} … {names[-1]}" if len(names) > 1 else names[0]
        if self.aside:
            return f"the weights are {taken}; left aside: {', '.join(self.aside)}"
        return "" if self.usual else f"there is neither {SINGLE} nor an index; {taken} was taken for the weights"


def select(folder: Path) -> Selection:
    """The weight files of a folder. ArtifactError, with the remedy, when there are none or it cannot be told."""
    present = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    present += [INDEX] if (folder / INDEX).is_file() else []
    named = _named(folder)
    first = named or next((name for name in (SINGLE, INDEX) if name in present), "")
    if first.endswith(".json"):
        places = _read_index(folder / first)
        chosen = sorted(set(places.values()))
        for name in chosen:
            if not (folder / name).is_file():
                raise ArtifactError(f"{folder / name} is listed in {first} but missing; download it again")
        present = [name for name in present if name != first]
        return _chosen(folder, present, chosen, places, usual=named is None)
    if first:
        return _chosen(folder, present, [first], usual=named is None)
    candidates = [name for name in present if not OTHER.match(name)]
    if not candidates:
        raise ArtifactError(without_weights(folder))
    shards = [found for found in map(_SHARD.fullmatch, candidates) if found]
    if len(shards) == len(candidates) and len({(found[1], int(found[3])) for found in shards}) == 1:
        missing = sorted(set(range(1, int(shards[0][3]) + 1)) - {int(found[2]) for found in shards})
        if missing:
            lacks = f"part {missing[0]} of {int(shards[0][3])} of {shards[0][1]}-…safetensors"
            raise ArtifactError(f"{folder} lacks {lacks}; download it again")
    return _chosen(folder, present, candidates, usual=False)


def _chosen(
    folder: Path, present: Sequence[str], names: Sequence[str], places: Mapping[str, str] | None = None, **more: Any
) -> Selection:
    aside = tuple(name for name in present if name not in names)
    return Selection(tuple(folder / name for name in names), aside, places or {}, **more)


def _named(folder: Path) -> str | None:
    """The file that config.json names for the weights, before all others; None where it names none."""
    try:
        named = json.loads(read_bytes(folder / "config.json", MAX_HEADER_BYTES))[NAMED]
    except (ArtifactError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if named is None:
        return None
    known = isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json"))
    if not known or Path(named).name != named or not (folder / named).is_file():
        told = f"{folder / 'config.json'} says that the weights are in {str(named)[:200]!r} ({NAMED})"
        raise ArtifactError(f"{told}, which is not a safetensors file in the folder; download it, or remove the key")
    return str(named)


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> file. ArtifactError for what is not an index, or names a file outside its folder."""
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise ArtifactError(f"{path} has {path.stat().st_size} bytes; at most {MAX_HEADER_BYTES} are allowed")
    with foreign(f"{path} is not a safetensors index"):
        places = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"].items())
        plain = all(isinstance(name, str) and Path(name).name == name for name in places.values())
    if not plain:
        raise ArtifactError(f"{path} names a file outside its folder; do not use it")
    if not places:
        raise ArtifactError(f"{path} lists no tensor; download it again")
    return places


def without_weights(folder: Path) -> str:
    """Why a folder has no weights that can be read, and what to do."""
    if holds_adapter(folder):
        return adapter(folder)
    if any(folder.glob("consolidated*")):
        return (
            f"{folder} holds weights in the layout of Mistral's or Meta's own code (consolidated…), without the "
            f"{SINGLE} of the Hugging Face layout; download the model in that layout"
        )
    pickles = [file.name for pattern in PICKLES for file in sorted(folder.glob(pattern)) if not OTHER.match(file.name)]
    if pickles:
        return (
            f"{folder} holds its weights as {pickles[0]}, a format that can run code when it is opened; convert it "
            "with transformers: AutoModel.from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    found = sorted(folder.glob("*.gguf"))
    models = [file for file in found if not file.name.lower().startswith(MMPROJ)]
    if models:
        return f"{folder} has no *.safetensors; bring {models[0].name} in with `gulliver pull {models[0]}`"
    if found:
        return f"{folder} holds only {found[0].name}, what a model sees or hears with; download the model's .gguf too"
    return f"{folder} has no *.safetensors; download the weights too"


def holds_adapter(folder: Path) -> bool:
    """Whether an adapter's config or weights are in a folder, by their names; a whole model may be beside them."""
    return (folder / ADAPTER).is_file() or any(any(folder.glob(pattern)) for pattern in ADAPTERS)


def of_adapter(names: Collection[str]) -> bool:
    """Whether all of a folder's tensors, by their names, are an adapter's."""
    return bool(names) and all(_IN_ADAPTER.match(name) for name in names)


def adapter(folder: Path) -> str:
    """What to say of a folder that holds an adapter and not its base model."""
    try:
        raw = json.loads(read_bytes(folder / ADAPTER, MAX_HEADER_BYTES))
        base, kind = str(raw.get("base_model_name_or_path") or ""), str(raw.get("peft_type") or "")
    except (ArtifactError, ValueError, AttributeError, RecursionError):
        base, kind = "", ""
    return (
        f"{folder} holds an adapter ({kind or 'LoRA'}), not a whole model: its base model is {base or 'not named'}; "
        "merge the two with peft (merge_and_unload, then save_pretrained) and give the merged folder"
    )
