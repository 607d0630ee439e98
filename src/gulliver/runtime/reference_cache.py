"""What a network of transformers remembers of a text: the cache that it makes itself, whatever kind it is.

Networks keep keys and values, states of recurrences, ends of convolutions, or several of these, in classes of their
own. The first call is given none, so that the network makes the one it needs; the next call is given what came back.
Not every cache holds up: some are right one token at a time only, few can be shortened. A network is therefore tried
once on a few tokens, and what does not give the logits of a computation from the beginning is not used.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gulliver.core.errors import FOREIGN, ArtifactError, first_line

NAMES = ("past_key_values", "cache_params", "state")  # what networks call the cache, in their arguments and outputs
CLOSE = 1e-3  # of the largest logit: float32 in another order stays far below, a forgotten token far above


@dataclass
class Remembered:
    """One text: the tokens read so far, and the network's cache of them; None: nothing is kept."""

    tokens: list[int] = field(default_factory=list)
    cache: Any = None


class Reader:
    """Reads texts with one network, from where their caches end.

    `keeps`: a cache serves the next token; `several`: or the next few at once; `crops`: and it can be shortened.
    """

    def __init__(self, model: Any, vocabulary: int) -> None:
        """ArtifactError for a network that cannot read a few tokens at all."""
        self._model, self.vocabulary = model, vocabulary
        arguments = inspect.signature(model.forward).parameters
        self._cuts_logits = "logits_to_keep" in arguments
        self._name = next((name for name in NAMES if name in arguments), None)
        self.keeps = self.several = self.crops = False
        with torch.inference_mode():
            self._try([(11 * place + 3) % vocabulary for place in range(7)])

    def _try(self, tokens: list[int]) -> None:
        """Set what the caches are good for, by reading these seven tokens in parts."""
        try:
            right = self.call([tokens], len(tokens), None).logits[0]
        except FOREIGN as error:
            raise ArtifactError(f"the network cannot read text: {first_line(error)}") from error
        limit = CLOSE * float(right.abs().max())
        text = Remembered()
        for last, flags in ((4, ("keeps", "several")), (5, ("keeps", "several")), (7, ("several",)), (6, ("crops",))):
            for flag in flags:
                setattr(self, flag, self._name is not None)
            self.shorten(text, min(len(text.tokens), last - 1))
            known = text.cache is not None or last == 4
            try:
                found = self.read(text, tokens[len(text.tokens) : last], 1)[0]
                holds = known and text.cache is not None
                holds = holds and float((found - right[last - 1]).abs().max()) <= limit
            except FOREIGN:
                holds = False
            if not holds:
                for flag in flags:
                    setattr(self, flag, False)
                return

    def read(self, text: Remembered, tokens: list[int], keep: int) -> Tensor:
        """Logits of the last `keep` of the new `tokens`, [keep, vocabulary]."""
        ahead = text.cache is not None and (self.several or len(tokens) == 1)
        text.tokens += tokens
        found = self.call([tokens if ahead else text.tokens], keep, text.cache if ahead else None)
        text.cache = self.cache_of(found)
        return found.logits[0, -keep:]

    def call(self, texts: Sequence[Sequence[int]], keep: int, cache: Any) -> Any:
        """What the network says of texts of one length, of which `cache` holds what came before.

        `logits` [texts, `keep` or all of a text's tokens, vocabulary].
        """
        options: dict[str, Any] = {"logits_to_keep": keep} if self._cuts_logits else {}
        if cache is not None and self._name is not None:
            options[self._name] = cache
        ids = torch.tensor(texts)
        return self._model(input_ids=ids, use_cache=self.keeps, return_dict=True, **options)

    def cache_of(self, found: Any) -> Any:
        """The cache that came with `found`; None where caches do not hold up."""
        return getattr(found, self._name, None) if self.keeps and self._name else None

    def shorten(self, text: Remembered, count: int) -> None:
        """Forget all but the first `count` tokens; a cache that cannot be shortened is dropped, and made again."""
        beyond = len(text.tokens) - count
        del text.tokens[count:]
        if not beyond or text.cache is None:
            return
        if not self.crops:
            text.cache = None
            return
        try:
            text.cache.crop(-beyond)
        except FOREIGN:  # a window that has moved on
            text.cache = None


class Lockstep:
    """Texts of one length, read one token further at each step, with one cache for all of them.

    `works`: a few tokens of two texts give what the network gives for each of them alone. Where only the cache fails,
    none is kept.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader, self._cache = reader, None
        texts = [[(factor * place + 3) % reader.vocabulary for place in range(5)] for factor in (11, 7)]
        self.works = False
        for self._keeps in {reader.keeps: None, False: None}:
            self.works = self._agrees(texts)
            self.forget()
            if self.works:
                return

    def forget(self) -> None:
        """Begin other texts."""
        self._cache = None

    @torch.inference_mode()
    def _agrees(self, texts: Sequence[Sequence[int]]) -> bool:
        try:
            self.read([text[:-1] for text in texts])
            found = self.read(texts)
            alone = torch.cat([self._reader.call([text], 1, None).logits[:, -1] for text in texts])
        except FOREIGN:
            return False
        return float((found - alone).abs().max()) <= CLOSE * float(alone.abs().max())

    @torch.inference_mode()
    def read(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Logits [texts, vocabulary] of what follows the texts, of which all but the last token were read before."""
        ahead = self._cache is not None
        new = [text[-1:] for text in texts] if ahead else texts
        found = self._reader.call(new, 1, self._cache)
        self._cache = self._reader.cache_of(found) if self._keeps else None
        return found.logits[:, -1].float()
