"""Dropout, stochastic depth and label smoothing: where a network has them, and only while it trains."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gulliver.core.errors import ConfigError
from gulliver.nets.regularize import drop_layers, set_dropout
from gulliver.tasks import get_task

NONE = {"dropout": 0.0, "stochastic_depth": 0.0, "label_smoothing": 0.0}
LANGUAGE, VISION = get_task("language"), get_task("vision")
TOKENS = {"tokens": torch.randint(0, 200, (3, 20), generator=torch.Generator().manual_seed(0))}
IMAGES = {"image": torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), "label": torch.arange(3)}


class Half(nn.Module):
    """x -> x + 0.5, as a residual layer; [batch, …] -> (the same shape,)."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return x + 0.5, "kept"


def test_layers_are_left_out_as_often_as_asked_and_the_mean_stays() -> None:
    layers = [Half().train() for _ in range(4)]
    assert drop_layers(layers, 0.4) == 4
    torch.manual_seed(0)
    for number, layer in enumerate(layers, 1):
        found, told = layer(torch.zeros(20_000, 2))
        share = 0.4 * number / 4
        assert told == "kept" and torch.equal(found[:, 0], found[:, 1])
        assert float((found == 0).float().mean()) == pytest.approx(share, abs=0.015)
        assert float(found.mean()) == pytest.approx(0.5, abs=0.015)
        assert torch.equal(layer.eval()(torch.zeros(5, 2))[0], torch.full((5, 2), 0.5))


def test_dropout_is_set_in_layers_and_attentions() -> None:
    encoder, decoder = get_task("encoder").build(1), LANGUAGE.build(1)
    assert set_dropout(encoder, 0.3) > 3 and set_dropout(decoder, 0.3) == 2
    assert {module.p for module in encoder.modules() if isinstance(module, nn.Dropout)} == {0.3}
    decoder.train()
    torch.manual_seed(0)
    assert not torch.equal(LANGUAGE.loss(decoder, TOKENS), LANGUAGE.loss(decoder, TOKENS))
    decoder.eval()
    assert torch.equal(LANGUAGE.loss(decoder, TOKENS), LANGUAGE.loss(decoder, TOKENS))


@pytest.mark.parametrize(("task", "batch"), [(LANGUAGE, TOKENS), (VISION, IMAGES)])
def test_smoothed_targets_are_a_mixture_with_all_classes(task, batch) -> None:
    model = task.build(1, seed=1).eval()
    with torch.no_grad():
        plain = task.loss(model, batch)
        task.regularize(model, **NONE | {"label_smoothing": 0.25})
        assert torch.equal(task.loss(model, batch), plain), "what is measured is not smoothed"
        smoothed = task.loss(model.train(), batch)
        if task is LANGUAGE:
            logs = model(input_ids=batch["tokens"]).logits[:, :-1].log_softmax(-1).mean(-1).mean(1)
        else:
            logs = model(batch["image"]).log_softmax(-1).mean(-1)
    torch.testing.assert_close(smoothed, 0.75 * plain - 0.25 * logs)


def test_what_a_network_has_no_place_for_is_refused_by_name() -> None:
    for name in ("dropout", "stochastic_depth"):
        with pytest.raises(ConfigError, match=f"{name}: Inception has no place for it"):
            VISION.regularize(VISION.build(1), **NONE | {name: 0.1})
    encoder = get_task("encoder")
    with pytest.raises(ConfigError, match="label_smoothing: BertModel has no place"):
        encoder.regularize(encoder.build(1), **NONE | {"label_smoothing": 0.1})
    VISION.regularize(VISION.build(1), **NONE)
