"""The tokenizer beside a model's weights, through transformers; and the one that a fresh network reads bytes by."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gulliver.core.errors import ArtifactError
from gulliver.nets.quiet import quiet

END_OF_TEXT = "<|end|>"
BYTE_VOCABULARY = 257
"""A fresh network reads bytes; id 256 ends a text."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder. ArtifactError when there is none."""
    stamp = max((file.stat().st_mtime_ns for file in folder.glob("*token*")), default=0)
    return _tokenizer(str(folder), stamp)


@lru_cache(maxsize=4)
def _tokenizer(folder: str, stamp: int) -> Any:
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ArtifactError(f"{folder} has no usable tokenizer: {str(error).splitlines()[0]}") from error


def write_byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose token k < 256 is byte k, and whose token 256 ends a text."""
    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=alphabet | {END_OF_TEXT: BYTE_VOCABULARY - 1}, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END_OF_TEXT).save_pretrained(folder)
