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

from gulliver.core.errors import ConfigError
from gulliver.nets.weights import canonical_names
from gulliver.tasks.base import Batch, Block, Weight

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]


class _Enough(Exception):
    """Raised by a recorder when nothing more of the run is needed."""


class Stream:
    """One network and its calibration batches, seen as embed, layers and head."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model = model
        self.batches = batches
        self.layers_name, self.layers = largest_list(model)
        inside = set(self.layers.modules())
        self.outside = {
            name: module
            for name, module in model.named_modules()
            if module not in inside and next(module.parameters(recurse=False), None) is not None
        }
        self.caches = "use_cache" in inspect.signature(model.forward).parameters
        self.tuples = False
        self.calls: dict[Any, list[LayerCall]] = {}
        self.before: set[str] = set()
        self.after: set[str] = set()

    # ---- the three kinds of forward ---------------------------------------------------------------------------
    def embed(self, batch: Batch, index: int) -> Tensor:
        """Activations [batch, tokens, width] before the first layer."""
        found: list[Tensor] = []

        def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            found.append(_split(args, kwargs)[0])
            raise _Enough

        with _patched({self.layers[0]: first}):
            self._run(batch)
        return found[0]

    def layer(self, number: int) -> Callable[[Any, int], Tensor]:
        """A function from (what enters layer `number` [batch, tokens, width], batch index) to what leaves it."""

        def forward(x: Tensor, index: int) -> Tensor:
            args, kwargs = self._calls_of(index)[number]
            out = self.layers[number](x, *args, **kwargs)
            return out[0] if isinstance(out, tuple) else out

        return forward

    def head(self, x: Tensor, index: int) -> Tensor:
        """Logits [batch, tokens, vocab] (or last hidden states, without a head) from the last layer's output."""
        last = len(self.layers) - 1

        def give(number: int) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
            return lambda args, kwargs: self._like_layer(x if number == last else _split(args, kwargs)[0])

        stubs = {module: give(number) for number, module in enumerate(self.layers)}
        stubs |= {self.outside[name]: _stand_in(name, self.outside[name]) for name in self.before - self.after}
        with _patched(stubs):
            output = self._run(self.batches[index])
        return _result(output)

    # ---- what layers are called with --------------------------------------------------------------------------
    def _calls_of(self, index: int) -> list[LayerCall]:
        batch = self.batches[index]
        key = tuple(batch["tokens"].shape) if set(batch) == {"tokens"} else index
        if key not in self.calls:
            stubs = {module: _stand_in(name, module) for name, module in self.outside.items()}
            self.calls[key] = self._record(batch, stubs)
        return self.calls[key]

    def _record(self, batch: Batch, stubs: dict[nn.Module, Any]) -> list[LayerCall]:
        calls: list[LayerCall] = []
        passed: list[Tensor] = []

        def record(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x, call = _split(args, kwargs)
            if passed and x is not passed[-1]:
                raise ConfigError(
                    f"{type(self.model).__name__} changes activations between its layers; it cannot be streamed"
                )
            calls.append(call)
            passed.append(x)
            if len(calls) == len(self.layers):
                raise _Enough
            return self._like_layer(x)

        with torch.no_grad(), _patched(stubs | {module: record for module in self.layers}):
            self._run(batch)
        return calls

    def _like_layer(self, x: Tensor) -> Any:
        return (x,) if self.tuples else x

    def _run(self, batch: Batch) -> Any:
        extra: dict[str, Any] = {"use_cache": False} if self.caches else {}
        if "mask" in batch:
            extra["attention_mask"] = batch["mask"]
        try:
            return self.model(input_ids=batch["tokens"], **extra)
        except _Enough:
            return None

    def dry_run(self) -> None:
        """Learn the names of the modules outside the layers that are called before the first and after the last layer.

        ConfigError when the layers do not form a chain.
        """
        batch = {"tokens": torch.zeros(1, 3, dtype=torch.int64)}
        if self.batches and "mask" in self.batches[0]:
            batch["mask"] = torch.ones(1, 3, dtype=torch.int64)
        for self.tuples in (False, True):
            before: set[str] = set()
            after: set[str] = set()
            seen: list[int] = []
            broken = _visit(self, batch, before, after, seen)
            if broken is None:
                self.before, self.after = before, after | (set(self.outside) - before)
                return
        raise ConfigError(f"{type(self.model).__name__} cannot be streamed layer by layer: {broken}")


def _visit(stream: Stream, batch: Batch, before: set[str], after: set[str], seen: list[int]) -> str | None:
    """Run once with stand-ins everywhere; fills the sets; returns what went wrong, None when the layers chain."""
    passed: list[Tensor] = []

    def called(name: str) -> None:
        (after if seen else before).add(name)

    def layer(number: int) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
        def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x, _ = _split(args, kwargs)
            if number != len(seen) or (passed and x is not passed[-1]):
                raise _Broken(f"layer {number} does not get what layer {number - 1} returned")
            seen.append(number)
            passed.append(x)
            return stream._like_layer(x)

        return call

    stubs: dict[nn.Module, Any] = {module: _stand_in(name, module, called) for name, module in stream.outside.items()}
    stubs |= {module: layer(number) for number, module in enumerate(stream.layers)}
    try:
        with torch.no_grad(), _patched(stubs):
            stream._run(batch)
    except (_Broken, IndexError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        return str(error)
    return None if len(seen) == len(stream.layers) else f"{len(seen)} of {len(stream.layers)} layers were called"


class _Broken(Exception):
    """The layers do not form a chain."""


def stream_blocks(model: nn.Module, batches: Sequence[Batch]) -> list[Block]:
    """Embed, each layer, head. See `Task.blocks`."""
    stream = Stream(model, batches)
    stream.dry_run()
    tied = canonical_names(model)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    only_after = stream.after - stream.before
    blocks = [
        Block("embed", _prefixes(stream, stream.before, tied), tuple(_embeddings(model, embedding)), stream.embed)
    ]
    for number, layer in enumerate(stream.layers):
        prefix = f"{stream.layers_name}.{number}."
        weights = [
            Weight(f"{prefix}{name}.weight", "linear")
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ]
        blocks.append(Block(f"{stream.layers_name}.{number}", (prefix,), tuple(weights), stream.layer(number)))
    head = model.get_output_embeddings()  # type: ignore[operator]
    heads = [
        Weight(f"{name}.weight", "linear")
        for name in sorted(only_after)
        if stream.outside[name] is head and tied[f"{name}.weight"] == f"{name}.weight"
    ]
    blocks.append(Block("head", _prefixes(stream, stream.after, tied), tuple(heads), stream.head))
    return blocks


def largest_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The ModuleList with the most parameters and its name: a network's layers."""
    found = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no list of layers; it cannot be streamed")
    return max(found, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))


def _embeddings(model: nn.Module, embedding: nn.Module) -> Iterator[Weight]:
    for name, parameter in model.named_parameters():
        if parameter is getattr(embedding, "weight", None):
            yield Weight(name, "embedding")


def _prefixes(stream: Stream, names: set[str], tied: dict[str, str]) -> tuple[str, ...]:
    """Canonical names of the parameters that the named modules own themselves."""
    owned = [
        tied[f"{name}.{leaf}" if name else leaf]
        for name in sorted(names)
        for leaf, _ in stream.outside[name].named_parameters(recurse=False)
    ]
    return tuple(dict.fromkeys(owned))


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, LayerCall]:
    """A layer's input, and everything else that it was called with."""
    if args:
        return args[0], (args[1:], kwargs)
    return kwargs["hidden_states"], ((), {key: value for key, value in kwargs.items() if key != "hidden_states"})


