"""The language task: networks of many architectures, batches, losses, blocks and scores, against plain versions."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from language_samples import CAUSAL, VOCABULARY, text, write_causal, write_dataset, write_encoder
from safetensors.torch import load_file, save_file

from gulliver.core.errors import ArtifactError, ConfigError, DataError
from gulliver.nets.precision import has_bfloat16, products_in
from gulliver.nets.weights import assign, read_safetensors, release
from gulliver.tasks import detect_task, get_task
from gulliver.tasks.encoder.pooling import encode
from gulliver.tasks.encoder.task import embeddings, passages
from gulliver.tasks.language import network
from gulliver.tasks.language.text import joined, token_stream
from gulliver.tasks.text import streaming
from gulliver.tasks.text.tokenizer import load_tokenizer

TASK, ENCODER = get_task("language"), get_task("encoder")


def scored(model, dataset, parent=None, *, folder, task=TASK, **options):
    return task.score(model, dataset, parent, folder=folder, options=task.chosen(options))


def batches_of(dataset, split, batch_size, seed, step, *, folder, task=TASK, **options):
    return task.batches(dataset, split, batch_size, seed, step, folder=folder, options=task.chosen(options))


def task_of(name):
    return ENCODER if name == "encoder" else TASK


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), [text(400, 1)], [text(100, 2)])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_causal(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


# ---- blocks -------------------------------------------------------------------------------------------------------
def batches_for(folder, dataset, count=2, task=TASK):
    found = list(itertools.islice(batches_of(dataset, "train", 2, 0, 0, folder=folder, task=task, tokens=24), count))
    return [*found, {name: tensor[:1, :16] for name, tensor in found[0].items()}]  # another shape


def expected(model, batch):
    if "mask" in batch:
        return model(input_ids=batch["tokens"], attention_mask=batch["mask"]).last_hidden_state
    return model(input_ids=batch["tokens"]).logits


@pytest.mark.parametrize("name", [*CAUSAL, "encoder"])
def test_streaming_through_blocks_equals_the_network(name, tmp_path, dataset):
    """Weights arrive just before a block and leave right after; every batch equals the whole network's output."""
    folder = write_encoder(tmp_path) if name == "encoder" else write_causal(tmp_path, name)
    task_of(name).save(task_of(name).load(folder), folder / "own")  # as `pull` does: under the network's own names
    folder = folder / "own"
    whole, empty = task_of(name).load(folder), task_of(name).load(folder, empty=True)
    batches = batches_for(folder, dataset, task=task_of(name))
    blocks = task_of(name).blocks(empty, batches)
    assert [block.name for block in blocks][:: len(blocks) - 1] == ["embed", "head"] and len(blocks) == 4
    activations = list(batches)
    with torch.no_grad():
        for block in blocks:
            tensors = [item for item in read_safetensors(folder) if item[0].startswith(block.prefixes)]
            assign(empty, tensors)
            activations = [block.forward(x, index) for index, x in enumerate(activations)]
            release(empty, block.prefixes)
        for batch, found in zip(batches, activations, strict=True):
            torch.testing.assert_close(found, expected(whole, batch), rtol=0, atol=0)


@pytest.mark.parametrize("name", [*CAUSAL, "encoder"])
def test_every_parameter_has_one_block_and_weights_are_matrices(name, tmp_path, dataset):
    folder = write_encoder(tmp_path) if name == "encoder" else write_causal(tmp_path, name)
    model = task_of(name).load(folder, empty=True)
    blocks = task_of(name).blocks(model, batches_for(folder, dataset, task=task_of(name)))
    tied = model.get_input_embeddings().weight is getattr(model.get_output_embeddings(), "weight", None)
    for parameter, _ in model.named_parameters():
        homes = [block.name for block in blocks if parameter.startswith(block.prefixes)]
        shared = tied and parameter == blocks[0].weights[0]
        assert homes == (["embed", "head"] if shared else homes[:1]) and homes
    kinds = [weight for block in blocks[1:] for weight in block.weights]
    assert all(model.get_parameter(weight).dim() == 2 for weight in [*blocks[0].weights, *kinds])
    assert len(blocks[-1].weights) == (0 if tied else 1)
    if name == "llama-tied":
        assert len(kinds) == 14


def test_layers_that_do_not_chain_are_refused(llama, dataset):
    model = TASK.load(llama)
    layer = model.model.layers[1]
    model.model.layers[1].forward = lambda x, *args, **kwargs: x
    model.model.layers[0].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ConfigError, match="cannot be streamed"):
        TASK.blocks(model, batches_for(llama, dataset))
    assert "forward" in layer.__dict__  # what was there before is put back
    with pytest.raises(ConfigError, match="no list of layers"):
        streaming.largest_list(torch.nn.Linear(2, 2))


