"""The tables of the READMEs and the plot, drawn from results/compress.json and results/peers.json alone.

A table stands between `<!-- table: NAME -->` and `<!-- end table -->`. What is compared with what: our sizes are all
weight files; the peers' sizes are their tensors alone (`tensor_bytes`) where the file holds a tokenizer too, which
favours them. Beside each of our models stands the best that the peers have at equal or more bytes, which is the next
point of their frontier, and the smallest peer that is at least as good.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress_common import write_atomic
from compress_plot import plot

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "en", "README.zh-CN.md": "zh"}
PLOT = "docs/size-quality.svg"
PLAIN_TYPES = ("Q4_0", "Q4_K_M", "Q8_0")
"""Peers that everyone knows, in the table even where others are better."""
BROKEN = 2.0
"""Peers beyond this perplexity ratio say nothing and are left out."""
SAME_PARENT = 0.005
"""How far our perplexity of the parent may lie from the one in peers.json; bfloat16 sums differ with the threads."""
TEXT, OTHER_TEXT = "wikitext-2.test", "tinyshakespeare"

WORDS: Mapping[str, Mapping[str, str]] = {
    "en": {
        "file": "model", "size": "MB of weights", "ratio": "perplexity ratio", "evidence": "evidence [95 %]",
        "next": "best peer at equal or more bytes", "need": "smallest peer as good", "none": "none measured",
        "what": "measured", "result": "result", "time": "time", "ram": "peak memory",
        "fit": "`fit`, {size} at effort {effort}", "shift": "loss on Shakespeare ÷ loss on WikiText: {value}",
        "memory": "calibrate + quantize {parameters} B parameters ({parent} GB) under `--max-ram-bytes {ram}`",
        "bytes": "{size} MB written", "resume": "{model}: killed {kills} times ({amid} amid work), run again",
        "same": "identical content ids", "other": "DIFFERENT content ids",
        "encoder": "sentence encoder at {bits} bits a weight, effort {effort}",
        "cosine": "cosine to the parent {value}",
        "quickstart": "`make quickstart` in a new clone", "install": "{seconds} of it to install",
        "infeasible": "infeasible", "minutes": "{value} min", "seconds": "{value} s",
        "part": " (resumed run: at least)",
    },
    "zh": {
        "file": "模型", "size": "权重大小（MB）", "ratio": "困惑度比", "evidence": "证据 [95 %]",
        "next": "同等或更多字节下最好的同类", "need": "达到同等质量的最小同类", "none": "未测得",
        "what": "测量项", "result": "结果", "time": "时间", "ram": "内存峰值",
        "fit": "`fit`，{size}，effort {effort}", "shift": "莎士比亚上的损失 ÷ WikiText 上的损失：{value}",
        "memory": "在 `--max-ram-bytes {ram}` 下校准并量化 {parameters} B 参数（{parent} GB）",
        "bytes": "写出 {size} MB", "resume": "{model}：被强杀 {kills} 次（其中 {amid} 次正在计算）后重新运行",
        "same": "内容 id 完全一致", "other": "内容 id 不一致",
        "encoder": "句子编码器，每权重 {bits} 位，effort {effort}", "cosine": "与原模型的余弦 {value}",
        "quickstart": "新克隆中的 `make quickstart`", "install": "其中安装 {seconds}",
        "infeasible": "不可行", "minutes": "{value} 分钟", "seconds": "{value} 秒", "part": "（续跑：至少）",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One model: name, bytes of weights, perplexity ratio to the parent; `evidence` (value, low, high) if ours."""

    name: str
    size_bytes: int
    ratio: float
    ours: bool = False
    evidence: tuple[float, float, float] | None = None

    @property
    def megabytes(self) -> str:
        return f"{self.size_bytes / 1e6:.1f}"


