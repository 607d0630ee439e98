"""The type of products follows the CPU's instructions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from gulliver.core.machine import identify
from gulliver.nets import precision


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    precision.has_bfloat16.cache_clear()
    yield
    precision.has_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("isa", "has"),
    [
        ((), False), (("avx2",), False), (("avx2", "avx512f", "avx512_vnni"), False), (("asimd", "i8mm"), False),
        (("avx512f", "avx512_bf16"), True), (("amx_bf16",), True), (("asimd", "bf16"), True),
    ],
)  # fmt: skip
def test_bfloat16_where_the_cpu_multiplies_it(isa: tuple[str, ...], has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "identify", lambda: replace(identify(), isa=isa))
    assert precision.has_bfloat16() is has
    assert precision.attempts() == ((True, False) if has else (False,))
    given = torch.rand(3, 4)
    assert precision.quick(given).dtype == (torch.bfloat16 if has else torch.float32)
    with precision.products_in(precision.attempts()[0]):
        assert (given @ given.T).dtype == (torch.bfloat16 if has else torch.float32)