# ---- losses -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gemma2", "phi"])
def test_losses_equal_the_plain_formulas(name, tmp_path, dataset):
    folder, other = write_causal(tmp_path / "a", name), write_causal(tmp_path / "b", name, seed=5)
    model, parent = TASK.load(folder), TASK.load(other)
    batch = batches_for(folder, dataset)[0]
    logits, target = model(input_ids=batch["tokens"]).logits, parent(input_ids=batch["tokens"]).logits
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["tokens"][:, 1:], reduction="none")
    torch.testing.assert_close(TASK.loss(model, batch), plain.mean(1))
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none"
    )
    losses = TASK.loss(model, batch, parent)
    torch.testing.assert_close(losses, divergence.sum(-1).mean(1), rtol=1e-4, atol=1e-6)
    (plain_grad,) = torch.autograd.grad(divergence.sum(-1).mean(), model.get_input_embeddings().weight)
    (grad,) = torch.autograd.grad(losses.mean(), model.get_input_embeddings().weight)
    torch.testing.assert_close(grad, plain_grad, rtol=1e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in parent.parameters())


def test_a_plain_head_is_recognized(tmp_path):
    plain = {name: network.has_plain_head(TASK.load(write_causal(tmp_path / name, name))) for name in CAUSAL}
    assert plain == {name: name not in ("gemma2", "phi") for name in CAUSAL}


def test_an_encoder_learns_from_its_parent_only(encoder, tmp_path, dataset):
    model, parent = ENCODER.load(encoder), ENCODER.load(write_encoder(tmp_path, seed=3))
    batch = batches_for(encoder, dataset, task=ENCODER)[0]
    assert ENCODER.loss(model, batch, model).abs().max() < 1e-6
    assert ENCODER.loss(model, batch, parent).min() > 1e-4
    with pytest.raises(ConfigError, match="give a parent"):
        ENCODER.loss(model, batch)


def test_padding_does_not_change_an_embedding(encoder):
    model = ENCODER.load(encoder)
    tokens = torch.tensor([[2, 7, 8, 9, 3, 0, 0]])
    long = {"tokens": tokens, "mask": (tokens != 0).long()}
    short = {name: tensor[:, :5] for name, tensor in long.items()}
    with torch.no_grad():
        torch.testing.assert_close(encode(model, long), encode(model, short))


