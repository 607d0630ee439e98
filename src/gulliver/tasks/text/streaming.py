"""The blocks of any transformers network, found by running it without its weights.

The largest list of modules holds the layers. Everything called before the first layer is the block "embed", everything
after the last (and whatever is never called) the block "head". Which is which is learned from one dry run on a few
tokens in which layers are replaced by recorders and all other modules that own parameters by stand-ins of the right
shape, so that no weight is needed. The recorders also keep what each layer gets beside its input (rotary tables,
masks), which is the same for all batches of one shape unless they are padded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gulliver.core.errors import FOREIGN, ConfigError, first_line
from gulliver.nets.weights import canonical_names
from gulliver.tasks.base import Batch, Block, packable

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]
DEFECTS = (ConfigError, StopIteration, *FOREIGN)
"""What a network raises that does not take what a recorder returned for a layer."""

RETURNED = (None, 0, 1)
"""What layers may return: what the next one gets, alone, or as a tuple with so many others that no layer gets."""


class _Unused:
    """What a recorder returns beside what the next layer gets: whatever computes with it fails."""


class _Enough(Exception):
    """Raised by a recorder when nothing more of the run is needed."""


class Stream:
    """One network and its batches of tokens [batch, tokens], seen as embed, layers and head.

    ConfigError when the layers do not form a chain.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model, self.batches = model, batches
        self.layers_name, self.layers = largest_list(model)
        inside = set(self.layers.modules())
        self.outside = {
            name: module
            for name, module in model.named_modules()
            if module not in inside and next(module.parameters(recurse=False), None) is not None
        }
        self.caches = _caches(model)
        self.calls: dict[Any, list[LayerCall]] = {}
        self.by_shape = True  # whether layers of all batches of one shape get the same beside their input
        # a dry run: which modules outside the layers are called before and after them, and what layers return
        batch = {"tokens": torch.zeros(1, 3, dtype=torch.int64)}
        if self.batches and "mask" in self.batches[0]:
            batch["mask"] = torch.ones(1, 3, dtype=torch.int64)
        broken, ran = None, False
        for self.returned in RETURNED:
            called: tuple[set[str], set[str]] = (set(), set())
            try:
                calls = self._record(batch, called)
                if not ran:
                    broken, ran = None, True  # what is wrong with these calls says more than that others failed
                first = _checked(calls)
                other = _checked(self._record(batch | {"tokens": torch.ones_like(batch["tokens"])}))
            except DEFECTS as error:
                broken = error if broken is None or not ran else broken
                continue
            self.by_shape = len(first) == len(other) and all(map(_equal, first, other))
            self.before, self.after = called[0], called[1] | (set(self.outside) - called[0])
            return
        told = "" if broken is None else first_line(broken)
        raise ConfigError(f"{type(model).__name__} cannot be streamed layer by layer: {told}") from broken

    def blocks(self) -> list[Block]:
        """Embed, each layer, head. See `Task.blocks`."""
        tied = canonical_names(self.model)
        parts: list[tuple[str, tuple[str, ...], Callable[[Any, int], Tensor]]] = []
        parts.append(("embed", self._prefixes(self.before, tied), self.embed))
        for number, layer in enumerate(self.layers):
            name = f"{self.layers_name}.{number}"
            own = {tied[f"{name}.{leaf}"] for leaf, _ in layer.named_parameters(remove_duplicate=False)}
            shared = sorted(one for one in own if not one.startswith(f"{name}."))
            parts.append((name, (f"{name}.", *shared), self.layer(number)))
        parts.append(("head", self._prefixes(self.after, tied), self.head))
        blocks, taken = [], set()
        for name, prefixes, forward in parts:
            weights = tuple(one for one in packable(self.model, prefixes) if one not in taken) if prefixes else ()
            logits = name == "head" and self.model.get_output_embeddings() is not None  # type: ignore[operator]
            blocks.append(Block(name, prefixes, weights, forward, pointwise=logits))  # a pooler reads the first alone
            taken |= set(weights)
        return blocks

    def _prefixes(self, names: set[str], tied: dict[str, str]) -> tuple[str, ...]:
        """Canonical names of the parameters that the named modules own themselves."""
        owned = [
            tied[f"{name}.{leaf}" if name else leaf]
            for name in sorted(names)
            for leaf, _ in self.outside[name].named_parameters(recurse=False)
        ]
        return tuple(dict.fromkeys(owned))

    # ---- the three kinds of forward ---------------------------------------------------------------------------
    def embed(self, batch: Batch, index: int) -> Tensor:
        """Activations [batch, tokens, width] before the first layer."""
        found: list[Tensor] = []

        def first(*args: Any, **kwargs: Any) -> Tensor:
            found.append(_split(args, kwargs)[0])
            raise _Enough

        with _patched({self.layers[0]: first}):
            self.model(**self._inputs(batch))
        return found[0]

    def layer(self, number: int) -> Callable[[Any, int], Tensor]:
        """A function from (what enters layer `number` [batch, tokens, width], batch index) to what leaves it."""

        def forward(x: Tensor, index: int) -> Tensor:
            batch = self.batches[index]
            key = tuple(batch["tokens"].shape) if self.by_shape and set(batch) == {"tokens"} else index
            if key not in self.calls:
                self.calls[key] = self._record(batch)
            args, kwargs = self.calls[key][number]
            out = self.layers[number](x, *args, **kwargs)
            return out[0] if isinstance(out, (tuple, list)) else out

        return forward

    def head(self, x: Tensor, index: int) -> Tensor:
        """Logits [batch, tokens, vocab] (or last hidden states, without a head) from the last layer's output.

        `x` may hold other positions than the batch: which they are does not matter here.
        """

        def passing(*args: Any, **kwargs: Any) -> Any:
            return self._like_layer(_split(args, kwargs)[0])

        batch, shape = self.batches[index], x.shape[:2]
        if batch["tokens"].shape != shape:  # more in a row than the network has positions, perhaps: one in each row
            x = x.flatten(0, 1)[:, None]
            batch = {"tokens": torch.zeros(x.shape[:2], dtype=torch.int64)}
        stubs: dict[nn.Module, Callable[..., Any]] = {module: passing for module in self.layers}
        stubs[self.layers[-1]] = lambda *args, **kwargs: self._like_layer(x)
        stubs |= {self.outside[name]: _stand_in(name, self.outside[name]) for name in self.before - self.after}
        with _patched(stubs):
            output = self.model(**self._inputs(batch))
        logits = getattr(output, "logits", None)
        return (output.last_hidden_state if logits is None else logits).reshape(*shape, -1)

    # ---- what layers are called with --------------------------------------------------------------------------
    def _record(self, batch: Batch, called: tuple[set[str], set[str]] | None = None) -> list[LayerCall]:
        """What each layer gets beside its input, from a run with stand-ins in the place of all modules.

        The run ends in the last layer, unless `called` is given: names of modules before and after the first layer.
        """
        calls: list[LayerCall] = []
        passed: list[Tensor] = []

        def outside(name: str) -> None:
            if called is not None:
                called[bool(calls)].add(name)

        def layer(number: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                x, rest = _split(args, kwargs)
                if number != len(calls) or (passed and x is not passed[-1]):
                    raise ConfigError(f"layer {number} does not get what layer {number - 1} returned")
                calls.append(rest)
                passed.append(x)
                if called is None and len(calls) == len(self.layers):
                    raise _Enough
                return self._like_layer(x)

            return call

        stubs: dict[nn.Module, Any] = {module: layer(number) for number, module in enumerate(self.layers)}
        stubs |= {module: _stand_in(name, module, outside) for name, module in self.outside.items()}
        with torch.no_grad(), _patched(stubs):
            self.model(**self._inputs(batch))
        if len(calls) != len(self.layers):
            raise ConfigError(f"{len(calls)} of {len(self.layers)} layers were called")
        return calls

    def _like_layer(self, x: Tensor) -> Any:
        if self.returned is None:
            return x
        return (x, *(_Unused() for _ in range(self.returned)))

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """What the network is called with."""
        mask = {"attention_mask": batch["mask"]} if "mask" in batch else {}
        return {"input_ids": batch["tokens"], **mask, **({"use_cache": False} if self.caches else {})}


def _caches(model: nn.Module) -> bool:
    """Whether the network can be told not to keep keys and values: by a parameter, or by one that it passes on."""
    taken = inspect.signature(model.forward).parameters
    passed_on = any(one.kind is one.VAR_KEYWORD for one in taken.values())
    return "use_cache" in taken or (passed_on and hasattr(getattr(model, "config", None), "use_cache"))


def largest_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The ModuleList with the most parameters and its name: a network's layers."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    if not lists:
        raise ConfigError(f"{type(model).__name__} has no list of layers; it cannot be streamed")
    return max(lists.items(), key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, LayerCall]:
    """A layer's input, and everything else that it was called with."""
    if args:
        return args[0], (args[1:], kwargs)
    return kwargs["hidden_states"], ((), {key: value for key, value in kwargs.items() if key != "hidden_states"})


def _checked(calls: list[LayerCall]) -> list[Any]:
    """All that layers get beside their input, flat. ConfigError for what stand-ins cannot tell, or layers change."""
    found: list[Any] = []
    left: list[Any] = [(args, *(kwargs[key] for key in sorted(kwargs))) for args, kwargs in reversed(calls)]
    while left:
        value = left.pop()
        if isinstance(value, tuple):
            left += reversed(value)
            continue
        if isinstance(value, _Unused):
            raise ConfigError("layers get what was computed from weights, beside their input")
        if isinstance(value, Tensor):
            if value.is_floating_point() and bool(value.isnan().any()):
                raise ConfigError("layers get what was computed from weights, beside their input")
        elif value is not None and not isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
            raise ConfigError(f"layers share a {type(value).__name__}")
        found.append(value)
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other


def _stand_in(name: str, module: nn.Module, called: Callable[[str], None] = lambda name: None) -> Callable[..., Tensor]:
    """A function that returns NaN in the shape `module` would return, reading no weight.

    It tells `called` the module's name.
    """
    weight = getattr(module, "weight", None)

    def call(*args: Any, **kwargs: Any) -> Tensor:
        called(name)
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None:
            raise ConfigError(
                f"{name} ({type(module).__name__}) lies outside the layers and is called without a tensor"
            )
        if not isinstance(weight, Tensor):
            raise ConfigError(f"{name} ({type(module).__name__}) lies outside the layers and is of an unknown kind")
        if isinstance(module, nn.Embedding) or not x.is_floating_point():
            shape = (*x.shape, weight.shape[1])
        elif isinstance(module, nn.Linear):
            shape = (*x.shape[:-1], module.out_features)
        else:
            shape = tuple(x.shape)
        return torch.full(shape, torch.nan)  # of its own numbers, because some networks scale it in place

    return call


@contextmanager
def _patched(stubs: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of single modules while the block runs; their other attributes stay visible.

    `_Enough` ends the block and goes no further.
    """
    own = {module: module.__dict__.get("forward") for module in stubs}
    for module, stub in stubs.items():
        module.__dict__["forward"] = stub
    try:
        yield
    except _Enough:
        pass
    finally:
        for module, forward in own.items():
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward
