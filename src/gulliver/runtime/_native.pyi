"""
The native engine: packed weights times int8 activations, and decoders lowered to them.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray

def instruction_sets() -> list[tuple[str, bool, str]]:
    """
    (name, whether it runs here, why) of every instruction set, best first.
    """

def product(
    isa: str,
    tiles: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    codebook: Annotated[NDArray[numpy.int8], dict(shape=(None,), order="C", device="cpu", writable=False)] | None,
    x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")],
    y: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")],
    minimums: bool | None = None,
) -> None:
    """
    y[b, row] = the packed part times x[b], with x rounded to int8 blocks of 32; for tests.
    Kept blocks say whether they have minimums.
    """

def choose_codes(
    isa: str,
    local: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu")],
    base: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    effect: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)] | None,
    *,
    scale: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    zero: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    minimum: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
    levels: int,
    table: tuple[
        Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)],
        Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        float,
    ]
    | None,
    backwards: bool,
    codes: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu")],
) -> None:
    """
    Choose the codes of `local` [columns, rows], which becomes their values, one column after another.
    The levels are 0 to `levels` - 1, or those of `table`: (code of each place, level of each place, places in a unit).
    """

def fit_scales(
    isa: str,
    groups: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    importance: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
    *,
    table: tuple[
        Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)],
        Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        float,
    ],
    top: float,
    shrinks: Sequence[float],
    refine: int,
    scales: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu")],
) -> None:
    """
    The scales [n] that fit groups [n, columns] with importance [n or 1, columns] on the levels of a table;
    `top` is the largest size of a level.
    """

class Native:
    """A decoder lowered to native code."""

    def __init__(
        self,
        *,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        intermediate: int,
        vocabulary: int,
        positions: int,
        epsilon: float,
        attention_scale: float,
        embedding_scale: float,
        gelu: bool,
        isa: str,
        threads: int,
        max_rows: int,
        cache_blocks: int,
    ) -> None: ...
    def packed(
        self,
        parts: Sequence[
            tuple[
                Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu", writable=False)],
                int,
                int,
                int,
                Annotated[NDArray[numpy.int8], dict(shape=(None,), order="C", device="cpu", writable=False)] | None,
            ]
        ],
        columns: int,
        part_of_row: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)]
        | None,
    ) -> int: ...
    def kept(
        self,
        tiles: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        rows: int,
        columns: int,
        bits: int,
        group_size: int,
        minimums: bool,
    ) -> int: ...
    def plain(
        self,
        data: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        kind: int,
    ) -> int: ...
    def rope(
        self,
        frequency: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        scale: float,
    ) -> None: ...
    def layer(
        self,
        *,
        rope: int,
        window: int,
        attention_norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        mlp_norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        qkv: Sequence[int],
        out: int,
        gate_up: Sequence[int],
        down: int,
        after_attention: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)]
        | None,
        after_mlp: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)]
        | None,
        query_norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)]
        | None,
        key_norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)]
        | None,
        bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)] | None,
    ) -> None: ...
    def finish(
        self,
        embedding: int,
        final_norm: Annotated[NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        head: int,
    ) -> None: ...
    def hold(self, bytes: int) -> None: ...
    @property
    def isa(self) -> str: ...
    def step(
        self,
        tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        positions: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        sequences: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        blocks: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu", writable=False)],
        wanted: Annotated[NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)],
        logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), device="cpu")],
    ) -> None: ...
