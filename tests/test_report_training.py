"""What the report draws of a training, and that it says so where gradients vanish or patience ended it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from report_samples import artifact
from test_report import bare

from gulliver.core.store.store import Store
from gulliver.core.training import BlockNorms, HeldOut, RateTest, Training
from gulliver.report import training
from gulliver.report.gather import gather
from gulliver.report.html import page

BLOCKS = ("embed", "layers.0", "head")
NORMS = BlockNorms(
    blocks=BLOCKS,
    steps=(0, 50, 99),
    gradients=((1.0, 1.0, 1.0), (1e-3, 0.5, 1.0), (1e-6, 0.0, 2.0)),
    weights=((3.0, 4.0, 5.0),) * 3,
)
RECORD = Training(
    losses=tuple(2 + 1 / (step + 1) for step in range(100)),
    rates=(1e-3,) * 100,
    clipped=(1.0,) * 25 + (0.0,) * 75,
    clipped_by="norm",
    held_out=tuple(HeldOut(step=step, loss=3 - step / 100, half_width=0.1, examples=9) for step in (50, 100)),
    norms=NORMS,
    rate_test=RateTest(rates=(1e-4, 1e-3, 1e-2), losses=(2.0, 1.0, 400.0), suggested=1e-4),
    kept_step=50,
    stopped_early=True,
)


def test_losses_say_what_was_kept_and_cut() -> None:
    picture = training.losses(RECORD)
    assert picture is not None
    assert [trace["name"] for trace in picture.data] == ["training", "held out"]
    assert "Clipping by norm cut 25.0% of steps." in picture.says
    assert "after 50 updates were kept; patience ended the training." in picture.says
    assert picture.layout["shapes"][0]["x0"] == 50 and picture.data[1]["error_y"]["array"] == [0.1, 0.1]
    assert ["100", "2.01", "2"] in [list(row) for row in picture.numbers.rows]


def test_vanishing_gradients_are_seen() -> None:
    picture = training.gradient_norms(RECORD)
    assert picture is not None and "they vanish or explode" in picture.says and "2e+06 times" in picture.says
    (trace,) = picture.data
    assert trace["y"] == list(BLOCKS) and trace["x"] == [1, 51, 100]
    assert trace["z"][0] == pytest.approx([0.0, -3.0, -6.0]) and trace["z"][1][2] is None
    even = RECORD.model_copy(update={"norms": NORMS.model_copy(update={"gradients": ((1.0, 2.0, 3.0),) * 3})})
    healthy = training.gradient_norms(even)
    assert healthy is not None and "vanish" not in healthy.says
    assert training.weight_norms(RECORD) is not None


def test_the_test_of_rates_marks_its_suggestion_and_is_not_drowned_by_what_diverged() -> None:
    picture = training.rate_test(RECORD)
    assert picture is not None and picture.layout["shapes"][0]["x0"] == 1e-4
    assert picture.layout["yaxis"]["range"][1] < 4 and len(picture.numbers.rows) == 3


def test_nothing_is_drawn_of_what_is_not_there() -> None:
    drawn = (training.losses, training.gradient_norms, training.weight_norms, training.rate_test)
    former = Training(losses=(1.0, 0.5))
    assert [draw(None) for draw in drawn] == [None] * 4
    assert [draw(former) is None for draw in drawn] == [False, True, True, True]
    picture = training.losses(former)
    assert picture is not None and "kept" not in picture.says and "Clipping" not in picture.says
    long = training.losses(Training(losses=(1.0,) * 5000))
    assert long is not None and len(long.data[0]["x"]) <= 601 and len(long.numbers.rows) <= 41


def test_the_page_of_a_model_shows_its_training_or_that_of_the_one_it_was_made_from(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    network = artifact(store, "model", "train", {"model.safetensors": 9, Training.file: RECORD})
    packed = artifact(store, "model", "quantize", {"model.safetensors": 5}, [network.id])
    for model in (network, packed):
        data = gather(model, store)
        assert data.training == RECORD
        text = page(data)
        assert "<h2>Training</h2>" in text and "<h2>Norms by block</h2>" in text and "rate-test" in text
    assert "<h2>Training" not in page(bare())
    assert "nan" not in json.dumps([picture.figure for picture in (training.losses(RECORD),) if picture]).lower()
    assert page(replace(bare(), training=RECORD)) == page(replace(bare(), training=RECORD))
