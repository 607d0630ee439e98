"""Hostile descriptions of a model through the native path: each is refused with an error of ours, or it runs.

Nothing else may come of them: no crash, no bare exception, no hang. test_hostile_weights.py has the weight files.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hostile_samples import WEIGHTS, change_config, join, refused, split, tried, write_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gulliver.core.store.manifest import PACKING
from gulliver.runtime.decode import native_reason
from gulliver.runtime.lower import MAX_CONFIG_BYTES, MAX_LAYERS, MAX_LENGTH

pytestmark = pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def folder(models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the packed Llama, to be damaged."""
    return shutil.copytree(models["llama"], tmp_path / "model")


# ---- the config ---------------------------------------------------------------------------------------------------
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
COUNTS = (
    *("hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size", "max_position_embeddings"),
)
NO_COUNT = (0, -1, -(2**40), 2**31 - 1, 2**31, 2**32 + 1, 2**62, 1e300, 3.0, True, "3", "nan", [], [3], {})
NO_NUMBER = (-1.0, 1e300, "nan", "inf", True, [], {}, "")
BAD_CONFIGS: list[dict[str, Any]] = [
    *({key: value} for key in COUNTS for value in NO_COUNT),
    *({key: None} for key in COUNTS if key not in ("num_key_value_heads", "head_dim")),
    *({"rms_norm_eps": value} for value in NO_NUMBER),
    *({"sliding_window": value} for value in (-1, 2**31, 10**12, 1.5, "24", [])),
    *({"rope_parameters": {**LLAMA3, key: value}} for key in list(LLAMA3)[1:] for value in (0, *NO_NUMBER)),
    *({"rope_parameters": {"rope_type": "linear", "factor": value}} for value in (None, 0, 1e-40, *NO_NUMBER)),
    {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}},
    *({"rope_parameters": value} for value in ("abc", 5, [1], [["rope_type", []]], {"rope_type": []}, {"a": {}})),
    {"rope_parameters": None, "rope_scaling": {"type": {}}},
    *({"architectures": value} for value in ([], {}, 5, None, "Llama", [["LlamaForCausalLM"]], [None])),
    *({"hidden_act": value} for value in (None, 5, [], {}, "x" * 10**5)),
    {"num_hidden_layers": MAX_LAYERS},
    {"num_attention_heads": 2**18},
    {"num_attention_heads": 2**10, "head_dim": 2**10},
    {"num_key_value_heads": 4},
    {"tie_word_embeddings": False},
]


@pytest.mark.parametrize("change", BAD_CONFIGS, ids=lambda change: str(change)[:60])
def test_a_hostile_config_is_refused(folder: Path, change: dict[str, Any]) -> None:
    change_config(folder, **change)
    refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        *({"query_pre_attn_scalar": value} for value in (0, -1, "nan", 1e-300, 1e300, [])),
        *({"layer_types": None, "sliding_window_pattern": value} for value in (-1, 1.5, "x", 2**62)),
        *({"layer_types": value} for value in ("abc", 5, [], [1, 2, 3], [[]] * 3, [{}] * 3, {}, ["x" * 10**5] * 3)),
        {"rope_parameters": {"full_attention": {"rope_theta": "nan"}}},
        {"rope_parameters": {"full_attention": {"factor": 1, "rope_type": 0}}},
        {"rope_parameters": {"sliding_attention": {"rope_theta": -1e4}}},
        {"rope_parameters": {"rope_theta": 1e4}, "rope_local_base_freq": "inf"},
    ],
    ids=lambda change: str(change)[:60],
)  # fmt: skip
def test_a_hostile_config_of_gemma_is_refused(models: dict[str, Path], tmp_path: Path, change: dict[str, Any]) -> None:
    folder = shutil.copytree(models["gemma3"], tmp_path / "model")
    change_config(folder, **change)
    refused(folder)


