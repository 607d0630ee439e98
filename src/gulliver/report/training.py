"""Pictures of a training: its losses, the norms of its blocks over time, and the test of rates before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gulliver.core.training import BlockNorms, Training
from gulliver.report.picture import Picture, Table, base_layout, label

_MAX_POINTS = 600
_MAX_ROWS = 40
SPREAD = 1e4
"""Gradients of blocks that differ by more than this are called vanishing or exploding."""


def losses(training: Training | None) -> Picture | None:
    """The training loss of every step, the held-out losses, and the step whose weights were kept."""
    if training is None or len(training.losses) < 2:
        return None
    taken = _thinned(range(len(training.losses)))
    traces = [_line("training", [at + 1 for at in taken], [training.losses[at] for at in taken], "blue")]
    if training.held_out:
        found = [(row.step, row.loss) for row in training.held_out]
        line = _line("held out", [x for x, _ in found], [y for _, y in found], "orange")
        halves = [row.half_width or 0.0 for row in training.held_out]
        traces.append(line | {"mode": "lines+markers", "error_y": {"type": "data", "array": halves}})
    layout = base_layout(340)
    layout["xaxis"] |= {"title": {"text": "updates"}}
    layout["yaxis"] |= {"title": {"text": "loss, nat"}}
    if training.kept_step is not None and training.held_out:
        _mark(layout, training.kept_step, "kept")
    says = _told(training)
    measured = {row.step: f"{row.loss:.4g}" for row in training.held_out}
    steps = sorted({*(at + 1 for at in _thinned(range(len(training.losses)), _MAX_ROWS)), *measured})
    rows = [[str(step), f"{training.losses[step - 1]:.4g}", measured.get(step, "–")] for step in steps]
    numbers = Table("Losses", ["updates", "training loss", "held-out loss"], rows, numbers=(1, 2))
    return Picture("training-losses", "Losses", says, traces, layout, numbers)


def _told(training: Training) -> str:
    """What the curve does not say: clipping, the kept weights, an early end."""
    done = len(training.losses)
    says = f"Mean loss per trained position at each of {done} updates."
    if training.clipped:
        share, what = sum(training.clipped) / len(training.clipped), {"norm": "steps", "value": "numbers"}
        says += f" Clipping by {training.clipped_by} cut {share:.1%} of {what.get(training.clipped_by, 'units')}."
    if training.kept_step is not None and training.held_out:
        says += f" The weights after {training.kept_step} updates were kept"
        says += "; patience ended the training." if training.stopped_early else "."
    return says


def gradient_norms(training: Training | None) -> Picture | None:
    """The length of each block's gradient over time, where vanishing and exploding gradients are seen."""
    norms = training.norms if training is not None else None
    if norms is None or not norms.steps:
        return None
    last = [value for value in norms.gradients[-1] if value > 0]
    spread = max(last) / min(last) if last else 1.0
    says = "Length of each block's gradient before clipping, first block at the top."
    says += f" At the end the longest is {spread:.3g} times the shortest"
    says += "; they vanish or explode on their way through the network." if spread > SPREAD else "."
    return _map("gradient-norms", "Gradients by block", says, norms, norms.gradients)


def weight_norms(training: Training | None) -> Picture | None:
    """The length of each block's weights over time."""
    norms = training.norms if training is not None else None
    if norms is None or not norms.steps:
        return None
    says = "Length of each block's weights after the update, first block at the top."
    return _map("weight-norms", "Weights by block", says, norms, norms.weights)


def rate_test(training: Training | None) -> Picture | None:
    """The loss at growing rates, and the rate that was suggested."""
    test = training.rate_test if training is not None else None
    if test is None or len(test.rates) < 2:
        return None
    lowest, first = min(test.losses), test.losses[0]
    layout = base_layout(300)
    layout["xaxis"] |= {"type": "log", "title": {"text": "learning rate (logarithmic)"}}
    top = first + (first - lowest) + 0.1 * abs(first)
    layout["yaxis"] |= {"title": {"text": "loss, nat"}, "range": [lowest - 0.05 * (top - lowest), top]}
    _mark(layout, math.log10(test.suggested), f"suggested {test.suggested:g}")
    layout["shapes"][0] |= {"x0": test.suggested, "x1": test.suggested}
    says = f"A short run whose rate grows at every step; a tenth of the rate of the lowest loss is {test.suggested:g}."
    rows = [[f"{rate:.3g}", f"{loss:.4g}"] for rate, loss in zip(test.rates, test.losses, strict=True)]
    numbers = Table("Loss by learning rate", ["learning rate", "loss"], rows, numbers=(1,))
    trace = _line("loss", list(test.rates), list(test.losses), "blue")
    return Picture("rate-test", "Test of learning rates", says, [trace], layout, numbers)


def _map(name: str, title: str, says: str, norms: BlockNorms, values: Sequence[Sequence[float]]) -> Picture:
    """Blocks from top to bottom, updates from left to right, the logarithm of a length as colour."""
    trace = {
        "type": "heatmap",
        "x": [step + 1 for step in norms.steps],
        "y": [label(block) for block in norms.blocks],
        "z": [[math.log10(one) if one > 0 else None for one in row] for row in zip(*values, strict=True)],
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": "log₁₀"}},
        "hovertemplate": "%{y}<br>update %{x}<br>10^%{z:.2f}<extra></extra>",
    }
    layout = base_layout(max(240, 60 + 16 * len(norms.blocks)))
    layout["xaxis"] |= {"title": {"text": "updates"}}
    layout["yaxis"] |= {"type": "category", "autorange": "reversed"}
    heads = ["block", f"after {norms.steps[0] + 1}", f"after {norms.steps[-1] + 1}"]
    rows = [[block, f"{values[0][at]:.3g}", f"{values[-1][at]:.3g}"] for at, block in enumerate(norms.blocks)]
    return Picture(name, title, says, [trace], layout, Table(title, heads, rows, numbers=(1, 2)))


def _line(name: str, x: list[Any], y: list[Any], colour: str) -> dict[str, Any]:
    line = {"color": f"var(--{colour})", "width": 2}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": line}


def _mark(layout: dict[str, Any], at: float, text: str) -> None:
    """A dashed line across the picture at x, with a text beside it."""
    line = {"color": "var(--green)", "width": 1.5, "dash": "dash"}
    layout["shapes"] = [{"type": "line", "line": line, "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper"}]
    style = {"showarrow": False, "font": {"color": "var(--green)", "size": 12}, "xanchor": "left", "yanchor": "top"}
    layout["annotations"] = [{"text": label(text), "x": at, "y": 1, "yref": "paper", **style}]


def _thinned(steps: range, most: int = _MAX_POINTS) -> list[int]:
    """At most about `most` of the steps, the first and the last among them."""
    every = max(1, math.ceil(len(steps) / most))
    return sorted({*steps[::every], steps[-1]})
