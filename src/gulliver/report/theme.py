"""The one style sheet and the one script of a page, and plotly.js, embedded so that a page needs no other host.

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

CSS = """
:root{color-scheme:light dark;--paper:#fbfbf9;--panel:#fff;--ink:#1b1f24;--soft:#57606a;--line:#d7dbe0;--faint:#eceef1;
--blue:#1f5fa8;--orange:#a84b00;--green:#17693a;--red:#a8231b;--violet:#6a3fa0;--teal:#0b6a75;--pass:#e3f3e8;
--refuse:#fbe6e4;--warn:#fbf0d9;--plain:#e9edf2}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--panel:#1b1f25;--ink:#e7eaee;--soft:#a5afbb;--line:#3a424c;
--faint:#262c34;--blue:#7fb4f2;--orange:#f2a263;--green:#70cf97;--red:#ff9087;--violet:#c3a2f2;--teal:#6fcbd6;
--pass:#16301f;--refuse:#3a1c1a;--warn:#362b14;--plain:#242b34}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,"Segoe UI",Roboto,sans-serif;
overflow-wrap:anywhere}
main,header,footer{max-width:68rem;margin:0 auto;padding:0 1.25rem}
.help{display:block;font-weight:400}header{padding-top:1.5rem}h1{font-size:1.35rem;line-height:1.25;margin:0}
h2{font-size:1.15rem;margin:2.5rem 0 .5rem}
h3{font-size:1rem;margin:1.5rem 0 .25rem}p{margin:.4rem 0}a{color:var(--blue)}
.soft,caption,dt,footer{color:var(--soft)}.soft,footer{font-size:.9rem}footer{padding:2rem 1.25rem 3rem}
code,pre{font:.85rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--faint);padding:.75rem 1rem;border-radius:.4rem;overflow-x:auto;white-space:pre-wrap}
.verdict{border-radius:.6rem;padding:1.1rem 1.25rem;margin:1rem 0;border-left:.5rem solid var(--soft);
background:var(--plain)}
.verdict>strong{display:block;font-size:2.4rem;line-height:1.1;letter-spacing:.02em;margin-bottom:.35rem}
.verdict.pass{background:var(--pass);border-color:var(--green)}.verdict.pass>strong,.pass-text{color:var(--green)}
.verdict.refused{background:var(--refuse);border-color:var(--red)}.verdict.refused>strong,.fail-text{color:var(--red)}
.verdict.infeasible{background:var(--warn);border-color:var(--orange)}.verdict.infeasible>strong,.none-text{color:var(--orange)}
.verdict p{font-size:1.05rem;max-width:60rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;margin:1rem 0}
.figures div{background:var(--panel);border:1px solid var(--line);border-radius:.5rem;padding:.6rem .8rem}
.figures dt{font-size:.85rem}.figures dd{margin:0}.figures .big{font-size:1.4rem;font-weight:650;line-height:1.3;
overflow-wrap:normal}.unit{font-size:.95rem;font-weight:600}
table{border-collapse:collapse;width:100%;font-size:.93rem}
caption{text-align:left;padding:.2rem 0 .5rem;font-size:.9rem}
th,td{text-align:left;vertical-align:top;overflow-wrap:break-word;
padding:.45rem .75rem .45rem 0;border-top:1px solid var(--line)}
thead th{border-top:0;font-size:.85rem;color:var(--soft);font-weight:600}tbody th{font-weight:600}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}td.number,th.number{padding-right:1rem}
.scroll{overflow-x:auto}.scroll table{width:auto;min-width:min(100%,34rem)}
.scroll td,.scroll th{white-space:nowrap}
.interval{display:block;position:relative;height:.9rem;width:9rem;max-width:100%;margin-top:.2rem}
.interval::before{content:"";position:absolute;inset:calc(50% - .5px) 0 auto 0;height:1px;background:var(--line)}
.interval i{position:absolute;top:20%;height:60%;background:var(--blue);opacity:.45;border-radius:2px;min-width:3px}
.interval b{position:absolute;top:0;height:100%;width:2px;margin-left:-1px;background:var(--ink)}
.interval u{position:absolute;top:0;height:100%;width:0;margin-left:-1px;border-left:2px dashed var(--red)}
figure{margin:.75rem 0 1.25rem}figcaption{color:var(--soft);font-size:.9rem;margin-bottom:.25rem}
.plot{width:100%;overflow:hidden}.no-plots .plot{display:none}
details{margin:.4rem 0}summary{cursor:pointer;color:var(--blue)}
ol.lineage{list-style:none;padding:0;margin:0}ol.lineage li{border-left:3px solid var(--line);margin-left:.35rem;
padding:.1rem 0 .9rem 1rem;position:relative}ol.lineage li::before{content:"";position:absolute;left:-.5rem;top:.5rem;
width:.8rem;height:.8rem;border-radius:50%;background:var(--paper);border:3px solid var(--soft)}
ol.lineage li.here::before{background:var(--blue);border-color:var(--blue)}
ol.lineage li:last-child{border-color:transparent}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--blue);outline-offset:2px}
@media (max-width:40rem){
main,header,footer{padding-left:1rem;padding-right:1rem}.verdict>strong{font-size:2rem}
.figures{grid-template-columns:1fr 1fr;gap:.5rem}
.stack thead{position:absolute;clip-path:inset(50%);width:1px;height:1px;overflow:hidden}
.stack,.stack tbody,.stack caption{display:block}.stack tr{display:grid;grid-template-columns:5fr 8fr 2fr;
gap:.15rem .75rem;padding:.7rem 0;border-top:1px solid var(--line)}
.stack th,.stack td{display:block;border:0;padding:0;
text-align:left}.stack tbody th,.stack .wide{grid-column:1/-1}.stack td[data-label]::before{content:attr(data-label);
display:block;font-size:.8rem;color:var(--soft)}.stack td.number{white-space:normal}.stack td:empty{display:none}
.pair tr{grid-template-columns:2fr 3fr}
.stack td:nth-child(n+5){grid-column:1/-1}.figures .big{font-size:1.25rem}}
@media print{details>*{display:revert}.plot{break-inside:avoid}}
"""

SCRIPT = """
(async () => {
  const root = document.documentElement;
  const holders = [...document.querySelectorAll("div.plot")];
  const packed = document.getElementById("plotly");
  if (!holders.length) return;
  try {
    if (!window.Plotly) {
      const bytes = Uint8Array.from(atob(packed.textContent.trim()), (letter) => letter.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      const library = document.createElement("script");
      library.textContent = await new Response(stream).text();
      document.head.append(library);
    }
    if (!window.Plotly) throw new Error("plotly.js did not start");
  } catch (error) {
    root.classList.add("no-plots");
    document.querySelectorAll("figure details").forEach((numbers) => { numbers.open = true; });
    return;
  }
  const paint = (value, style) => {
    if (typeof value === "string") {
      const found = /^var\\((--[a-z]+)\\)$/.exec(value);
      return found ? style.getPropertyValue(found[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => paint(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, paint(item, style)]));
    }
    return value;
  };
  const draw = () => {
    const style = getComputedStyle(root);
    for (const holder of holders) {
      const figure = paint(JSON.parse(holder.nextElementSibling.textContent), style);
      window.Plotly.react(holder, figure.data, figure.layout, {
        responsive: true, displaylogo: false, displayModeBar: false, showTips: false, scrollZoom: false });
    }
  };
  draw();
  const watch = new ResizeObserver((entries) => entries.forEach((entry) => window.Plotly.Plots.resize(entry.target)));
  holders.forEach((holder) => watch.observe(holder));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
"""


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
    scripts = f"{script_hash(SCRIPT.encode())} {plotly_library()[1]}" if drawn else "'none'"
    return f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data: blob:"