# ---- points ---------------------------------------------------------------------------------------------------------
def our_points(results: Mapping, peers: Mapping) -> list[Point]:
    """Our fitted models by size; those of another parent than the peers' are left out, with a word on stderr."""
    found = []
    for row in rows(results, "fit"):
        if row["outcome"] != "fitted":
            continue
        parent = results["parents"][row["parent"]][TEXT]["perplexity"]
        if abs(parent / peers["parent"]["perplexity"] - 1) > SAME_PARENT:
            print(
                f"fit {row['key']}: its parent has perplexity {parent}, the peers' another; left out", file=sys.stderr
            )
            continue
        known = row["evidence"]["perplexity_ratio"]
        interval = (known["value"], known["low"], known["high"])
        ratio = row["independent"][TEXT]["ratio"]
        found.append(Point(f"gulliver {row['effort']}", row["size_bytes"], ratio, True, interval))
    return sorted(found, key=lambda point: point.size_bytes)


def peer_points(peers: Mapping) -> list[Point]:
    """All peers that work, by size."""
    found = [
        Point(f"{row['engine']} {row['type']}", row.get("tensor_bytes", row["size_bytes"]), row["ratio_to_parent"])
        for row in peers["peers"]
        if row["ratio_to_parent"] < BROKEN
    ]
    return sorted(found, key=lambda point: (point.size_bytes, point.ratio))


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those for which no other is at most as large and at least as good; by size."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda one: (one.size_bytes, one.ratio)):
        if not kept or point.ratio < kept[-1].ratio:
            kept.append(point)
    return kept


def next_peer(point: Point, peers: Sequence[Point]) -> Point | None:
    """The next point of the peers' frontier at equal or more bytes."""
    return next((peer for peer in frontier(peers) if peer.size_bytes >= point.size_bytes), None)


def as_good(point: Point, peers: Sequence[Point]) -> Point | None:
    """The smallest peer whose ratio is at most ours."""
    return next((peer for peer in frontier(peers) if peer.ratio <= point.ratio), None)


def rows(results: Mapping, part: str) -> list[dict]:
    return [row for row in results["rows"] if row["part"] == part]


# ---- tables ---------------------------------------------------------------------------------------------------------
def tables(results: Mapping, peers: Mapping, language: str = "en") -> dict[str, str]:
    """{"compress": Markdown, "targets": Markdown}."""
    words = WORDS[language]
    return {"compress": compress_table(results, peers, words), "targets": targets_table(results, words)}


def compress_table(results: Mapping, peers: Mapping, words: Mapping[str, str]) -> str:
    """Our models and the peers by size."""
    ours, theirs = our_points(results, peers), peer_points(peers)
    best = frontier(theirs)
    shown = [point for point in theirs if point in best or point.name.split(" ", 1)[1] in PLAIN_TYPES
             or not point.name.startswith("llama.cpp")]  # fmt: skip
    body = []
    for point in sorted([*ours, *shown], key=lambda one: (one.size_bytes, one.ratio)):
        if not point.ours:
            body.append([point.name, point.megabytes, f"{point.ratio:.4f}", "", "", ""])
            continue
        value, low, high = point.evidence or (point.ratio,) * 3
        beside, equal = next_peer(point, theirs), as_good(point, theirs)
        body.append(
            [
                f"**{point.name}**",
                f"**{point.megabytes}**",
                f"**{point.ratio:.4f}**",
                f"{value:.4f} [{low:.4f}, {high:.4f}]",
                _peer(beside, words),
                _peer(equal, words, point),
            ]
        )
    head = [words[name] for name in ("file", "size", "ratio", "evidence", "next", "need")]
    return markdown(head, body, right=(1, 2))


def _peer(peer: Point | None, words: Mapping[str, str], smaller: Point | None = None) -> str:
    """Name, size, ratio; or how much larger than `smaller` it is."""
    if peer is None:
        return words["none"]
    name = peer.name.removeprefix("llama.cpp ")
    if smaller is None:
        return f"{name}: {peer.megabytes} MB, {peer.ratio:.4f}"
    return f"{name}: {peer.megabytes} MB ({peer.size_bytes / smaller.size_bytes - 1:+.0%})"


def targets_table(results: Mapping, words: Mapping[str, str]) -> str:
    """Times, memory, resume, encoder and quick start."""
    body = [line for part in _LINES for row in rows(results, part) for line in [_LINES[part](row, words)]]
    return markdown([words[name] for name in ("what", "result", "time", "ram")], body)


