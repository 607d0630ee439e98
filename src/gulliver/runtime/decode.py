"""Opening the fastest decoder that runs a model, and the one in native code."""

from __future__ import annotations

import atexit
import math
import threading
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gulliver.core.errors import BudgetError, ConfigError, KernelError
from gulliver.core.machine import usable_cores
from gulliver.core.memory import cgroup_ram_bytes, current_rss_bytes, total_ram_bytes
from gulliver.nets.files import stored_tensors, weight_files
from gulliver.runtime.compiled import missing as _native_missing
from gulliver.runtime.compiled import native as _native
from gulliver.runtime.decoder import Decoder, StepBatch
from gulliver.runtime.lower import DecoderConfig, NotLowered, Weights, build, read_config

MAX_ROWS = 256  # most tokens of one step: a chunk of a prompt
CACHE_BYTES = 2**31
"""Most address space for keys and values when the number of tokens is not stated; only what is used takes memory."""
SPARE_BYTES = 32 * 2**20  # what Python, the tokenizer and the allocator may come to take once a model runs
MAX_CACHE_TOKENS = 2**30
LEAST_CACHE_TOKENS = 512  # tokens that the cache holds under any memory limit, if the model's context is not shorter
NATIVE_FIELDS = (
    *("hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary", "positions"),
    *("epsilon", "attention_scale", "embedding_scale", "gelu"),
)
"""What the native program takes from a DecoderConfig."""


