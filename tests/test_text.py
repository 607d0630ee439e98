"""Text in and out against transformers: templates, special tokens, four kinds of decoders, and stop texts."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from engine_samples import write_text_folder
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.runtime.text import sandbox
from gulliver.runtime.text.chat_template import ChatTemplate
from gulliver.runtime.text.detokenizer import StopFinder
from gulliver.runtime.text.tokenizer import SHORT_CHARACTERS, Text

WORDS = "the giant measures a small boat naïve übung 数学 🦣🏝️ don't, and 3.14! \n\ttabs  two spaces ▁ <0x41>"

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
    {{- tool | tojson }}{{ '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {%- for call in message.tool_calls %}
{{ '<tool_call>' }}{"name": "{{ call.function.name }}",
 "arguments": {{ call.function.arguments | tojson }}}{{ '</tool_call>' }}
        {%- endfor %}
    {%- else %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

STRICT = """{{ bos_token }}{% set ns = namespace(turn=0) %}{% for message in messages %}
{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate user/assistant, not ' + message.role) }}
{% endif %}
{% if loop.index0 > 3 %}{% break %}{% endif %}
{% set ns.turn = ns.turn + 1 %}[{{ ns.turn }}] {{ message.content | trim }}
{{ eos_token if message.role == 'assistant' }}
{% endfor %}
Today {{ strftime_now('%Y') }} {{ {'b': 1, 'a': 'é<&'} | tojson(indent=2, sort_keys=true) }} {{ dict(x=1).x }}
{% if enable_thinking is defined and enable_thinking is false %}<quick>{% endif %}"""

TRAINING = """{% for message in messages %}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
{% else %}{{ message.role }}: {{ message.content }}
{% endif %}{% endfor %}{{ messages[0].reasoning_content or '' }}"""

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello <|im_end|> & <b>ü</b>"}],
    [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c\n"}],
    [{"role": "user", "content": "x", "name": None, "reasoning": "because"}],
    [{"role": "user", "content": f"{n}"} | ({"role": "assistant"} if n % 2 else {}) for n in range(8)],
    [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}],
        },
        {"role": "tool", "content": "rain"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def byte_level() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([WORDS], trainer)
    core.add_tokens(["two  spaces", "<tool>"])
    return core


def sentence_pieces(strip: bool) -> tokenizers.Tokenizer:
    """As Llama 2 has it (`strip`), or Gemma."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "▁the", "▁gi", "ant"]
    pieces += [*dict.fromkeys(character for character in "thegiansmurbo3.1" if character not in pieces)]
    core = tokenizers.Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if strip else []), normalizers.Replace(" ", "▁")]
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return core