# ---- batches ------------------------------------------------------------------------------------------------------
def test_batches_are_a_function_of_seed_and_step_and_visit_all_windows_once(llama, dataset):
    def take(seed, step, count):
        return [
            batch["tokens"]
            for batch in itertools.islice(batches_of(dataset, "train", 3, seed, step, folder=llama, tokens=32), count)
        ]

    whole = take(0, 0, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], take(0, 4, 2), strict=True))
    assert not torch.equal(whole[0], take(1, 0, 1)[0])
    stream = token_stream(dataset, "train", llama)
    windows = (len(stream) - 31) // 32
    seen = torch.cat(take(0, 0, windows // 3))
    places = {tuple(window.tolist()) for window in stream.unfold(0, 32, 1)}
    assert all(tuple(row.tolist()) in places for row in seen)
    assert seen.numel() > 0.9 * (len(stream) - 32)


@pytest.mark.parametrize(("tokens", "error"), [(1, ConfigError), (10**6, DataError)])
def test_windows_that_cannot_be_are_refused(llama, dataset, tokens, error):
    with pytest.raises(error, match="tokens"):
        next(batches_of(dataset, "train", 1, 0, 0, folder=llama, tokens=tokens))


def test_encoder_batches_are_padded_texts(encoder, dataset):
    batch = next(batches_of(dataset, "train", 4, 0, 0, folder=encoder, task=ENCODER, tokens=16))
    assert batch["tokens"].shape == batch["mask"].shape == (4, 16)
    assert set(batch["mask"].unique().tolist()) <= {0, 1}


# ---- scores -------------------------------------------------------------------------------------------------------
def test_perplexity_equals_the_plain_measurement(llama, dataset, tmp_path):
    """Windows, positions, precision and mean as in an independent loop over the tokenizer's output."""
    model, parent = TASK.load(llama), TASK.load(write_causal(tmp_path, seed=9))
    ids = torch.tensor(load_tokenizer(llama)(text(100, 2))["input_ids"])[: 5 * 64].view(5, 64)
    totals = []
    with torch.no_grad(), products_in(has_bfloat16()):
        for net in (model, parent):
            logits = [net(input_ids=row[None]).logits[0, :-1].float() for row in ids]
            nll = [torch.nn.functional.cross_entropy(a, row[1:]).item() for a, row in zip(logits, ids, strict=True)]
            totals.append((sum(nll) / 5, logits))
    rows = {item.metric: item for item in scored(model, dataset, parent, folder=llama, windows=5, context=64)}
    assert rows["perplexity"].value == pytest.approx(math.exp(totals[0][0]), rel=1e-4)
    assert rows["perplexity_ratio"].value == pytest.approx(math.exp(totals[0][0] - totals[1][0]), rel=1e-4)
    assert rows["quality_loss"].value == pytest.approx(rows["perplexity_ratio"].value - 1)
    ours, theirs = (torch.stack(logits).log_softmax(-1) for _, logits in totals)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    assert rows["kl_divergence"].value == pytest.approx(divergence, rel=1e-5)
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    assert rows["top1_agreement"].value == pytest.approx(same, abs=0.01)
    assert rows["perplexity"].n == 5 and rows["perplexity"].detail["context"] == 64
    again = scored(model, dataset, parent, folder=llama, windows=5, context=64)  # the parent's outputs are kept
    assert [item.value for item in again] == [item.value for item in rows.values()]


def test_the_kept_outputs_of_a_changed_parent_are_not_used(llama, dataset):
    model, parent = TASK.load(llama), TASK.load(llama)
    options = {"folder": llama, "windows": 2, "context": 32}
    assert {item.metric: item for item in scored(model, dataset, parent, **options)}["quality_loss"].value == 0
    with torch.no_grad():
        parent.model.norm.weight.mul_(3)
    assert {item.metric: item for item in scored(model, dataset, parent, **options)}["quality_loss"].value != 0


def test_a_model_equals_itself_and_intervals_hold_the_value(llama, dataset):
    model = TASK.load(llama)
    rows = {item.metric: item for item in scored(model, dataset, TASK.load(llama), folder=llama, context=64)}
    assert rows["perplexity_ratio"].value == 1 and rows["top1_agreement"].value == 1
    assert abs(rows["kl_divergence"].value) < 1e-6
    assert all(item.low <= item.value <= item.high for item in rows.values())
    assert rows["perplexity"].data_hash == dataset.files["examples.parquet"].sha256


def test_the_unigram_baseline_is_the_train_splits(llama, dataset):
    rows = {item.metric: item for item in scored(TASK.load(llama), dataset, folder=llama, windows=4, context=32)}
    train = token_stream(dataset, "train", llama)
    counts = torch.ones(VOCABULARY).double()
    for token in train.tolist():
        counts[token] += 1
    targets = token_stream(dataset, "eval", llama)[: 4 * 32].view(4, 32)[:, 1:]
    nll = -(counts / counts.sum()).log()[targets].mean().item()
    assert rows["baseline_perplexity"].value == pytest.approx(math.exp(nll))
    ratio = rows["perplexity"].value / rows["baseline_perplexity"].value
    assert rows["perplexity_vs_baseline"].value == pytest.approx(ratio)
    assert rows["perplexity_vs_baseline"].low > 1  # a network of random weights does not beat it


def test_scores_that_cannot_be_are_refused(llama, tmp_path, dataset):
    model = TASK.load(llama)
    short = write_dataset(tmp_path / "short", [text(20, 1)], ["too short"])
    with pytest.raises(DataError, match="two windows"):
        scored(model, short, folder=llama)
    other = TASK.load(write_causal(tmp_path / "other", vocab_size=300))
    with pytest.raises(DataError, match="vocabularies"):
        scored(model, dataset, other, folder=llama)


def test_an_encoder_is_scored_by_cosine_to_its_parent(encoder, tmp_path, dataset):
    model, parent = ENCODER.load(encoder), ENCODER.load(write_encoder(tmp_path, seed=3))
    rows = {item.metric: item for item in scored(model, dataset, parent, folder=encoder, task=ENCODER, texts=20)}
    found = passages(dataset, "eval")[:20]
    ours, theirs = (embeddings(net, found, encoder) for net in (model, parent))
    assert rows["cosine_similarity"].value == pytest.approx((ours * theirs).sum(1).mean().item(), abs=1e-6)
    assert rows["quality_loss"].value == pytest.approx(1 - rows["cosine_similarity"].value)
    assert rows["cosine_similarity"].n == 20
    same = {
        item.metric: item
        for item in scored(model, dataset, ENCODER.load(encoder), folder=encoder, task=ENCODER, texts=20)
    }
    assert same["cosine_similarity"].value == pytest.approx(1)
    assert same["cosine_similarity_vs_baseline"].low > 0
    assert [item.metric for item in scored(model, dataset, folder=encoder, task=ENCODER)] == [
        "baseline_cosine_similarity"
    ]


# ---- text ---------------------------------------------------------------------------------------------------------
def test_the_stream_of_one_text_is_the_tokenizer_of_that_text(llama, dataset):
    whole = load_tokenizer(llama)(text(100, 2))["input_ids"]
    assert token_stream(dataset, "eval", llama).tolist() == whole
    assert load_tokenizer(llama).decode(whole) == text(100, 2)
    assert joined(["a", "b\n", "c"]) == "a\n\nb\nc"


def read(path, split, **options):
    return [row["text"] for row in TASK.rows(path, split, TASK.chosen(options))]


def test_the_held_out_part_is_the_end_cut_at_a_paragraph(tmp_path):
    paragraphs = [f"paragraph {number} " * 5 for number in range(40)]
    whole = "\n\n".join(paragraphs)
    (tmp_path / "one.txt").write_text(whole)
    train, held_out = (read(tmp_path / "one.txt", split) for split in ("train", "eval"))
    assert train[0] + held_out[0] == whole
    assert held_out[0].startswith("paragraph 37") and train[0].endswith("\n\n")
    assert read(tmp_path / "one.txt", "all") == [whole]
    rows = [f"row {number:02}" for number in range(50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert read(tmp_path / "rows.jsonl", "train") == rows[:45] and read(tmp_path / "rows.jsonl", "eval") == rows[45:]
    with pytest.raises(ConfigError, match="holdout"):
        read(tmp_path / "rows.jsonl", "train", holdout=1.0)


def test_reading_names_what_is_wrong(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "broken.jsonl").write_text("{\n")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "broken.parquet").write_text("nothing")
    for name, told in (
        ("rows.jsonl", "body"),
        ("broken.jsonl", "line 1"),
        ("latin.txt", "UTF-8"),
        ("table.csv", "csv"),
        ("broken.parquet", "Parquet"),
        ("absent.txt", "does not exist"),
    ):
        with pytest.raises(DataError, match=told):
            read(tmp_path / name, "train")
    assert read(tmp_path / "rows.jsonl", "all", text_column="body") == ["x"]


# ---- folders ------------------------------------------------------------------------------------------------------
def test_saving_and_loading_keeps_everything(llama, tmp_path):
    model = TASK.load(llama)
    TASK.save(model.to(torch.bfloat16), tmp_path / "a")
    again = TASK.load(tmp_path / "a")
    assert load_file(tmp_path / "a" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert "lm_head.weight" not in load_file(tmp_path / "a" / "model.safetensors")
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).float())
    TASK.save(again.to(torch.bfloat16), tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes(), file.name
    assert str(tmp_path) not in (tmp_path / "a" / "config.json").read_text()


def test_names_of_older_checkpoints_are_translated(encoder, tmp_path):
    """A prefix that another head's checkpoint carries, and a pooler that was never saved."""
    folder = write_encoder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    old = {f"bert.{name}": tensor for name, tensor in tensors.items() if not name.startswith("pooler")}
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    model, reference = ENCODER.load(folder), ENCODER.load(encoder)
    assert torch.equal(model.encoder.layer[0].output.dense.weight, reference.encoder.layer[0].output.dense.weight)
    assert model.pooler.dense.weight.abs().max() == 0


def test_missing_weights_are_refused(tmp_path):
    folder = write_causal(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        TASK.load(folder)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, "no config.json"),
        ("[]", "not a JSON object"),
        ('{"model_type": "no-such-model"}', "not a usable model config"),
        ('{"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}', "never"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "config.json"),
    ],
)
def test_a_hostile_config_is_refused(tmp_path, config, told):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ArtifactError, match=told):
        TASK.load(tmp_path)


