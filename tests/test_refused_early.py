"""What is wrong is found first: options before a model is looked for, a model's file before anything is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gulliver
from gulliver.core.errors import ConfigError, MissingExtra
from gulliver.core.progress import Progress
from gulliver.data import pull
from gulliver.tasks.answerer import OpenOptions

Run = Callable[..., tuple[int, str, str]]
AFAR = "hf:no/model"


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "download", lambda *_: pytest.fail("a model was downloaded"))
    monkeypatch.setitem(sys.modules, "lm_eval", None)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["pull", AFAR, "--task", "langauge"], "unknown task 'langauge'; did you mean 'language'"),
        (["pull", AFAR, "--seed", "-1"], "seed is -1"),
        (["export", AFAR, "--format", "onnx"], "onnx cannot be written yet"),
        (["export", AFAR, "--format", "gguf", "--widen"], "widen is for compressed-tensors"),
        (["export", AFAR, "--format", "safetensors", "--type", "q8_0"], "type is for gguf"),
        (["quantize", AFAR, "--calibration", "abcdef", "--bits", "7"], "bits is 7; choose one of 2, 3, 4, 5, 6, 8"),
        (["quantize", AFAR, "--calibration", "abcdef", "--bits", "8"], "a codebook has 2 to 6 bits"),
        (["quantize", AFAR, "--calibration", "abcdef", "--group-size", "48"], "group_size is 48"),
        (["quantize", AFAR, "--calibration", "nosuch"], "'nosuch' is neither the id nor the folder"),
        (["quantize", AFAR, "--calibration", "abcdef"], "no artifact abcdef"),
        (["distill", AFAR, "--parent", "nosuch", "--data", "nosuch"], "nosuch does not exist"),
        (["harness", AFAR, "--tasks", "arc_easy"], "gulliver[eval]"),
        (["audit", AFAR, "--tasks", "arc_easy"], "gulliver[eval]"),
        (["audit", AFAR, "--limit", "3"], "limit is for tasks of lm-eval"),
        (["audit", AFAR, "--include-path", "."], "include_path is for tasks of lm-eval"),
        (["audit", AFAR, "--eval-data", "a.txt"], "eval_data is 'a.txt', but data is missing"),
        (["audit", AFAR, "--data", "nosuch"], "nosuch does not exist"),
        (["audit", AFAR, "--parent", "nosuch"], "nosuch does not exist"),
        (["audit", AFAR, "--seed", "-1"], "seed is -1"),
        (["bench", AFAR, "--isa", "sse9"], "no instruction set sse9"),
        (["ask", AFAR, "--isa", "sse9", "hi"], "no instruction set sse9"),
        (["generate", AFAR, "--prompt", "hi", "--isa", "sse9"], "no instruction set sse9"),
        (["generate", AFAR, "--prompt", "hi", "--backend", "fast"], "backend is 'fast'"),
        (["chat", AFAR, "--backend", "fast"], "backend is 'fast'"),
        (["serve", AFAR, "--port", "0", "--backend", "fast"], "backend is 'fast'"),
        (["serve", AFAR, "b=nosuch", "--port", "0"], "nosuch does not exist"),
        (["bench", "catalog:digits"], "catalog:digits is a dataset; a model is needed here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_found_before_a_download(command: Run, words: list[str], told: str) -> None:
    code, _, error = command(*words)
    assert code == 2 and told in error, error


def test_from_python_too(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"home": tmp_path / "home", "progress": Progress(quiet=True)}
    with pytest.raises(ConfigError, match="unknown task"):
        gulliver.pull(AFAR, task="nosuch", **shared)
    with pytest.raises(MissingExtra):
        gulliver.harness(AFAR, tasks=("arc_easy",), **shared)
    with pytest.raises(ConfigError, match="backend is 'fast'"):
        OpenOptions(backend="fast")
    with pytest.raises(ConfigError, match="seed is -1"):
        gulliver.speed(AFAR, seed=-1, **shared)


def test_what_is_right_reaches_the_download(command: Run) -> None:
    with pytest.raises(pytest.fail.Exception, match="downloaded"):
        command("speed", AFAR)


# ---- a file that must be refused ------------------------------------------------------------------------------------
COMMANDS = {
    **dict.fromkeys(("pull", "audit", "serve", "bench", "chat", "speed", "sample"), ()),
    "fit": ("--size", "1MB", "--out", "out"),
    "generate": ("--prompt", "hi"),
    "ask": ("hi",),
    "export": ("--format", "gguf"),
    "quantize": ("--calibration", "abcdef"),
}


@pytest.mark.parametrize("kind", ["a GGUF file", "a folder with a GGUF file", "a folder"])
def test_a_file_that_is_refused_costs_no_import(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if kind == "a folder":
        (folder / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
        (folder / "model.safetensors").write_bytes(bytes(16))
    else:
        (folder / "model.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 16)
    spec = str(folder / "model.gguf" if kind == "a GGUF file" else folder)
    words = {name: [name, spec, *more, "--home", str(tmp_path / "home")] for name, more in COMMANDS.items()}
    if kind == "a folder":
        del words["pull"]  # whose --task says what the folder is
    code = (
        "import json, sys; from gulliver.cli.main import main\n"
        f"for name, words in {words}.items():\n"
        "    code = main(words)\n"
        "    heavy = sorted({'torch', 'transformers', 'sqlalchemy', 'scipy'} & set(sys.modules))\n"
        "    print(json.dumps([name, code, heavy]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert [json.loads(line) for line in found.stdout.splitlines()] == [[name, 2, []] for name in words], found.stderr
    assert found.stderr.count("error: ") == len(words) and not (tmp_path / "home").exists()