def _fit_line(row: Mapping, words: Mapping[str, str]) -> list[str]:
    what = words["fit"].format(size=row["size"], effort=row["effort"])
    ratio = row.get("domain_ratio")
    result = words["infeasible"] if row["outcome"] != "fitted" else ""
    result = words["shift"].format(value=f"{ratio:.2f}") if ratio is not None else result
    return [what, result, *_cost(row, words)]


def _memory_line(row: Mapping, words: Mapping[str, str]) -> list[str]:
    size = {"parameters": f"{row['parameters'] / 1e9:.2f}", "parent": f"{row['parent_bytes'] / 1e9:.2f}"}
    what = words["memory"].format(ram=row["ram"], **size)
    return [what, words["bytes"].format(size=f"{row['size_bytes'] / 1e6:.0f}"), *_cost(row, words)]


def _resume_line(row: Mapping, words: Mapping[str, str]) -> list[str]:
    what = words["resume"].format(model=row["model"], kills=row["kills"], amid=row["kills_amid_work"])
    return [what, words["same" if row["identical"] else "other"], "", ""]


def _encoder_line(row: Mapping, words: Mapping[str, str]) -> list[str]:
    what = words["encoder"].format(bits=row["bits"], effort=row["effort"])
    if row["outcome"] != "fitted":
        return [what, words["infeasible"], *_cost(row, words)]
    cosine = row["evidence"]["cosine_similarity"]
    told = f"{cosine['value']:.5f} [{cosine['low']:.5f}, {cosine['high']:.5f}]"
    return [what, words["cosine"].format(value=told), *_cost(row, words)]


def _quickstart_line(row: Mapping, words: Mapping[str, str]) -> list[str]:
    told = words["install"].format(seconds=_time(row["install_seconds"], words))
    return [words["quickstart"], told, _time(row["seconds"], words), ""]


_LINES = {
    "fit": _fit_line,
    "memory": _memory_line,
    "resume": _resume_line,
    "encoder": _encoder_line,
    "quickstart": _quickstart_line,
}


def _cost(row: Mapping, words: Mapping[str, str]) -> list[str]:
    """Time and peak memory; of a run that was broken off and went on, only a lower bound is known."""
    bound = "" if row["from_scratch"] else words["part"]
    return [_time(row["seconds"], words) + bound, f"{row['peak_rss_bytes'] / 1e9:.2f} GB{bound}"]


def _time(seconds: float, words: Mapping[str, str]) -> str:
    if seconds < 120:
        return words["seconds"].format(value=f"{seconds:.0f}")
    return words["minutes"].format(value=f"{seconds / 60:.1f}")


def markdown(head: Sequence[str], body: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A Markdown table; columns in `right` are aligned to the right."""
    rule = ["---:" if column in right else "---" for column in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))


# ---- pages ----------------------------------------------------------------------------------------------------------
def between(text: str, name: str) -> str | None:
    """What stands between the markers of a table, or None."""
    found = re.search(_markers(name), text, re.DOTALL)
    return found[2].strip() if found else None


def replaced(text: str, name: str, table: str) -> str:
    """The page with this table between its markers; a page without them stays as it is."""
    return re.sub(_markers(name), lambda found: f"{found[1]}\n{table}\n{found[3]}", text, flags=re.DOTALL)


def _markers(name: str) -> str:
    return rf"(<!-- table: {re.escape(name)} -->)(.*?)(<!-- end table -->)"


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def picture(results: Mapping, peers: Mapping) -> str:
    """The plot as SVG."""
    theirs = peer_points(peers)
    return plot(our_points(results, peers), theirs, frontier(theirs))


def draw_all(results_path: Path, peers_path: Path, root: Path = ROOT) -> list[Path]:
    """Write the tables into the pages that have markers, and the plot; returns what was written."""
    if not results_path.exists():
        raise SystemExit(f"{results_path} does not exist; measure something first, e.g. the part `fit`")
    results, peers, written = load(results_path), load(peers_path), []
    for page, language in PAGES.items():
        path = root / page
        if not path.exists():
            continue
        text = before = path.read_text(encoding="utf-8")
        for name, table in tables(results, peers, language).items():
            text = replaced(text, name, table)
        if text != before:
            write_atomic(path, text)
            written.append(path)
    write_atomic(root / PLOT, picture(results, peers))
    return [*written, root / PLOT]