def _stand_in(
    name: str, module: nn.Module, called: Callable[[str], None] | None = None
) -> Callable[[tuple[Any, ...], dict[str, Any]], Tensor]:
    """A function that returns zeros of the shape `module` would return, taking no memory and reading no weight.

    It tells `called` the module's name.
    """
    weight = getattr(module, "weight", None)

    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if called is not None:
            called(name)
        x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        if not isinstance(weight, Tensor):
            raise ConfigError(f"{name} ({type(module).__name__}) lies outside the layers and is of an unknown kind")
        if isinstance(module, nn.Embedding) or not x.is_floating_point():
            shape = (*x.shape, weight.shape[1])
        elif isinstance(module, nn.Linear):
            shape = (*x.shape[:-1], module.out_features)
        else:
            shape = tuple(x.shape)
        return torch.zeros((), dtype=torch.float32).expand(shape)

    return call


def _result(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


@contextmanager
def _patched(stubs: dict[nn.Module, Callable[[tuple[Any, ...], dict[str, Any]], Any]]) -> Iterator[None]:
    """Replace the forward of single modules while the block runs; their other attributes stay visible."""
    own = {module: module.__dict__["forward"] for module in stubs if "forward" in module.__dict__}
    for module, stub in stubs.items():
        module.__dict__["forward"] = _as_forward(stub)
    try:
        yield
    finally:
        for module in stubs:
            del module.__dict__["forward"]
        for module, forward in own.items():
            module.__dict__["forward"] = forward


def _as_forward(stub: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: stub(args, kwargs)