def metaspace() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(
        models.Unigram([("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "thegiansmurbo3.1")], 0)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.add_special_tokens(["<s>", "</s>"])
    return core


def word_pieces() -> tokenizers.Tokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz.,!"
    pieces = ["[UNK]", "<s>", "</s>", *letters, *(f"##{letter}" for letter in letters)]
    core = tokenizers.Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=False)
    core.add_special_tokens(["<s>", "</s>"])
    return core


CORES = {
    "byte-level": byte_level,
    "llama": lambda: sentence_pieces(True),
    "gemma": lambda: sentence_pieces(False),
    "metaspace": metaspace,
    "word-pieces": word_pieces,
}


def write(folder: Path, core: tokenizers.Tokenizer, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module", params=CORES)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp(request.param), CORES[request.param]())


# ---- templates ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("template", [CHATML, STRICT, TRAINING], ids=["chatml", "strict", "training"])
@pytest.mark.parametrize("number", range(len(CHATS)))
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_chats_are_rendered_as_by_transformers(template: str, number: int, tools: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level())
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    text, tokenizer, chat = Text(folder), theirs(folder), CHATS[number]
    for prompt in (True, False):
        options = {"tools": tools, "add_generation_prompt": prompt, "enable_thinking": False}
        try:
            right = tokenizer.apply_chat_template(chat, tokenize=False, **options)
        except Exception as error:
            with pytest.raises(ConfigError) as caught:
                text.template.render(chat, **options)
            assert str(error).splitlines()[0] in str(caught.value)
            continue
        assert text.template.render(chat, **options) == right
        assert text.encode_chat(chat, **options) == tokenizer.apply_chat_template(chat, **options)["input_ids"]


def test_the_chats_and_templates_above_are_refused_and_rendered(tmp_path: Path) -> None:
    template = ChatTemplate({"default": STRICT}, {"bos_token": "<s>", "eos_token": "</s>"})
    with pytest.raises(ConfigError, match="roles must alternate user/assistant, not user"):
        template.render([*CHATS[0], *CHATS[0]])
    assert template.render(CHATS[1]).startswith("<s>")
    with pytest.raises(ConfigError, match="no messages"):
        template.render([])


def test_a_template_for_tools_beside_the_default_one(tmp_path: Path) -> None:
    rows = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    for place in ("settings", "files"):
        folder = write(tmp_path / place, byte_level(), **({"chat_template": rows} if place == "settings" else {}))
        if place == "files":
            (folder / "chat_template.jinja").write_text("plain")
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | length }} tools")
        text = Text(folder)
        for tools in (None, TOOLS):
            right = theirs(folder).apply_chat_template(CHATS[0], tools=tools, tokenize=False)
            assert text.template.render(CHATS[0], tools) == right
        assert text.shows_tools and text.has_chat_template
    plain = Text(write(tmp_path / "none", byte_level()))
    assert not plain.has_chat_template and not plain.shows_tools
    with pytest.raises(ConfigError, match="no chat template"):
        plain.template.render(CHATS[0])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.x }}",
        "{{ 'x' * 10**10 }}",
        "{{ 10**10 * [1] }}",
        "{{ 9**99999999 }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__init__=1) }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ range(10**9) | list }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
        "{{ 'x' + 1 }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_hostile_template_reaches_nothing(source: str) -> None:
    with pytest.raises(ConfigError):
        ChatTemplate({"default": source}, {}).render(CHATS[0])


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}"
        "{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}",
        "{{ 'a' | center(10**9) }}",
        "{{ '%1000000000d' % 1 }}",
    ],
    ids=["loops", "one comparison", "filter", "format"],
)
def test_a_template_that_takes_all_it_can_is_stopped_and_others_run(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "LIMIT_SECONDS", 0.5)
    template, ticks, ended = (
        ChatTemplate({"default": "{% if tools %}" + source + "{% endif %}fine"}, {}),
        [],
        threading.Event(),
    )
    assert template.render(CHATS[0]) == "fine"

    def tick() -> None:
        while not ended.wait(0.001):
            ticks.append(True)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(tick)
        with pytest.raises(ConfigError, match=r"stopped after|more than 512 MiB") as caught:
            template.render(CHATS[0], tools=TOOLS)
        ended.set()
    assert len(ticks) > 10 or "of memory" in str(caught.value)
    assert template.render(CHATS[0]) == "fine"


