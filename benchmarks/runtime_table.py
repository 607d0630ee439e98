"""The tables of the READMEs about speed, drawn from results/runtime.json alone.

`runtime` sets each measured claim beside its floor and its target; the verdict is that of the unfavourable end of its
interval, so luck in one run is no pass. `engines` lists what every engine reached. A row that was measured while others
used the machine carries a mark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from compress_common import write_atomic
from compress_table import PAGES, ROOT, load, markdown, replaced
from runtime_common import EIGHT, FITTED, LARGE, OPENVINO, llama_name, noisy

PEER_TYPES = ("Q4_0", "Q4_K_M", "Q8_0", "BF16")

WORDS: Mapping[str, Mapping[str, str]] = {
    "en": {
        "what": "measured, 2 threads", "result": "result [interval]", "floor": "floor", "target": "target",
        "verdict": "reached", "met": "target", "half": "floor", "missed": "below the floor", "noisy": " (noisy)",
        "decode": "decode, fitted ÷ {peer}", "equal": "decode, 8-bit g64 ÷ {peer}",
        "share": "decode beyond L3: share of the bandwidth limit",
        "prefill": "prefill of {prompt} tokens, fitted ÷ {peer}",
        "peak": "prefill: share of the {unit} peak", "streams": "{streams} streams over HTTP, total, fitted ÷ {peer}",
        "cold": "cold process, imports to first token (20-token prompt, files in the page cache)",
        "memory": "its peak memory beyond the weight file", "overhead": "HTTP over the bare engine, one stream",
        "errors": "{clients} clients for {seconds} s, {killed} broken off: errors but 429",
        "growth": "the same: resident memory, growth a minute", "late": "the same: time to first token, p99 ÷ median",
        "two": "two models of a process at once ÷ one after the other, {kind}",
        "lookup": "prompt lookup on ÷ off, “{kind}”", "reuse": "prefix reuse on ÷ off, “{kind}”",
        "native": "perplexity, native ÷ float32 of the same weights, as prompts",
        "single": "the same, token by token", "engine": "engine", "size": "file MB", "tokens": "tok/s",
    },
    "zh": {
        "what": "测量项（2 线程）", "result": "结果 [区间]", "floor": "下限", "target": "目标",
        "verdict": "达到", "met": "目标", "half": "下限", "missed": "低于下限", "noisy": "（有干扰）",
        "decode": "解码，拟合模型 ÷ {peer}", "equal": "解码，8 位 g64 ÷ {peer}",
        "share": "超出 L3 的解码：带宽极限的占比", "prefill": "{prompt} 词元预填充，拟合模型 ÷ {peer}",
        "peak": "预填充：{unit} 峰值的占比", "streams": "HTTP 上 {streams} 路并发总速率，拟合模型 ÷ {peer}",
        "cold": "冷进程，导入之后到首个词元（20 词元提示，文件在页缓存中）",
        "memory": "其超出权重文件的内存峰值", "overhead": "HTTP 相对裸引擎的开销，单路",
        "errors": "{clients} 个客户端持续 {seconds} 秒，{killed} 中途断开：429 以外的错误",
        "growth": "同上：常驻内存每分钟增长", "late": "同上：首词元时间 p99 ÷ 中位数",
        "two": "同一进程两个模型同时运行 ÷ 先后运行，{kind}",
        "lookup": "提示查找 开 ÷ 关，“{kind}”", "reuse": "前缀复用 开 ÷ 关，“{kind}”",
        "native": "困惑度，原生 ÷ 同权重 float32，按提示送入",
        "single": "同上，逐词元", "engine": "引擎", "size": "文件 MB", "tokens": "词元/秒",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """One line: a value with its interval, and the floor and target it is held to (None: it only informs)."""

    part: str
    told: str
    value: float
    low: float
    high: float
    floor: float | None = None
    target: float | None = None
    higher: bool = True
    show: Callable[[float], str] = "{:.2f} ×".format

    @property
    def verdict(self) -> str | None:
        """met, half or missed, by the unfavourable end of the interval; None without a floor or a target."""
        worst = self.low if self.higher else self.high
        for name, limit in (("met", self.target), ("half", self.floor)):
            if limit is not None and (worst >= limit if self.higher else worst <= limit):
                return name
        return None if self.floor is None and self.target is None else "missed"


# ---- claims ---------------------------------------------------------------------------------------------------------
def claims(results: Mapping, words: Mapping[str, str]) -> list[Claim]:
    """All claims that the results have rows for, in the order of the table."""
    rows = {row["part"]: row for row in results["rows"]}
    return [claim for part, found in _CLAIMS.items() if part in rows for claim in found(rows[part], words)]


def _ratio(part: str, told: str, ratio: Mapping, floor: float | None = None, target: float | None = None) -> Claim:
    return Claim(part, told, ratio["median"], ratio["low"], ratio["high"], floor, target)


def _decode(row: Mapping, words: Mapping[str, str]) -> Iterator[Claim]:
    ours, eight = row["ratios"][FITTED], row["ratios"][EIGHT]
    for kind, floor, target in (("Q4_K_M", 1.6, 2.4), ("Q4_0", 1.25, 1.8)):
        peer = llama_name(kind)
        yield _ratio("decode", words["decode"].format(peer=peer), ours[peer], floor, target)
    yield _ratio("decode", words["equal"].format(peer=llama_name("Q8_0")), eight[llama_name("Q8_0")], 1.2, 1.5)


def _bandwidth(row: Mapping, words: Mapping[str, str]) -> Iterator[Claim]:
    share = row["share"][LARGE]
    yield Claim("bandwidth", words["share"], share["median"], share["low"], share["high"], 0.75, 0.9, show=_percent)


def _prefill(row: Mapping, words: Mapping[str, str]) -> Iterator[Claim]:
    for peer, floor, target in ((llama_name("Q4_0"), 2.0, 3.0), (OPENVINO, 1.0, 1.5)):
        told = words["prefill"].format(prompt=row["prompt"], peer=peer)
        yield _ratio("prefill", told, row["ratios"][FITTED][peer], floor, target)
    for name, share in row["share_of_peak"].items():
        told = words["peak"].format(unit=name.split("_")[0])
        yield Claim("prefill", told, share["median"], share["low"], share["high"], None, 0.55, show=_percent)


def _streams(row: Mapping, words: Mapping[str, str]) -> Iterator[Claim]:
    for peer, ratio in row["ratios"][FITTED].items():
        told = words["streams"].format(streams=row["streams"], peer=peer)
        yield _ratio("streams", told, ratio, 1.5, 2.5)


def _overhead(row: Mapping, words: Mapping[str, str]) -> Iterator[Claim]:
    cost, told = row["overhead"], words["overhead"]
    yield Claim("overhead", told, cost["median"], cost["low"], cost["high"], 0.05, 0.02, False, _percent)


def _cold(row: Mapping, words: Mapping[str, str]) -> Iterator[Claim]:
    time, beyond = row["seconds"], row["beyond_file_bytes"] / 1e6
    yield Claim("cold", words["cold"], time["median"], time["low"], time["high"], 0.5, 0.2, False, "{:.3f} s".format)
    yield Claim("cold", words["memory"], beyond, beyond, beyond, 300, 120, False, "{:.0f} MB".format)


def _load(row: Mapping, words: Mapping[str, str]) -> Iterator[Claim]:
    given = {"clients": row["clients"], "seconds": f"{row['seconds']:.0f}", "killed": f"{row['killed_share']:.0%}"}
    errors, late = row["errors"], row["p99_over_median"]
    yield Claim("load", words["errors"].format(**given), errors, errors, errors, 0, 0, False, "{:.0f}".format)
    growth = row["rss_bytes_per_minute"]
    steep, error = growth["value"] / 1e6, growth["standard_error"] / 1e6
    yield Claim("load", words["growth"], steep, steep - 2 * error, steep + 2 * error, 2, 1, False, "{:.2f} MB".format)
    yield Claim("load", words["late"], late, late, late, None, 5, False)


def _workloads(part: str, limit: float | None = None) -> Callable[[Mapping, Mapping[str, str]], Iterator[Claim]]:
    def found(row: Mapping, words: Mapping[str, str]) -> Iterator[Claim]:
        for kind, one in row["workloads"].items():
            yield _ratio(part, words[part].format(kind=kind), one["ratio"], limit, limit)

    return found


def _quality(row: Mapping, words: Mapping[str, str]) -> Iterator[Claim]:
    for path, ratio in row["ratio"].items():
        yield Claim("quality", words[path], ratio["value"], ratio["low"], ratio["high"], show="{:.4f} ×".format)


_CLAIMS = {
    "decode": _decode,
    "bandwidth": _bandwidth,
    "prefill": _prefill,
    "streams": _streams,
    "overhead": _overhead,
    "cold": _cold,
    "load": _load,
    "two": _workloads("two", 0.95),
    "lookup": _workloads("lookup"),
    "reuse": _workloads("reuse"),
    "quality": _quality,
}


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


# ---- tables ---------------------------------------------------------------------------------------------------------
def runtime_table(results: Mapping, language: str = "en") -> str:
    """Every claim with its floor, its target and its verdict."""
    words, body = WORDS[language], []
    marks = {row["part"]: words["noisy"] if noisy(row) else "" for row in results["rows"]}
    for claim in claims(results, words):
        interval = "" if claim.low == claim.high else f" [{claim.show(claim.low)}, {claim.show(claim.high)}]"
        limits = ["" if limit is None else claim.show(limit) for limit in (claim.floor, claim.target)]
        verdict = "" if claim.verdict is None else words[claim.verdict]
        body.append([claim.told, f"**{claim.show(claim.value)}**{interval}{marks[claim.part]}", *limits, verdict])
    return markdown([words[name] for name in ("what", "result", "floor", "target", "verdict")], body, right=(2, 3))


def engines_table(results: Mapping, language: str = "en") -> str:
    """Tokens per second of every engine: decode, prefill, streams; medians."""
    words, parts = WORDS[language], ("decode", "prefill", "streams")
    rows = {row["part"]: row for row in results["rows"] if row["part"] in parts}
    sizes = rows.get("decode", {}).get("size_bytes", {})
    known = {name for row in rows.values() for name in row["engines"]}
    names = [FITTED, EIGHT, *map(llama_name, PEER_TYPES), OPENVINO]
    body = []
    for name in [*(one for one in names if one in known), *sorted(known - set(names))]:
        speeds = [rows.get(part, {}).get("engines", {}).get(name) for part in parts]
        shown = ["" if speed is None else f"{speed['median']:.0f}" for speed in speeds]
        body.append([name, f"{sizes[name] / 1e6:.0f}" if name in sizes else "", *shown])
    head = [words["engine"], words["size"], *(f"{part}, {words['tokens']}" for part in parts)]
    return markdown(head, body, right=(1, 2, 3, 4))


def draw_all(results_path: Path, root: Path = ROOT) -> list[Path]:
    """Write the tables into the pages that have markers for them; returns the pages that changed."""
    if not results_path.exists():
        raise SystemExit(f"{results_path} does not exist; measure something first, e.g. the part `decode`")
    results, written = load(results_path), []
    for page, language in PAGES.items():
        path = root / page
        text = before = path.read_text(encoding="utf-8") if path.exists() else ""
        for name, table in (("runtime", runtime_table), ("engines", engines_table)):
            text = replaced(text, name, table(results, language))
        if text != before:
            write_atomic(path, text)
            written.append(path)
    return written
