"""One self-contained HTML page about one artifact: the verdict first, then all that it rests on.

`page` fills page.html.j2 with the records that report/gather.py reads. Every value is escaped by the template. Nothing
here reads a network or the clock, so the same records give the same bytes.

plotly's Python package ships only the whole of plotly.js (version 4.1.1: 4.82 MB). Compressed and in base64 it takes
1.96 MB of the page, and every browser since 2023 can decompress it (DecompressionStream); in an older one the page
shows the numbers of each plot as tables, which are there in any case. A content security policy names the hashes of
the page's scripts, so that no other script can run and nothing can be loaded, whatever a model is called.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gulliver.core.evidence.evidence import METRICS
from gulliver.report import bits, plots, rows, training, verdict
from gulliver.report.gather import ReportData
from gulliver.report.picture import Picture
from gulliver.report.units import format_value, short_id

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDER = Path(__file__).parent


def page(data: ReportData) -> str:
    """The whole page, with plotly.js inside when there is a picture to draw."""
    from markupsafe import Markup

    drawn = pictures(data)
    return (
        environment(autoescape=True)
        .get_template("page.html.j2")
        .render(
            data=data,
            sentences=verdict.sentences(data),
            downloaded=verdict.downloaded(data),
            figures=verdict.key_figures(data),
            gated=[(None, data.fit.verdicts), *((other, other.verdicts) for other in data.others)],
            evidence=rows.evidence(data),
            pictures=drawn,
            machine=rows.machine(data.machine),
            machines=sorted({row.machine for row in data.evidence if row.machine}),
            commands=list(dict.fromkeys(row.command for row in data.evidence if row.command)),
            policy=content_policy(bool(drawn)),
            style=Markup(asset("style.css")),
            script=Markup(asset("page.js")),
            plotly=Markup(plotly_library()[0] if drawn else ""),
        )
    )


def pictures(data: ReportData) -> list[tuple[str, list[Picture]]]:
    """(title, pictures) of the sections that have something to draw, in the page's order."""
    tensors, trained = data.tensors, data.training
    sections = [
        ("Size and quality", [plots.size_quality(data)]),
        ("Bits per tensor", [bits.bits(tensors), bits.rows_bits(tensors)]),
        ("Predicted loss increase per block", [plots.loss_increase(data)]),
        ("Memory over time", [plots.memory(data)]),
        ("Training", [training.losses(trained), training.rate_test(trained)]),
        ("Norms by block", [training.gradient_norms(trained), training.weight_norms(trained)]),
    ]
    found = [(title, [picture for picture in own if picture is not None]) for title, own in sections]
    return [(title, own) for title, own in found if own]


@cache
def plotly_library() -> tuple[str, str]:
    """plotly.js as (base64 of its gzip, the same bytes on every call; its hash for a content security policy)."""
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs().encode()
    return base64.b64encode(gzip.compress(source, 6, mtime=0)).decode(), script_hash(source)


def script_hash(source: bytes) -> str:
    """The source expression that lets exactly this script run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source).digest()).decode()}'"


def content_policy(drawn: bool) -> str:
    """The content security policy of a page: our scripts if pictures are `drawn`, inline styles, and nothing else."""
    scripts = f"{script_hash(asset('page.js').encode())} {plotly_library()[1]}" if drawn else "'none'"
    return f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data: blob:"


@cache
def asset(name: str) -> str:
    """The text of a file of this folder: style.css, or page.js, which draws the pictures."""
    return (FOLDER / name).read_text(encoding="utf-8")


def environment(**options: Any) -> Environment:
    """What the templates of this folder have in common; `options` say how their values are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    blocks = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    found = Environment(loader=FileSystemLoader(FOLDER), undefined=StrictUndefined, **blocks, **options)
    found.policies["json.dumps_kwargs"] = {"sort_keys": True, "allow_nan": False}
    found.filters |= {"rule": verdict.gate_rule, "reason": verdict.gate_reason, "metric_name": verdict.metric_name}
    found.filters |= {"measured": rows.measured_texts, "value": format_value, "short": short_id, "repr": repr}
    found.globals |= {"metrics": METRICS, "interval_bar": rows.interval_bar}
    return found
