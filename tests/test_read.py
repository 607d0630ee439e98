"""The step `read`: parts that never overlap, whatever the files look like."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest
from language_samples import text

from gulliver.core.context import Context
from gulliver.core.errors import ConfigError, DataError
from gulliver.core.progress import Progress
from gulliver.core.records import EXAMPLES, Sources
from gulliver.core.store.artifact import hash_file, verify
from gulliver.data.options import ReadOptions
from gulliver.data.read import run
from gulliver.tasks import get_task

PASSAGE = "the giant measures every island and the queen counts the lanterns. " * 4


@pytest.fixture
def ctx(store, quiet):
    return Context(store=store, progress=quiet, work=store.work("0" * 64), step="read")


def rows_of(artifact):
    return pyarrow.parquet.read_table(artifact.file(EXAMPLES)).to_pylist()


def test_one_text_is_cut_in_two_and_nothing_is_lost(tmp_path, ctx):
    path = tmp_path / "text.txt"
    path.write_text(text(300, 1))
    made = run(ReadOptions(data=str(path)), {}, ctx)
    verify(made)
    train, held_out = rows_of(made)
    assert (train["split"], held_out["split"]) == ("train", "eval")
    assert train["text"] + held_out["text"] == text(300, 1)
    assert 0.08 < len(held_out["text"]) / len(text(300, 1)) <= 0.1
    sources = json.loads(made.file(Sources.file).read_text())
    assert sources["train"] == {"examples": 1, "files": {"text.txt": hash_file(path)}}
    assert (made.kind, made.task, made.step["name"]) == ("dataset", "language", "read")
    assert list(get_task("language").rows(made.path, "eval")) == [{name: held_out[name] for name in ("text", "source")}]


def test_the_same_text_elsewhere_is_the_same_artifact(tmp_path, ctx):
    ids = set()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(text(300, 1))
        ids.add(run(ReadOptions(data=str(tmp_path / name / "text.txt")), {}, ctx).id)
    assert len(ids) == 1


def test_eval_data_is_held_out_whole(tmp_path, ctx):
    (tmp_path / "a.txt").write_text(text(50, 1))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in ("x y", "z")))
    made = run(
        ReadOptions(data=str(tmp_path / "a.txt"), eval_data=str(tmp_path / "b.jsonl"), family={"text_column": "body"}),
        {},
        ctx,
    )
    assert [(row["split"], row["text"]) for row in rows_of(made)] == [
        ("train", text(50, 1)),
        ("eval", "x y"),
        ("eval", "z"),
    ]


def test_a_folder_and_parquet_are_read(tmp_path, ctx):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(text(100, 1))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [f"row {number}" for number in range(20)]}), folder / "b.parquet"
    )
    found = rows_of(run(ReadOptions(data=str(folder), family={"holdout": 0.25}), {}, ctx))
    assert {row["source"] for row in found} == {"a.txt", "b.parquet"}
    assert sum(row["source"] == "b.parquet" and row["split"] == "eval" for row in found) in (4, 5)


def test_overlapping_parts_are_refused(tmp_path, ctx):
    (tmp_path / "a.txt").write_text(f"{text(30, 1)}\n\n{PASSAGE}\n\n{text(30, 2)}")
    (tmp_path / "b.txt").write_text(f"something else\n\n{PASSAGE}\n")
    with pytest.raises(DataError, match="the giant measures every island"):
        run(ReadOptions(data=str(tmp_path / "a.txt"), eval_data=str(tmp_path / "b.txt")), {}, ctx)
    (tmp_path / "c.txt").write_text(f"{PASSAGE}\n\n{text(20, 1)}\n\n{PASSAGE}\n")
    with pytest.raises(DataError, match="the giant measures every island"):
        run(ReadOptions(data=str(tmp_path / "c.txt"), family={"holdout": 0.25}), {}, ctx)
    assert ctx.store.artifacts() == []


def lines_of(kind: str) -> str:
    """4,000 lines that recur, written so that no two copies need be equal byte by byte."""
    turn = ["Yes, please.", "What time does it leave?", "Thank you, that is all.", "No, another day!", "At 11 o'clock."]
    rows = [turn[number * 7 % 5] for number in range(4000)]
    if kind == "case":
        rows = [row.upper() if number % 3 else row for number, row in enumerate(rows)]
    if kind == "spaces":
        rows = [row.replace(" ", "  ") + " " * (number % 4) for number, row in enumerate(rows)]
    if kind == "width":
        rows = ["ＦＵＬＬ width and ordinary" if number % 2 else "full WIDTH and ordinary" for number in range(4000)]
    if kind == "chinese":
        return "".join(("你好。", "今天天气很好！", "我们走吧。")[number % 3] for number in range(4000))
    if kind == "one line":
        return "The same sentence again and again. " * 4000
    return {"crlf": "\r\n", "paragraphs": "\n\n"}.get(kind, "\n").join(rows)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("kind", ["lines", "crlf", "paragraphs", "case", "spaces", "width", "chinese", "one line"])
def test_lines_that_recur_are_no_held_out_part(tmp_path, ctx, kind, suffix):
    path, whole = tmp_path / f"a{suffix}", lines_of(kind)
    if suffix == ".txt":
        path.write_text(whole, newline="")
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": line}) for line in whole.splitlines() if line))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": whole.splitlines()}), path)
    with pytest.raises(DataError, match=r"100% of the eval part repeats short lines .*sort -u"):
        run(ReadOptions(data=str(path)), {}, ctx)
    assert ctx.store.artifacts() == []


def test_eval_data_of_the_same_lines_is_refused(tmp_path, ctx):
    (tmp_path / "a.txt").write_text(text(60, 1))
    (tmp_path / "b.txt").write_text("\n".join(sorted(text(60, 1).splitlines())))
    with pytest.raises(DataError, match="100% of the eval part"):
        run(ReadOptions(data=str(tmp_path / "a.txt"), eval_data=str(tmp_path / "b.txt")), {}, ctx)


def test_turns_that_recur_now_and_then_are_told_and_kept(tmp_path, store, capsys):
    rows = [row for line in text(3000, 1).splitlines() for row in (line, "Yes, please, at noon.")]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    ctx = Context(store=store, progress=Progress(), work=store.work("1" * 64), step="read")
    made = run(ReadOptions(data=str(tmp_path / "a.jsonl")), {}, ctx)
    assert 'of the eval part repeats short lines of the train part, such as "' in capsys.readouterr().err
    assert len(rows_of(made)) == len(rows)


@pytest.mark.parametrize(
    ("config", "error", "told"),
    [
        ({"data": "absent.txt"}, DataError, "does not exist"),
        ({"data": "catalog:shakespear"}, ConfigError, "shakespeare"),
        ({"data": "catalog:all-minilm-l6-v2"}, ConfigError, "is a model"),
        ({"data": "catalog:digits"}, ConfigError, "for vision"),
        ({"data": "absent.txt", "task": "langage"}, ConfigError, "language"),
    ],
)
def test_what_is_wrong_is_named(ctx, config, error, told):
    with pytest.raises(error, match=told):
        run(ReadOptions(**config), {}, ctx)


def test_a_text_too_short_to_hold_out_is_refused(tmp_path, ctx):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="no examples"):
        run(ReadOptions(data=str(tmp_path / "a.txt")), {}, ctx)


def test_another_family_reads_by_the_same_step(ctx):
    made = run(ReadOptions(data="catalog:digits", task="vision"), {}, ctx)
    found = rows_of(made)
    assert {row["split"] for row in found} == {"train", "eval"}
    assert set(found[0]) == {"image", "label", "source", "split"}
    both = run(ReadOptions(data="catalog:digits", task="vision"), {}, ctx)
    assert both.id == made.id


def test_an_option_of_another_family_is_refused(tmp_path, ctx):
    with pytest.raises(ConfigError, match="holdout"):
        run(ReadOptions(data="catalog:digits", task="vision", family={"holdout": 0.2}), {}, ctx)
