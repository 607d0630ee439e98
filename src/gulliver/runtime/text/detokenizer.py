"""Tokens to text one at a time, and the search for stop texts in what comes.

The decoders of most tokenizers map every token to fixed bytes: byte-level (GPT-2, Llama 3, Qwen), and SentencePiece's
with its byte fallback (Llama 2, Mistral, Gemma). There the text is the bytes in a row, and a character that is not
complete waits. For any other decoder (word pieces, …) the tokenizers library decodes the last tokens with the new one.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache

import tokenizers
from tokenizers.decoders import DecodeStream

WINDOW = 8  # tokens before the new one that a decoder without fixed bytes is shown
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Token id -> the bytes it writes. `exact` is False when the tokenizer's decoder looks at neighbours too."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(token for token, content in added.items() if content.special)
        self._kind, self._space = _kind(tokenizer)
        self.exact = self._kind != "other"
        self._known: dict[int, bytes] = {}

    @cached_property
    def strips(self) -> bool:
        """Whether the decoder takes a space off the beginning of a text."""
        probe = self._tokenizer.encode("a", add_special_tokens=False)
        spaced = bool(probe.tokens) and probe.tokens[0].startswith("▁")
        return spaced and not self._tokenizer.decode(probe.ids).startswith(" ")

    def __getitem__(self, token: int) -> bytes:
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._bytes(token)
        return found

    def _bytes(self, token: int) -> bytes:
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return b""  # logits may have more columns than the tokenizer has tokens
        if self._kind == "bytes" and all(character in _CHARACTER_BYTE for character in text):
            return bytes(_CHARACTER_BYTE[character] for character in text)
        if self._kind == "pieces" and (byte := _BYTE.fullmatch(text)):
            return bytes([int(byte[1], 16)])
        return (text.replace(self._space, " ") if self._space else text).encode("utf-8", "replace")


def _kind(tokenizer: tokenizers.Tokenizer) -> tuple[str, str]:
    """("bytes", ""), ("pieces", what represents a space), or ("other", "")."""
    if tokenizer.decoder is None:
        return "other", ""
    decoder = json.loads(tokenizer.decoder.__getstate__())
    steps = decoder.get("decoders", [decoder])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "bytes", ""
    if kinds == ["Metaspace"]:
        return "pieces", steps[0].get("replacement", "▁")
    replaced = [step for step in steps if step["type"] == "Replace"]
    plain = all(kind in ("Replace", "ByteFallback", "Fuse", "Strip") for kind in kinds)
    strips = [step for step in steps if step["type"] == "Strip" and (step.get("content"), step.get("stop")) != (" ", 0)]
    if plain and "ByteFallback" in kinds and len(replaced) == 1 and replaced[0].get("content") == " " and not strips:
        return "pieces", replaced[0]["pattern"].get("String", "▁")
    return "other", ""


_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_CHARACTER_BYTE = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}
"""GPT-2's printable characters -> the bytes that they represent."""


class Detokenizer:
    """The text of one answer. `prompt` is the text before it: after other text a word keeps its leading space."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, table: TokenBytes, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._table = table
        self._special = table.special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace").decode
        before = [token for token in prompt[-4 * WINDOW :] if token not in table.special]
        self._strip = table.exact and not before and table.strips
        self._stream = None if table.exact else DecodeStream(before[-WINDOW:], skip_special_tokens=True)

    def add(self, token: int) -> str:
        """The text that is certain now and was not before: "" for a special token or a part of a character."""
        if token in self._special:
            return ""
        if self._stream is not None:
            return self._stream.step(self._tokenizer, token) or ""
        text = self._utf8(self._table[token])
        if self._strip and text:
            self._strip, text = False, text.removeprefix(" ")
        return text


class StopFinder:
    """Holds back text that may turn out to be the beginning of a stop text. The time is that of reading each character

    once for every stop, however nearly they are met (Knuth, Morris and Pratt, Fast pattern matching in strings, 1977).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple((stop, _borders(stop)) for stop in stops)
        self._met = [0] * len(self._stops)  # characters at the end of what came with which each stop begins
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """(text that is certain, whether a stop text was met); what follows the earliest stop text is dropped."""
        held = self._held + text
        places = []
        for index, (stop, borders) in enumerate(self._stops):
            met = self._met[index]
            for end, character in enumerate(text, len(self._held) + 1):
                while met and stop[met] != character:
                    met = borders[met - 1]
                met += stop[met] == character
                if met == len(stop):
                    places.append(end - met)
                    break
            self._met[index] = met
        if places:
            self._held = ""
            return held[: min(places)], True
        keep = max(self._met)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def rest(self) -> str:
        """What was held back, when the answer ends without a stop text."""
        held, self._held = self._held, ""
        return held


@lru_cache(maxsize=256)
def _borders(stop: str) -> tuple[int, ...]:
    """For every beginning of `stop`: the length of the longest shorter beginning with which it ends."""
    borders, met = [0], 0
    for character in stop[1:]:
        while met and stop[met] != character:
            met = borders[met - 1]
        met += stop[met] == character
        borders.append(met)
    return tuple(borders)
