"""The commands `generate` and `chat` and `gulliver.generate`, on a tiny model with a chat template."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from language_samples import write_causal, write_encoder

import gulliver
from gulliver.cli import chat
from gulliver.core.errors import ConfigError
from gulliver.pipeline import steps
from gulliver.pipeline.generate import OpenModel, open_model
from gulliver.pipeline.spec import local_folder
from gulliver.runtime.decode import native_reason
from gulliver.runtime.sampling import Sampling

Run = Callable[..., tuple[int, str, str]]
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
GREEDY = ("--temperature", "0", "--max-tokens", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a chat template that never ends an answer."""
    path = write_causal(tmp_path_factory.mktemp("generate") / "tiny", max_position_embeddings=256)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (path / name).is_file():
            settings = json.loads((path / name).read_text())
            settings = {key: value for key, value in settings.items() if key not in ("eos_token_id", "eos_token")}
            (path / name).write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    with open_model(folder, store=_no_store) as opened:
        yield opened


def _no_store() -> Any:
    raise AssertionError("a local folder needs no store")


def _document(result: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def _typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


# ---- generate --------------------------------------------------------------------------------------------------------
def test_an_answer_and_what_it_took(command: Run, folder: Path, tmp_path: Path) -> None:
    found = _document(command("generate", folder, "--prompt", "the giant", *GREEDY, "--json"))
    assert (found["completion_tokens"], found["finish_reason"], len(found["tokens"])) == (8, "length", 8)
    assert found["prompt_tokens"] == len("u:the giant\na:") and found["chat_template"]
    assert found["timings"]["prompt_tokens_per_s"] > 0 and found["timings"]["decode_tokens_per_s"] > 0
    assert 0 < found["timings"]["first_token_seconds"] < 60 and 0 < found["load_seconds"] < 60
    assert found["why"] and (found["backend"] == "reference") == (native_reason() is not None)
    code, out, err = command("generate", folder, "--prompt", "the giant", *GREEDY)
    assert code == 0 and out.removesuffix("\n") == found["text"].removesuffix("\n")
    assert "answer tokens/s" in err and found["backend"] in err
    assert command("generate", folder, "--prompt", "the giant", *GREEDY, "--quiet")[2] == ""
    assert not (tmp_path / "home").exists(), "a local folder was brought into a store"


def test_raw_text_is_continued_without_the_template(command: Run, folder: Path, monkeypatch: Any) -> None:
    raw = _document(command("generate", folder, "--prompt", "the giant", "--raw", *GREEDY, "--json"))
    assert raw["prompt_tokens"] == len("the giant") and not raw["chat_template"]
    _typed(monkeypatch, "the giant")
    assert _document(command("generate", folder, "--prompt", "-", "--raw", *GREEDY, "--json"))["text"] == raw["text"]
    _typed(monkeypatch, "the giant")
    assert _document(command("generate", folder, "--raw", *GREEDY, "--json"))["tokens"] == raw["tokens"]


def test_a_model_without_a_template_says_so(command: Run, tmp_path: Path) -> None:
    plain = write_causal(tmp_path / "plain")
    code, _, err = command("generate", plain, "--prompt", "the giant", *GREEDY)
    assert code == 0 and "plain has no chat template" in err
    code, _, err = command("generate", plain, "--prompt", "the giant", "--system", "be short")
    assert code == 2 and "has no chat template" in err
    code, _, err = command("chat", plain)
    assert code == 2 and "use `gulliver generate`" in err


def test_many_prompts_of_a_file(command: Run, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"the giant"\n\n{"prompt": "a boat"}\n{"messages": [{"role": "user", "content": "a boat"}]}\n')
    code, out, err = command("generate", folder, "--prompts", file, *GREEDY)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(rows) == 3 and rows[1] == rows[2] and "3 answers, 24 tokens" in err
    found = _document(command("generate", folder, "--prompts", file, *GREEDY, "--json"))
    assert [row["text"] for row in found["answers"]] == [row["text"] for row in rows]
    alone = _document(command("generate", folder, "--prompt", "the giant", *GREEDY, "--json"))
    assert rows[0]["text"] == alone["text"]


def test_options_reach_the_engine(command: Run, folder: Path, tmp_path: Path) -> None:
    words = ("generate", folder, "--prompt", "the giant", "--max-tokens", "12", "--json")
    first = _document(command(*words, "--seed", "3", "--temperature", "2"))
    assert first["tokens"] == _document(command(*words, "--seed", "3", "--temperature", "2"))["tokens"]
    assert first["tokens"] != _document(command(*words, "--seed", "4", "--temperature", "2"))["tokens"]
    one = _document(command(*words, "--seed", "4", "--temperature", "2", "--top-k", "1"))
    assert one["tokens"] == _document(command(*words, "--temperature", "0"))["tokens"]
    schema = tmp_path / "schema.json"
    schema.write_text(
        '{"type": "object", "properties": {"on": {"const": true}}, "required": ["on"], "additionalProperties": false}'
    )
    assert json.loads(_document(command(*words, "--json-schema", schema))["text"]) == {"on": True}
    stopped = _document(command(*words, "--json-schema", schema, "--stop", "on"))
    assert stopped["text"] == '{"' and stopped["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--backend", "fast"], "backend is 'fast'"),
        (["--isa", "sse9"], "sse9"),
        (["--ram", "lots"], "--ram is 'lots'"),
        (["--prompts", "none.jsonl"], "exclude each other"),
        (["--json-schema", "none.json"], "--json-schema none.json cannot be read"),
        (["--system", "short", "--raw"], "taken raw"),
        (["--temprature", "1"], "did you mean '--temperature'"),
    ],
)
def test_wrong_options(command: Run, folder: Path, words: list[str], message: str) -> None:
    code, out, err = command("generate", folder, "--prompt", "the giant", *words)
    assert (code, out) == (2, "") and message in err and "Traceback" not in err


