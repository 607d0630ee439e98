"""A model's text side: text to tokens, messages to text, tokens to text; on `tokenizers` and Jinja alone.

It reads tokenizer.json, tokenizer_config.json, generation_config.json, config.json and the chat templates of a Hugging
Face layout folder, and gives what transformers gives, without loading it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from gulliver.core.errors import ArtifactError, ConfigError, first_line
from gulliver.runtime.text.chat_template import ChatTemplate
from gulliver.runtime.text.detokenizer import Detokenizer, TokenBytes

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

LOSSY_CHARACTERS = 1024  # a token of a tokenizer that changes texts first, and may drop some, counts for so many
SHORT_CHARACTERS = 4096  # to here, nothing is asked of a text's length before it is tokenized
PIECE_CHARACTERS = 16_384  # a text that is far longer than its context is counted in pieces of this length
CUT_TOKENS = 256  # that a piece may have more than its part of the whole text: a word is cut at each of its ends
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # texts come one by one; the library's threads could be lost


class Text:
    """The tokenizer and chat template in a model's folder. ArtifactError when they cannot be read."""

    def __init__(self, folder: Path) -> None:
        settings = _read(folder / "tokenizer_config.json")
        tokens = _special_tokens(settings, _read(folder / "special_tokens_map.json"))
        self.tokenizer = _open(folder, settings, tokens)
        self._bytes = TokenBytes(self.tokenizer)
        self.context: int | None = None  # most tokens of a text that is to be answered; None: any number
        self.template = ChatTemplate(_templates(folder, settings), tokens)
        self.end_tokens = frozenset(_end_tokens(folder, self.tokenizer.token_to_id(tokens.get("eos_token", ""))))

    # ---- in ----
    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of `text`, with those that the tokenizer puts around every text (like <s>) when `special`.

        Special tokens that are spelled out in the text are read as such. ConfigError for one that does not fit
        `context`, before it is tokenized whole. ArtifactError when the tokenizer fails on it.
        """
        if self.context is not None and len(text) > SHORT_CHARACTERS and not self._may_fit(text, self.context):
            raise ConfigError(
                f"{len(text)} characters do not fit the context of {self.context} tokens; shorten the text"
            )
        return self._encoded(text, special)

    def _may_fit(self, text: str, context: int) -> bool:
        """False for a text that has surely more than `context` tokens."""
        if len(text) > self.longest * context:
            return False
        if len(text) <= max(4 * context, PIECE_CHARACTERS):
            return True
        count = 0
        for start in range(0, len(text), PIECE_CHARACTERS):
            count += len(self._encoded(text[start : start + PIECE_CHARACTERS], False)) - CUT_TOKENS
            if count > context:
                return False
        return True

    def _encoded(self, text: str, special: bool) -> list[int]:
        try:
            # Of the library's calls, this one lets Python's other threads run meanwhile; `encode` does not.
            return self.tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids
        except (UnicodeEncodeError, TypeError) as error:
            raise ConfigError(f"the text holds half a character (a lone surrogate): {str(error)[:200]}") from error
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # what the library's own language calls a panic is no Exception
            raise ArtifactError(f"the model's tokenizer fails on this text: {first_line(error)}") from error

    @cached_property
    def longest(self) -> int:
        """Most characters of a text that become one token."""
        return max(LOSSY_CHARACTERS if self.tokenizer.normalizer else 1, *map(len, self.tokenizer.get_vocab()))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The tokens of a chat; `options` are those of `ChatTemplate.render`, which writes the special tokens."""
        return self.encode(self.template.render(messages, **options), special=False)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.template.sources)

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the chat template tells the model about tools."""
        return any(re.search(r"\btools\b", source) for source in self.template.sources.values())

    # ---- out ----
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens` without the special ones."""
        try:
            return self.tokenizer.decode(list(tokens))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # as above
            raise ArtifactError(f"the model's tokenizer fails on these tokens: {first_line(error)}") from error

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token writes, which may be a part of a character; a special token gives its name."""
        return self._bytes[token]

    def detokenizer(self, prompt: Sequence[int] = ()) -> Detokenizer:
        """A decoder of an answer to `prompt`, one token at a time."""
        return Detokenizer(self.tokenizer, self._bytes, prompt)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, {} when the file is missing."""
    if not path.is_file():
        return {}
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not JSON: {error}; it is damaged") from error
    if not isinstance(body, dict):
        raise ArtifactError(f"{path} is not a JSON object; it is damaged")
    return body


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None


def _special_tokens(settings: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and its like -> the token's text, as templates know them."""
    found = {name: _content(settings.get(name)) or _content(older.get(name)) for name in SPECIAL}
    return {name: content for name, content in found.items() if content}


def _open(folder: Path, settings: Mapping[str, Any], tokens: Mapping[str, str]) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path)) if path.is_file() else _converted(folder)
        _complete(tokenizer, settings, tokens)
    except (ArtifactError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises bare Exceptions, and panics, which are none
        raise ArtifactError(f"{path} is not a usable tokenizer: {first_line(error)}") from error
    return tokenizer


def _complete(tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any], tokens: Mapping[str, str]) -> None:
    """Add the tokens that only the settings name; texts are neither cut nor padded."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    decoder = settings.get("added_tokens_decoder")
    known = {content.content for content in tokenizer.get_added_tokens_decoder().values()}
    entries = decoder.items() if isinstance(decoder, dict) else ()
    rows = {int(key): token for key, token in entries if len(key) < 10 and key.isdecimal()}
    for _, token in sorted(rows.items()):
        content = _content(token)
        if isinstance(content, str) and content and content not in known and isinstance(token, dict):
            fields = {name: bool(token.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "special")}
            normalized = bool(token.get("normalized", not fields["special"]))
            tokenizer.add_tokens([tokenizers.AddedToken(content, normalized=normalized, **fields)])
    known = {content.content for content in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens([token for token in tokens.values() if token not in known])


def _converted(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of an older folder, which has no tokenizer.json; transformers knows how to convert it."""
    import transformers  # heavy, and needed for such folders alone

    try:
        found: Any = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        return tokenizers.Tokenizer.from_str(found.backend_tokenizer.to_str())
    except Exception as error:  # the libraries raise bare Exceptions
        why = " ".join(str(error).split())[:300]  # its first line may end in the middle of a sentence
        raise ArtifactError(f"{folder} has no usable tokenizer; add the model's tokenizer.json: {why}") from error


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Name -> source of the folder's chat templates; files win over what the settings hold."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files = {"default": folder / "chat_template.jinja"} | files
    if files:
        return {name: _utf8(path) for name, path in files.items()}
    older = _read(folder / "chat_template.json").get("chat_template")
    given = settings.get("chat_template") if older is None else older
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list):
        rows = [row for row in given if isinstance(row, dict)]
        return {str(row.get("name")): str(row.get("template")) for row in rows}
    return {}


def _utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8 text; it is damaged") from error


def _end_tokens(folder: Path, of_tokenizer: int | None) -> set[int]:
    """Tokens that end an answer: those of generation_config.json, of config.json and the tokenizer's own."""
    found = set() if of_tokenizer is None else {of_tokenizer}
    for name in ("generation_config.json", "config.json"):
        value = _read(folder / name).get("eos_token_id")
        found |= {token for token in (value if isinstance(value, list) else [value]) if type(token) is int}
    return found