def test_build_grows_with_its_dial():
    sizes = [sum(p.numel() for p in TASK.build(size).parameters()) for size in (1, 2, 3)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    assert torch.equal(TASK.build(1, 4).lm_head.weight, TASK.build(1, 4).lm_head.weight)
    assert not torch.equal(TASK.build(1, 4).lm_head.weight, TASK.build(1, 5).lm_head.weight)


# ---- what a folder holds ------------------------------------------------------------------------------------------
def test_workloads_count_what_they_do(llama, encoder):
    for task, folder, metrics in (
        (TASK, llama, {"prefill_tokens_per_s", "decode_tokens_per_s"}),
        (ENCODER, encoder, {"examples_per_s"}),
    ):
        workloads = task.workloads(task.load(folder), folder)
        assert set(workloads) == metrics
        assert [workload() for workload in workloads.values()] == [workload() for workload in workloads.values()]


def test_a_config_says_which_kind_of_model_it_is(llama, encoder):
    assert (detect_task(llama), detect_task(encoder)) == ("language", "encoder")
    (encoder / "modules.json").unlink()
    assert detect_task(encoder) == "encoder"
    config = json.loads((encoder / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    for name in ("T5ForConditionalGeneration", "WhisperModel", "BertForSequenceClassification"):
        odd = {**config, "architectures": [name], "is_encoder_decoder": name == "WhisperModel"}
        (encoder / "config.json").write_text(json.dumps(odd))
        with pytest.raises(ArtifactError, match=name):
            detect_task(encoder)
