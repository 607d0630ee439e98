"""What a model that was trained here remembers of it: losses, rates, clipping, held-out losses, norms of its blocks."""

from __future__ import annotations

from gulliver.core.record import Count, Record, Row


class HeldOut(Row):
    """The loss on held-out examples after `step` updates, in nats, and half its 95 % interval (None: one example)."""

    step: Count
    loss: float
    half_width: float | None = None
    examples: Count


class BlockNorms(Row):
    """Lengths of gradients and weights at 0-based `steps`, [step][block]."""

    blocks: tuple[str, ...]
    steps: tuple[Count, ...]
    gradients: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]


class RateTest(Row):
    """The loss, in nats, of a short run at each of growing `rates`, and the rate that follows from it."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggested: float


class Training(Record):
    """Mean training loss of every step, in nats; its learning rate, and the share of it that clipping cut.

    `kept_step`: after how many updates the weights were those of this model, `stopped_early` whether patience ended
    the run. Models trained by earlier versions say the losses alone.
    """

    file = "training.json"
    remedy = "train again"

    losses: tuple[float, ...]
    rates: tuple[float, ...] = ()
    clipped: tuple[float, ...] = ()
    clipped_by: str = ""
    held_out: tuple[HeldOut, ...] = ()
    norms: BlockNorms | None = None
    rate_test: RateTest | None = None
    kept_step: Count | None = None
    stopped_early: bool = False