@pytest.mark.parametrize("line", ["{", "[]", '{"text": "a"}', "3", '{"prompt": "a", "seed": 1}'])
def test_wrong_lines_of_prompts(command: Run, folder: Path, tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"good"\n{line}\n')
    code, _, err = command("generate", folder, "--prompts", file)
    assert code == 2 and "line 2 of --prompts" in err


def test_models_that_write_no_text(command: Run, folder: Path, tmp_path: Path) -> None:
    code, _, err = command("generate", write_encoder(tmp_path / "encoder"), "--prompt", "a")
    assert code == 2 and "encoder" in err
    (tmp_path / "vision").mkdir()
    for name, text in (("config.json", '{"model_type": "gulliver_inception"}'), ("model.safetensors", "")):
        (tmp_path / "vision" / name).write_text(text)
    code, _, err = command("generate", tmp_path / "vision", "--prompt", "a")
    assert code == 2 and "family vision" in err
    code, _, err = command("generate", tmp_path / "nothing", "--prompt", "a")
    assert code == 2 and "nothing" in err


def test_names_that_need_a_store(command: Run, folder: Path, tmp_path: Path) -> None:
    made = _document(command("pull", folder, "--json"))
    found = _document(command("generate", made["id"][:8], "--prompt", "the giant", *GREEDY, "--json"))
    assert found["model"] == made["path"]
    assert local_folder(made["path"]) == (Path(made["path"]), "language")
    assert local_folder("catalog:smollm2") is None and local_folder(tmp_path) is None


def test_a_model_is_called_by_its_own_name(command: Run, folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    file = gulliver.export(gulliver.pull(str(folder), home=home), format="gguf", home=home).path / "model.gguf"
    words = ("--raw", "--prompt", "hi", *GREEDY)
    _, _, told = command("generate", file, *words)
    assert f"; {folder.name} by " in told
    made = [one for one in gulliver.list_artifacts(home=home) if one.step["name"] == "pull"]
    rows = {line[:12]: line for line in command("list")[1].splitlines()}
    named, unnamed = sorted(made, key=lambda one: not rows[one.id[:12]].endswith(f"  {folder.name}"))
    assert rows[named.id[:12]].endswith(f" {folder.name}") and rows[unnamed.id[:12]].endswith(" MB")
    _, _, told = command("generate", unnamed.id, *words)
    assert f"; {unnamed.id[:12]} by " in told and unnamed.id not in told


@pytest.mark.skipif(native_reason() is not None, reason=str(native_reason()))
def test_the_native_path_imports_neither_torch_nor_a_database(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from gulliver.cli.main import main\n"
        f"assert main(['generate', {str(folder)!r}, '--prompt', 'a', '--max-tokens', '4']) == 0\n"
        f"assert main(['chat', {str(folder)!r}, '--max-tokens', '4']) == 0\n"
        "heavy = {'torch', 'transformers', 'sqlalchemy', 'pydantic', 'scipy', 'fastapi'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], input="hello\n", capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_text_comes_before_the_answer_ends_and_a_reader_may_leave(folder: Path) -> None:
    words = [sys.executable, "-m", "gulliver", "generate", str(folder), "--prompt", "a", "--raw", "--quiet"]
    words += ["--max-tokens", "200", "--temperature", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0


# ---- the Python function ---------------------------------------------------------------------------------------------
def test_generate_from_python(folder: Path, model: OpenModel) -> None:
    text = gulliver.generate(folder, "the giant", max_tokens=8, temperature=0)
    pieces = gulliver.generate(model, "the giant", max_tokens=8, temperature=0, stream=True)
    assert not isinstance(pieces, str) and "".join(pieces) == text
    messages = [{"role": "user", "content": "the giant"}]
    assert gulliver.generate(model, messages, max_tokens=8, temperature=0) == text
    assert gulliver.generate(model, "the giant", max_tokens=8, temperature=0, raw=True) != text
    with pytest.raises(ConfigError, match="generate does not take 'temprature'"):
        gulliver.generate(model, "the giant", temprature=0)
    with pytest.raises(ConfigError, match="cannot be taken raw"):
        gulliver.generate(model, messages, raw=True)
    assert model.engine.stats()["requests_running"] == 0


# ---- chat ------------------------------------------------------------------------------------------------------------
def test_a_scripted_chat(command: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "the giant\na boat\n/new\nthe giant\n/system short\na boat\n/system\n/help\n\n"
    _typed(monkeypatch, script)
    code, out, err = command("chat", folder, *GREEDY)
    assert code == 0 and "/new" in err and err.count("a new conversation") == 3
    _typed(monkeypatch, script.split("/new")[0])
    messages = _document(command("chat", folder, *GREEDY, "--json"))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    answers = [message["content"] for message in messages[1::2]]
    assert out.startswith(f"{answers[0]}\n{answers[1]}\n{answers[0]}\n")  # the same again after /new


def test_a_chat_remembers_and_has_a_system_message(model: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, told, shown = _talk(model, system="be short")
    _typed(monkeypatch, "the giant\na boat\n")
    talk.run(shown.append)
    tokens = model.tokens(talk.messages[:-1])
    assert model.engine.text.decode(tokens).startswith("s:be short\nu:the giant\na:")
    assert "".join(shown) == "".join(message["content"] + "\n" for message in talk.messages[2::2])
    assert len(told) == 2 and "tokens/s" in told[0]


def _talk(model: OpenModel, **options: Any) -> tuple[chat.Chat, list[str], list[str]]:
    told: list[str] = []
    settings: dict[str, Any] = {"max_tokens": 8, "system": None, **options}
    return chat.Chat(model, Sampling(temperature=0), tell=told.append, **settings), told, []


def test_settings(model: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, told, shown = _talk(model)
    _typed(monkeypatch, "/set\n/set max_tokens 3\n/set temperature 0.5\n/set seed 7\n/set seed none\nthe giant\n")
    talk.run(shown.append)
    assert "temperature 0," in told[0] and "max_tokens 3, temperature 0.5" in told[2]
    assert "seed 7" in told[3] and "seed none" in told[4] and "+ 3 tokens (length)" in told[5]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temprature 1", "did you mean 'temperature'"),
        ("/set temperature hot", "temperature is 'hot'"),
        ("/set temperature -1", "temperature is -1"),
        ("/set top_k 1.5", "write a whole number"),
        ("/set max_tokens 0", "at least 1"),
        ("/set top_p true", "top_p is 'true'"),
        ("/nw", "did you mean '/new'"),
        ("word " * 60, "begin anew with /new"),
    ],
)
def test_what_is_wrong_does_not_end_the_chat(
    model: OpenModel, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    talk, told, shown = _talk(model)
    _typed(monkeypatch, f"{line}\nthe giant\n")
    talk.run(shown.append)
    assert message in told[0] and len(talk.messages) == 2


def test_an_interrupt_stops_the_answer_and_keeps_what_came(model: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, told, shown = _talk(model, max_tokens=100)

    def write(text: str) -> None:
        shown.append(text)
        if sum(map(len, shown)) > 3 and len(talk.messages) == 0:
            raise KeyboardInterrupt

    _typed(monkeypatch, "the giant\n/set max_tokens 4\na boat\n")
    talk.run(write)
    assert told[0] == "stopped" and "+ 4 tokens" in told[2]
    assert 0 < len(talk.messages[1]["content"]) < 100 and len(talk.messages) == 4
    assert model.engine.stats()["requests_running"] == 0


# ---- the commands ----------------------------------------------------------------------------------------------------
def test_no_command_is_called_like_a_step() -> None:
    from gulliver.cli.commands import COMMANDS

    names = [command.name for command in COMMANDS] + [row.name for row in steps.STEPS]
    assert len(names) == len(set(names)) and {"generate", "chat", "bench", "serve", "keys"} <= set(names)