def test_a_long_conversation_is_rendered() -> None:
    chat = [{"role": role, "content": "so it goes " * 40} for _ in range(2000) for role in ("user", "assistant")]
    template = ChatTemplate({"default": CHATML}, {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render([{"role": "system", "content": "be brief"}, *chat]).count("so it goes") == 160_000


def test_a_template_that_cannot_be_read_is_named() -> None:
    for source in ("{% if %}", "{{ " + "9" * 5000 + " }}", "{{ " + "(" * 20_000 + " }}", " " * 2_000_001):
        with pytest.raises(ArtifactError, match="chat template"):
            ChatTemplate({"default": source}, {})
    with pytest.raises(ArtifactError, match="No filter named 'nosuch'"):
        ChatTemplate({"default": "{{ 1 | nosuch }}"}, {}).render(CHATS[0])


def test_objects_of_the_caller_are_not_shown_to_a_template() -> None:
    class Rich(str):
        secret = "no"

    template = ChatTemplate({"default": "{{ messages[0].content.secret }}|{{ messages[0].other }}"}, {})
    assert template.render([{"role": "user", "content": Rich("a"), "other": object()}]) == "|<object>"
    deep: Any = "a"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ConfigError, match="refuses these messages"):
        template.render([{"role": "user", "content": deep}])


# ---- tokens -------------------------------------------------------------------------------------------------------
def test_texts_are_encoded_as_by_transformers(folder: Path) -> None:
    text, tokenizer = Text(folder), theirs(folder)
    for sample in (WORDS, "", " ", "the giant", "<s>the</s> giant", "\ufffd", "a" * 3000):
        assert text.encode(sample) == tokenizer(sample)["input_ids"]
        assert text.encode(sample, special=False) == tokenizer(sample, add_special_tokens=False)["input_ids"]
    for sample in ("\ud800", "\ud800" + "a" * SHORT_CHARACTERS):
        with pytest.raises(ConfigError, match="surrogate"):
            text.encode(sample)
    long = WORDS * (SHORT_CHARACTERS // len(WORDS) + 1)
    assert text.encode(long) == tokenizer(long)["input_ids"]
    text.context = SHORT_CHARACTERS // max(1024 if text.tokenizer.normalizer else 1, *map(len, tokenizer.get_vocab()))
    with pytest.raises(ConfigError, match=f"characters do not fit the context of {text.context} tokens"):
        text.encode("a" * 2 * SHORT_CHARACTERS)


def test_a_text_that_is_too_long_is_not_tokenized_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, sizes = Text(folder), []
    encoded = text._encoded
    monkeypatch.setattr(text, "_encoded", lambda part, special: sizes.append(len(part)) or encoded(part, special))
    text.context = 8000
    with pytest.raises(ConfigError, match="do not fit the context of 8000 tokens"):
        text.encode("a b " * 300_000)
    assert sum(sizes) < 200_000
    text.context = 400_000
    assert len(text.encode("a b " * 50_000)) > 90_000


def test_a_long_text_holds_up_no_other_thread(folder: Path) -> None:
    text, ticks, ended = Text(folder), [], threading.Event()

    def tick() -> None:
        while not ended.wait(0.001):
            ticks.append(True)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(tick)
        text.encode(WORDS * 20_000)
        ended.set()
    assert len(ticks) > 3


@pytest.mark.parametrize("key", ["x", "9" * 5000, "-1"])
@pytest.mark.parametrize("row", [{}, {"content": 5}, {"content": ["a"]}, "", {"content": "\ud800"}])
def test_added_tokens_that_are_none(key: str, row: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level(), added_tokens_decoder={key: row, "320": row})
    with contextlib.suppress(ArtifactError):
        assert Text(folder).encode("the") == Text(write(tmp_path / "plain", byte_level())).encode("the")


@pytest.mark.parametrize("settings", [{"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}, {}])
def test_tokens_that_only_the_settings_name(settings: dict[str, Any], tmp_path: Path) -> None:
    added = {"320": {"content": "<extra>", "special": True}, "321": {"content": "word", "special": False}}
    pad = {"__type": "AddedToken", "content": "<pad>", "special": True}
    folder = write(tmp_path, byte_level(), added_tokens_decoder=added, pad_token=pad, **settings)
    text, tokenizer = Text(folder), theirs(folder)
    for sample in ("the <extra> word <pad> giant", "<s>x"):
        assert text.encode(sample) == tokenizer(sample)["input_ids"]
        assert text.decode(text.encode(sample)) == tokenizer.decode(text.encode(sample), skip_special_tokens=True)


def test_end_tokens_come_from_all_places(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level())
    assert Text(folder).end_tokens == {1}
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [8, 9]}')
    assert Text(folder).end_tokens == {1, 7, 8, 9}
    (folder / "config.json").write_text('{"eos_token_id": null}')
    assert Text(folder).end_tokens == {1, 8, 9}


def test_an_older_folder_without_tokenizer_json_is_converted(tmp_path: Path) -> None:
    core = json.loads(byte_level().to_str())
    tmp_path.joinpath("vocab.json").write_text(json.dumps(core["model"]["vocab"]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in core["model"]["merges"])]
    tmp_path.joinpath("merges.txt").write_text("\n".join(merges), encoding="utf-8")
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "</s>"}
    tmp_path.joinpath("tokenizer_config.json").write_text(json.dumps(settings))
    text = Text(tmp_path)
    assert text.encode(WORDS) == theirs(tmp_path)(WORDS)["input_ids"]
    assert text.decode(text.encode(WORDS)) == WORDS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": 3}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{" * 5000),
        ("chat_template.jinja", b"\xff\xfe"),
        ("generation_config.json", "nonsense"),
    ],
)
def test_damaged_files_are_named(name: str, content: Any, tmp_path: Path) -> None:
    folder = write_text_folder(tmp_path)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        Text(folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no usable tokenizer"):
        Text(tmp_path)


# ---- detokenizing -------------------------------------------------------------------------------------------------
def test_tokens_one_by_one_give_the_text_of_all(folder: Path) -> None:
    text, tokenizer = Text(folder), theirs(folder)
    for sample in (WORDS, "the giant", " the", "🦣"):
        tokens = tokenizer(sample, add_special_tokens=False)["input_ids"]
        for cut in {0, 1, len(tokens) // 2}:
            answer = text.detokenizer(tokens[:cut])
            said = "".join(answer.add(token) for token in tokens[cut:])
            before, whole = tokenizer.decode(tokens[:cut]), tokenizer.decode(tokens)
            if "\ufffd" not in before:
                assert said == whole[len(before) :]


def test_special_tokens_write_nothing_and_added_words_do(tmp_path: Path) -> None:
    text = Text(write(tmp_path, byte_level()))
    tokens = text.encode("<s>a<tool>b two  spaces</s>")
    answer = text.detokenizer()
    assert "".join(answer.add(token) for token in tokens) == "a<tool>b two  spaces"
    assert text.token_bytes(1) == b"</s>"
    assert text.token_bytes(99999) == b"" and answer.add(99999) == ""


@pytest.mark.parametrize("name", ["byte-level", "llama", "gemma"])
def test_the_bytes_of_tokens_make_up_the_text(name: str, tmp_path: Path) -> None:
    text = Text(write(tmp_path, CORES[name]()))
    tokens = text.encode(WORDS, special=False)
    joined = b"".join(text.token_bytes(token) for token in tokens).decode()
    assert joined.removeprefix(" ") == text.decode(tokens).removeprefix(" ")


def test_no_half_character_is_ever_shown_and_none_is_lost(tmp_path: Path) -> None:
    text = Text(write_text_folder(tmp_path))
    choose = random.Random(0)
    sample = "".join(choose.choice("aé数🦣") for _ in range(200))
    answer = text.detokenizer()
    shown = [answer.add(byte) for byte in sample.encode()]
    assert "".join(shown) == sample and set(shown) <= {"", *sample}
    answer = text.detokenizer()
    garbage = [choose.randrange(256) for _ in range(500)]
    said, whole = "".join(answer.add(byte) for byte in garbage), bytes(garbage).decode(errors="replace")
    assert whole.startswith(said) and len(whole) - len(said) <= 3


# ---- stop texts ---------------------------------------------------------------------------------------------------
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_stops_are_found_wherever_the_text_is_cut(whole: str, stops: list[str], data: Any) -> None:
    finder, shown, met, place = StopFinder(stops), "", False, 0
    while place < len(whole) and not met:
        size = data.draw(st.integers(1, 5))
        certain, met = finder.add(whole[place : place + size])
        shown, place = shown + certain, place + size
        assert not any(stop in shown for stop in stops)
    places = [whole.index(stop) for stop in stops if stop in whole]
    if not met:
        shown += finder.rest()
    seen = whole[:place]
    found = [seen.index(stop) for stop in stops if stop in seen]
    assert met == bool(places)
    assert shown == (seen[: min(found)] if found else whole)


def test_text_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = write_text_folder(tmp_path)
    code = (
        "import sys; from pathlib import Path; from gulliver.runtime.batching.engine import Engine; "
        f"from gulliver.runtime.text.tokenizer import Text; Text(Path({str(folder)!r})).encode('a'); "
        "print([name for name in ('torch', 'transformers', 'llguidance') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
