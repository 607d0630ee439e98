"""Which networks run a block at a time: how their layers return what the next one gets, and what refuses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from language_samples import SMALL, VOCABULARY, text, write_dataset
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from gulliver.core.errors import ConfigError
from gulliver.core.progress import Progress
from gulliver.core.records import StatisticsTable
from gulliver.core.store.store import Store
from gulliver.pipeline.call import call
from gulliver.pipeline.resolve import resolve_model
from gulliver.tasks.text.streaming import Stream
from gulliver.tasks.text.tokenizer import write_byte_tokenizer

BATCHES = [{"tokens": torch.arange(24).view(2, 12)}, {"tokens": torch.arange(20).view(2, 10)}]
CHAINS: dict[str, tuple[str, dict[str, Any]]] = {
    "told not to keep keys by a parameter that is passed on": (
        "granitemoe",
        SMALL | {"num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "scales what it looked up in place": (
        "ctrl",
        {"vocab_size": VOCABULARY, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ),
    "layers return a pair": (
        "bamba",
        SMALL
        | {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
        | {"mamba_chunk_size": 16},
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_network_streams_and_gives_the_same(name: str) -> None:
    kind, options = CHAINS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    blocks = Stream(model, BATCHES).blocks()
    assert len(blocks) == 4
    with torch.no_grad():
        for index, batch in enumerate(BATCHES):
            x: Any = batch
            for block in blocks:
                x = block.forward(x, index)
            right = model(input_ids=batch["tokens"], use_cache=False).logits
            torch.testing.assert_close(x, right, rtol=1e-4, atol=1e-5)


NO_CHAINS: dict[str, tuple[str, dict[str, Any]]] = {
    "positions are asked for by a size": (
        "roformer",
        {key: value for key, value in SMALL.items() if key != "num_key_value_heads"} | {"is_decoder": True},
    ),
    "positions are asked for by a size, in a decoder alone": (
        "prophetnet",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "max_position_embeddings": 128, "ngram": 2, "pad_token_id": 0}
        | dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2)
        | dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4)
        | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    ),
}


@pytest.mark.parametrize("name", NO_CHAINS)
def test_a_network_that_does_not_stream_is_calibrated_whole(name: str, tmp_path: Path, store: Store) -> None:
    kind, options = NO_CHAINS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **options)).eval()
    with pytest.raises(ConfigError, match=r"cannot be streamed.*called without a tensor"):
        Stream(model, BATCHES)
    model.save_pretrained(tmp_path / "model")
    write_byte_tokenizer(tmp_path / "model")
    given = {"store": store, "progress": Progress(quiet=True)}
    data = write_dataset(tmp_path / "data", [text(200, 1)], [text(40, 2)])
    cfg = {"examples": 2, "batch_size": 2, "gradient_examples": 2, "family": {"tokens": 32}}
    made = call("calibrate", cfg, {"model": resolve_model(tmp_path / "model", **given), "dataset": data}, **given)
    table = StatisticsTable.of(made)
    assert table.weights and any("the network is run whole" in note for note in table.notes)


@pytest.mark.parametrize("error", [StopIteration, KeyError, AssertionError, ZeroDivisionError])
def test_whatever_a_network_raises_says_that_it_does_not_stream(error: type[Exception]) -> None:
    model = Network()

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise error("no place for this")

    model.forward = broken  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="cannot be streamed"):
        Stream(model, BATCHES)


class Layer(nn.Module):
    """Returns a pair, and takes the other half of the pair before it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.linear(hidden_states) + (0 if before is None else before), hidden_states


class Network(nn.Module):
    """`handed`: layers also get what the layer before them returned as its second. `added`: the end gets the last."""

    def __init__(self, handed: bool = False, added: bool = False) -> None:
        super().__init__()
        self.embedding, self.layers = nn.Embedding(32, 8), nn.ModuleList([Layer(), Layer()])
        self.handed, self.added = handed, added

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: Tensor) -> Any:
        x, second = self.embedding(input_ids), None
        for layer in self.layers:
            x, second = layer(x, second) if self.handed else layer(x)
        return BaseModelOutput(last_hidden_state=x + second if self.added and second is not None else x)


def test_a_pair_of_which_more_than_the_first_is_read_is_no_chain() -> None:
    assert len(Stream(Network(), BATCHES).blocks()) == 4
    with pytest.raises(ConfigError, match=r"cannot be streamed.*computed from weights, beside their input"):
        Stream(Network(handed=True), BATCHES)
    with pytest.raises(ConfigError, match="cannot be streamed"):
        Stream(Network(added=True), BATCHES)
