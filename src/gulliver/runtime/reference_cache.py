"""What a network of transformers remembers of a text: the cache that it makes itself, whatever kind it is.

Networks keep keys and values, states of recurrences, ends of convolutions, or several of these, in classes of their
own. The first call is given none, so that the network makes the one it needs; the next call is given what came back.
Not every cache holds up: some are right one token at a time only, few can be shortened. A network is therefore tried
once on a few tokens, and what does not give the logits of a computation from the beginning is not used.
"""

from __future__ import annotations

import inspect
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
        self._model = model
        arguments = inspect.signature(model.forward).parameters
        self._cuts_logits = "logits_to_keep" in arguments
        self._name = next((name for name in NAMES if name in arguments), None)
        self.keeps = self.several = self.crops = False
        with torch.inference_mode():
            self._try([(11 * place + 3) % vocabulary for place in range(7)])

    def _try(self, tokens: list[int]) -> None:
        """Set what the caches are good for, by reading these seven tokens in parts."""
        try:
            right = self._call(tokens, len(tokens), None).logits[0]
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
        found = self._call(tokens if ahead else text.tokens, keep, text.cache if ahead else None)
        text.cache = getattr(found, self._name, None) if self.keeps and self._name else None
        return found.logits[0, -keep:]

    def _call(self, tokens: list[int], keep: int, cache: Any) -> Any:
        options: dict[str, Any] = {"logits_to_keep": keep} if self._cuts_logits else {}
        if cache is not None and self._name is not None:
            options[self._name] = cache
        ids = torch.tensor([tokens])
        return self._model(input_ids=ids, use_cache=self.keeps, return_dict=True, **options)

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
