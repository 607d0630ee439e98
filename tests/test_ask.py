"""`gulliver ask` and `gulliver.ask`: a prompt -> text, texts -> vectors, a picture -> classes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from language_samples import write_causal, write_encoder
from PIL import Image

import gulliver
from gulliver.core.errors import ConfigError, DataError
from gulliver.tasks import get_task

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of each family, as a folder that is not an artifact."""
    home = tmp_path_factory.mktemp("ask")
    task = get_task("vision")
    task.save(task.build(1, seed=3).eval(), home / "vision")
    return {
        "language": write_causal(home / "language"),
        "encoder": write_encoder(home / "encoder"),
        "vision": home / "vision",
    }


def test_a_prompt_is_answered_with_text(folders: dict[str, Path], command: Command) -> None:
    request = {"prompt": "the giant", "max_tokens": 3, "temperature": 0}
    code, out, _ = command("ask", folders["language"], json.dumps(request), "--json")
    found = json.loads(out)
    assert code == 0 and found["completion_tokens"] <= 3 and found["finish_reason"] in ("length", "stop")
    assert gulliver.ask(folders["language"], request) == found
    code, out, err = command("ask", folders["language"], "the", "giant")
    assert code == 0 and out and "language by" in err


def test_texts_are_answered_with_vectors(folders: dict[str, Path], command: Command) -> None:
    code, out, _ = command("ask", folders["encoder"], "a small machine", "a large giant", "--json")
    vectors = json.loads(out)["vectors"]
    assert code == 0 and len(vectors) == 2
    assert all(math.isclose(sum(x * x for x in vector), 1, rel_tol=1e-4) for vector in vectors)
    code, out, _ = command("ask", folders["encoder"], "a small machine", "a large giant")
    assert code == 0 and out.count("cosine to the first") == 2
    assert gulliver.ask(folders["encoder"], ["a small machine"])["vectors"][0] == pytest.approx(vectors[0], abs=1e-5)


def test_a_picture_is_answered_with_classes(folders: dict[str, Path], command: Command, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.jpg")
    code, out, _ = command("ask", folders["vision"], tmp_path / "picture.jpg", "--json")
    found = json.loads(out)
    assert code == 0 and sum(found["probabilities"]) == pytest.approx(1, abs=1e-5)
    assert found["label"] == max(range(10), key=found["probabilities"].__getitem__)
    code, _, err = command("ask", folders["vision"], json.dumps([0.123456] * 64))
    assert code == 0, err
    assert command("ask", folders["vision"], "[" * 9000)[0] == 2
    code, out, _ = command("ask", folders["vision"], tmp_path / "picture.jpg")
    assert code == 0 and out.startswith(f"class {found['label']}: ")
    assert gulliver.ask(folders["vision"], str(tmp_path / "picture.jpg")) == found


def test_a_picture_is_turned_as_its_file_says(folders: dict[str, Path], tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4] = 255
    turned = Image.fromarray(np.rot90(pixels, 1).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    answers = [gulliver.ask(folders["vision"], str(tmp_path / name)) for name in ("turned.png", "plain.png")]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("family", "words", "told"),
    [
        ("language", [json.dumps({"prompt": "a", "colour": 1})], "colour"),
        ("language", [json.dumps({"prompt": "a", "messages": []})], "messages"),
        ("language", [json.dumps({})], "either prompt or messages"),
        ("encoder", [json.dumps({"texts": []})], "texts"),
        ("encoder", ["a b c " * 100], "truncate"),
        ("vision", ["nowhere.png"], "path of a picture"),
        ("vision", [json.dumps({"image": [2.0] * 64})], "from 0 to 1"),
        ("vision", [json.dumps({"image": [0.5] * 63})], "63 numbers"),
        ("vision", [json.dumps({"image": "%%%"})], "base64"),
        ("vision", ["a.png", "b.png"], "one picture"),
    ],
)
def test_a_wrong_input_names_what_is_wrong(
    folders: dict[str, Path], command: Command, family: str, words: list[str], told: str
) -> None:
    code, _, err = command("ask", folders[family], *words)
    assert code == 2 and told in err and "Traceback" not in err


def test_a_file_that_is_not_a_picture_is_refused(folders: dict[str, Path], command: Command, tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    Image.fromarray(np.zeros((50, 50), np.uint8)).save(whole)
    files = {"text.png": b"not a picture", "cut.png": whole.read_bytes()[:60], "empty.png": b""}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        code, _, err = command("ask", folders["vision"], tmp_path / name)
        assert code == 2 and "cannot be read" in err and "PNG" in err
    Image.new("1", (30000, 30000)).save(tmp_path / "huge.png")
    code, _, err = command("ask", folders["vision"], tmp_path / "huge.png")
    assert code == 2 and "more than 64,000,000 pixels" in err


def test_options_that_a_family_has_no_use_for_are_refused(folders: dict[str, Path]) -> None:
    from gulliver.tasks.answerer import OpenOptions

    with pytest.raises(ConfigError, match="reference backend"):
        gulliver.ask(folders["vision"], {"image": [0.5] * 64}, options=OpenOptions(backend="native"))
    with pytest.raises(ConfigError, match="--ram"):
        gulliver.ask(folders["encoder"], ["a"], options=OpenOptions(max_ram_bytes=10**9))
    with pytest.raises(DataError):
        gulliver.ask(folders["vision"], ["a", "b"])