RAW = {
    "empty": b"",
    "a list": b"[]",
    "a number": b"1e5",
    "cut": b'{"architectures": ["Llama',
    "not UTF-8": b"\xff\xfe\x00",
    "not finite": b'{"hidden_size": NaN}',
    "a huge float": b'{"rms_norm_eps": 1e999}',
    "a huge number": b'{"hidden_size": ' + b"9" * 5000 + b"}",
    "deep": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a key twice": b'{"hidden_size": 1, "hidden_size": 2}',
    "many keys, one twice": b"{" + b",".join(b'"%d":0' % n for n in range(200_000)) + b',"199999":0}',
    "a zero byte": b'{"architectures": ["\\u0000"]}',
    "half a pair": b'{"architectures": ["\\ud800"]}',
    "too long": b'{"a": "' + b" " * MAX_CONFIG_BYTES + b'"}',
}


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("file", ["config.json", PACKING])
def test_json_that_breaks_the_rules_is_refused(folder: Path, file: str, name: str) -> None:
    (folder / file).write_bytes(RAW[name])
    refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"max_position_embeddings": MAX_LENGTH},
        {"max_position_embeddings": 1},
        {"rms_norm_eps": 0},
        {"sliding_window": 2**31 - 1},
        {"rope_parameters": {"rope_type": "linear", "factor": 1e-6, "rope_theta": 1e-6}},
        {"rope_parameters": {**LLAMA3, "factor": 1e30, "original_max_position_embeddings": 1e30}},
        {"num_key_value_heads": 2, "head_dim": None, "hidden_size": 72},
    ],
    ids=lambda change: str(change)[:60],
)
def test_a_strange_config_runs_or_is_refused(folder: Path, change: dict[str, Any]) -> None:
    change_config(folder, **change)
    tried(folder)


# ---- anything ---------------------------------------------------------------------------------------------------
NASTY: list[Any] = [
    *(0, -1, 1, 2, 15, 16, 64, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, -(2**63), 10**12),
    *(0.0, -0.0, 0.5, 1e-40, 1e39, 1e300, -1e300, None, True, False, "", "nan", "inf", "u8g32", "c2g128"),
    *([], {}, [[]], [0], [1, 1], {"rope_type": "linear", "factor": 1e-300}),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in ((*path, key), *places(inner, (*path, key)))]


def changed(body: Any, dice: st.DataObject) -> Any:
    """A JSON value with one to three places changed, removed or copied from elsewhere in it."""
    body = json.loads(json.dumps(body))
    for _ in range(dice.draw(st.integers(1, 3))):
        path = dice.draw(st.sampled_from(places(body) or [()]))
        if not path:
            return body
        *way, last = path
        at = body
        for key in way:
            at = at[key]
        kind = dice.draw(st.sampled_from(["nasty", "remove", "copy", "near"]))
        if kind == "remove":
            del at[last]
        elif kind == "copy":
            source: Any = body
            for key in dice.draw(st.sampled_from(places(body))):
                source = source[key]
            at[last] = json.loads(json.dumps(source))
        elif kind == "near" and type(at[last]) is int:
            at[last] += dice.draw(st.sampled_from([-64, -16, -1, 1, 16, 64]))
        else:
            at[last] = json.loads(json.dumps(dice.draw(st.sampled_from(NASTY))))
    return body


FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@FEW
@given(st.sampled_from(["llama", "gemma3"]), st.sampled_from(["config.json", PACKING]), st.data())
def test_any_change_of_a_description_runs_or_is_refused(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, name: str, file: str, dice: st.DataObject
) -> None:
    folder = shutil.copytree(models[name], tmp_path_factory.mktemp("any") / "model")
    body = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(changed(body, dice)))
    tried(folder)


@FEW
@given(st.data())
def test_any_change_of_a_header_runs_or_is_refused(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, dice: st.DataObject
) -> None:
    folder = shutil.copytree(models["llama"], tmp_path_factory.mktemp("any") / "model")
    header, body = split(folder / WEIGHTS)
    join(folder / WEIGHTS, changed(header, dice), body)
    tried(folder)


@FEW
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20), st.data())
def test_any_change_of_bytes_runs_or_is_refused(
    models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    flips: list[tuple[float, int]],
    dice: st.DataObject,
) -> None:
    folder = shutil.copytree(models["llama"], tmp_path_factory.mktemp("any") / "model")
    data = bytearray((folder / WEIGHTS).read_bytes())
    header_end = 8 + struct.unpack("<Q", data[:8])[0]
    first, last = dice.draw(st.sampled_from([(0, header_end), (header_end, len(data))]))
    for where, value in flips:
        data[first + int(where * (last - first))] = value
    (folder / WEIGHTS).write_bytes(data)
    tried(folder)