class NativeDecoder:
    """A decoder lowered to native code; see `Decoder`."""

    shares_blocks = True
    block_tokens = 16

    def __init__(
        self,
        folder: Path,
        threads: int | None,
        cache_tokens: int | None,
        slots: int,
        isa: str,
        max_ram_bytes: int | None,
    ) -> None:
        if cache_tokens is not None and not 0 < cache_tokens <= MAX_CACHE_TOKENS:
            raise ConfigError(f"cache_tokens is {cache_tokens}; it must be from 1 to {MAX_CACHE_TOKENS}")
        config = read_config(folder)
        file_bytes = sum(path.stat().st_size for path in weight_files(folder))
        free = min(total_ram_bytes(), cgroup_ram_bytes() or total_ram_bytes())
        self.vocabulary, self.positions, self.max_rows = config.vocabulary, config.positions, MAX_ROWS
        token_bytes = config.layers * config.kv_heads * 2 * (config.head_dim + 4)
        # Memory is taken when a block is first used, so room for all slots costs nothing where there is no limit.
        most = cache_tokens or max(config.positions, min(slots * config.positions, CACHE_BYTES // token_bytes))
        held, in_place = None, file_bytes > free // 2
        if max_ram_bytes is not None:
            least = cache_tokens or min(LEAST_CACHE_TOKENS, most)
            others = current_rss_bytes() + SPARE_BYTES + step_bytes(config, slots)
            held, cache_bytes = _shared_out(folder, max_ram_bytes, others, file_bytes, least * token_bytes)
            most, in_place = min(most, cache_bytes // token_bytes), held is not None
        weights = Weights(folder, in_place=in_place)
        self.cache_blocks = max(1, -(-most // self.block_tokens))
        self._lock = threading.Lock()
        assert _native is not None
        sizes = {name: getattr(config, name) for name in NATIVE_FIELDS}
        more = {
            "isa": isa,
            "threads": threads or usable_cores(),
            "max_rows": MAX_ROWS,
            "cache_blocks": self.cache_blocks,
        }
        self._program: Any = _native.Native(**sizes, **more)
        build(weights, config, self._program)
        _open.add(self)
        self.backend = self._program.isa
        self._logits_stride = -(-config.vocabulary // 32) * 32 + 16  # rows that begin in different sets of the cache
        # The buffer is kept: new memory for every step would be cleared page by page.
        self._logits = np.empty((0, self._logits_stride), np.float32)
        self.why = f"{config.architecture} is lowered to native code"
        if held is not None:
            self._program.hold(held)
            kept = f"{held / 1e6:.0f} of {file_bytes / 1e6:.0f} MB of weights stay"
            self.why += f"; {kept}, the rest is read again at each step"

    def step(self, batch: StepBatch) -> NDArray[np.float32]:
        """Logits [answers, vocabulary]; see `Decoder.step`. KernelError when it is closed or refuses the batch."""
        with self._lock:
            if self._program is None:
                raise KernelError("a step was refused: the decoder is closed")
            if len(self._logits) < len(batch.wanted):
                self._logits = np.empty((len(batch.wanted), self._logits_stride), np.float32)
            logits = self._logits[: len(batch.wanted), : self.vocabulary]
            try:
                self._program.step(batch.tokens, batch.positions, batch.sequences, batch.blocks, batch.wanted, logits)
            except (ValueError, RuntimeError) as error:
                raise KernelError(f"a step was refused: {error}") from error
            return logits

    def close(self) -> None:
        """Free the weights and the cache, once the step that is under way is done."""
        with self._lock:
            self._program = None


_open: weakref.WeakSet[NativeDecoder] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A daemon thread that comes out of a step after Python's end would abort the process."""
    for decoder in list(_open):
        decoder.close()


def step_bytes(config: DecoderConfig, slots: int) -> int:
    """Bytes of a step's activations: those of all its rows between products, and two rows of logits for each slot."""
    heads, keys = config.heads * config.head_dim, 2 * config.kv_heads * config.head_dim
    widest = max(config.hidden, heads, config.intermediate)
    row = 4 * (2 * config.hidden + 2 * config.intermediate + 2 * heads + keys) + heads + 6 * widest
    return MAX_ROWS * row + 2 * slots * 4 * config.vocabulary


def _shared_out(
    folder: Path, max_ram_bytes: int, others: int, file_bytes: int, least_cache_bytes: int
) -> tuple[int | None, int]:
    """(bytes of weights that stay in memory, bytes of the cache) under a limit for the process; None: all weights stay.

    `others` are the bytes of all else. The head always stays, and one layer at a time must fit. BudgetError names the
    smallest limit that works.
    """
    room = max_ram_bytes - others
    if file_bytes + least_cache_bytes <= room:
        return None, room - file_bytes
    stored = stored_tensors(folder)
    layers: Counter[str] = Counter()
    for name, tensor in stored.items():
        if name.startswith("model.layers."):
            layers[name.split(".")[2]] += tensor.length
    own_head = any(name.startswith("lm_head.") for name in stored)
    head_name = "lm_head." if own_head else "model.embed_tokens."
    head = sum(tensor.length for name, tensor in stored.items() if name.startswith(head_name))
    passing = max(layers.values(), default=0)
    least = head + passing + least_cache_bytes
    if least > room:
        raise BudgetError(
            f"a memory limit of {max_ram_bytes / 1e6:.0f} MB is too little: the head takes {head / 1e6:.0f} MB, "
            f"a layer {passing / 1e6:.0f} MB, the cache {least_cache_bytes / 1e6:.0f} MB, "
            f"all else {others / 1e6:.0f} MB; allow {math.ceil((others + least) / 1e6)} MB",
            {"max_ram_bytes": others + least},
        )
    cache_bytes = max(least_cache_bytes, (room - head - passing) // 4)
    return room - passing - cache_bytes, cache_bytes


def native_reason() -> str | None:
    """Why there is no native code here, or None when there is."""
    return _native_missing


def check_forced(backend: str, isa: str) -> None:
    """ConfigError for a backend that does not exist, and for an instruction set that no model can be given here."""
    if backend not in ("auto", "native", "reference"):
        raise ConfigError(f"backend is {backend!r}; choose auto, native or reference")
    if isa == "auto" or _native is None:
        return
    sets = {name: (here, why) for name, here, why in _native.instruction_sets()}
    if isa not in sets:
        raise ConfigError(f"there is no instruction set {isa}; choose auto or one of {', '.join(sets)}")
    here, why = sets[isa]
    if not here:
        raise ConfigError(f"instruction set {isa} cannot run here: {why}; choose auto")


def open_decoder(
    folder: Path,
    *,
    threads: int | None = None,
    cache_tokens: int | None = None,
    slots: int = 16,
    isa: str = "auto",
    backend: str = "auto",
    max_ram_bytes: int | None = None,
) -> Decoder:
    """The fastest decoder that runs the model in `folder`.

    `threads` defaults to the cores that this process may use; `cache_tokens` are of all sequences together; `slots` is
    how many sequences are expected at once; `isa` forces an instruction set ("avx2", "plain", …); `backend` is "auto",
    "native" or "reference"; `max_ram_bytes` limits the whole process: weights beyond it are read again at each step,
    and the cache fills what is left. BudgetError with the smallest limit that works when it is too little.
    ConfigError with the reason when a forced backend or instruction set is not available.
    """
    check_forced(backend, isa)
    reason = "it was asked for" if backend == "reference" else _native_missing
    if reason is None:
        try:
            return NativeDecoder(
                folder, threads=threads, cache_tokens=cache_tokens, slots=slots, isa=isa, max_ram_bytes=max_ram_bytes
            )
        except NotLowered as error:
            reason = str(error)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(str(error)) from error
    if backend == "native" or isa != "auto":
        raise ConfigError(f"{folder} cannot run natively, because {reason}; leave out --backend and --isa")
    from gulliver.runtime.reference_decode import ReferenceDecoder  # imports torch

    return ReferenceDecoder(folder, threads=threads, cache_tokens=cache_tokens, slots=slots, why=f"because {reason}")
