"""What a model writes, at its worst, under the page's real policy: nothing runs, nothing is lost, nothing is slow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import chat_browser
import pytest
from fake_openai import FakeServer

browser, running_server = chat_browser.browser, chat_browser.running_server

# Renders `text` at once and in pieces of seven characters, in the page; gives what a test may ask about it.
RENDER = """async (text) => {
  const { markdown, MarkdownStream } = await import("/markdown.js");
  const [whole, streamed] = [document.createElement("div"), document.createElement("div")];
  document.body.append(whole, streamed);
  whole.append(markdown(text));
  const stream = new MarkdownStream(streamed);
  for (let end = 7; end < text.length + 7; end += 7) stream.update(text.slice(0, end));
  const items = [...whole.querySelectorAll("*")];
  const found = {
    names: [...new Set(items.map((item) => item.localName))],
    attributes: [...new Set(items.flatMap((item) => item.getAttributeNames()))],
    links: items.filter((item) => item.localName === "a").map((item) => [item.href, item.rel, item.target]),
    text: whole.textContent,
    same: whole.innerHTML === streamed.innerHTML,
    hacked: window.hacked ?? null,
    refused: window.refused,
  };
  whole.remove();
  streamed.remove();
  return found;
}"""
ALLOWED = "a blockquote br button code del div em h3 h4 h5 h6 hr li ol p pre span strong table tbody td th thead tr ul"
ATTRIBUTES = {"aria-label", "class", "href", "rel", "role", "scope", "start", "tabindex", "target", "title", "type"}


@pytest.fixture(scope="module")
def scripts(browser: Any, running_server: FakeServer) -> Iterator[Any]:
    page = browser.new_page()
    page.goto(running_server.url)
    page.evaluate("""() => {
      window.refused = [];
      document.addEventListener("securitypolicyviolation", (event) => window.refused.push(event.violatedDirective));
    }""")
    yield page
    page.close()


def test_the_policy_is_the_servers_and_holds(browser: Any, running_server: FakeServer) -> None:
    """Else the other tests here would pass whatever the page did."""
    page = browser.new_page()
    page.goto(running_server.url)
    error = page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>'; } catch (error) { return error.name; } }"
    )
    assert error == "TypeError"
    page.close()


@pytest.mark.parametrize(
    "text",
    [
        "<script>window.hacked = 1</script>",
        "<ScRiPt src='https://evil.example/x.js'></sCrIpT>",
        "<div><p>a<svg><animate onbegin=window.hacked=1 attributeName=x></svg></p></div>",
        "<p><b><i><u>*x*<iframe srcdoc='<script>parent.hacked=1</script>'></iframe></u></i></b></p>",
        "<!-- <img src=x onerror=window.hacked=1> --><style>@import 'https://evil.example'</style>",
        "<math><mi xlink:href='javascript:window.hacked=1'>x</mi></math>",
        "[a](javascript:window.hacked=1) [b](JAVASCRIPT:window.hacked=1) [c](\tjavascript:window.hacked=1)",
        "[a](java\nscript:window.hacked=1) [b](&#x6A;avascript:window.hacked=1) [c](javascript&colon;hacked)",
        "[a](<javascript:window.hacked=1>) <javascript:window.hacked=1> [b](vbscript:x) [c](data:text/html,<b>)",
        "[a](//evil.example) [b](/relative) [c](#here) [d](file:///etc/passwd) [e](blob:https://evil.example/1)",
        '[a](https://ok.example/"onclick="window.hacked=1) [b](https://ok.example "x" onclick="window.hacked=1")',
        "![a](https://evil.example/x.png) ![b](data:image/svg+xml,<svg onload=window.hacked=1>) ![c](javascript:x)",
        "[![a](https://evil.example/x.png)](https://ok.example) [[a](https://ok.example)](javascript:window.hacked=1)",
        "[a]: javascript:window.hacked=1\n\n[a] [a][] [x][a]",
        "https://ok.example/<script>window.hacked=1</script> https://ok.example/\u202egnp.exe mailto:a@b.example",
        "```<script>window.hacked=1</script>\nx\n```",
        "```js\n<script>window.hacked = 1</script>\n</code></pre><img src=x onerror=window.hacked=1>",
        "| <img src=x onerror=window.hacked=1> | b |\n|:--|--:|\n| [x](javascript:window.hacked=1) | ![y](data:,x) |",
        "1. <b>\n   > <i>\n   > - <script>window.hacked=1</script>\n     ```\n     <script>",
        "&lt;script&gt;window.hacked=1&lt;/script&gt; &#60;script&#62; &amp;lt;script&amp;gt;",
        "\x00<script\x00>window.hacked=1</script> \ud800 \ufeff\u2028\u2029",
        "constructor __proto__ [constructor] [__proto__](https://ok.example) &constructor; &__proto__; &toString;",
    ],
)
def test_nothing_a_model_writes_is_more_than_text(scripts: Any, text: str) -> None:
    found = scripts.evaluate(RENDER, text)
    assert found["hacked"] is None and found["refused"] == [] and found["same"]
    assert set(found["names"]) <= set(ALLOWED.split()) and set(found["attributes"]) <= ATTRIBUTES
    for address, rel, target in found["links"]:
        assert address.startswith(("https://ok.example", "https://evil.example/", "mailto:")), address
        assert rel == "noopener noreferrer nofollow" and target == "_blank"


@pytest.mark.parametrize(
    "text",
    [
        "snake_case_name and other_one and __init__",
        "2*3 = 6, 2 ** 8, * and *",
        "a[0] = b[1][2]; see [1] and [x](/relative)",
        "costs $5, $PATH, $x$ and $$y$$",
        "if (a<b && c>d) x = a<<2; List<Map<String, T>>",
        "an **open run and `an open span and ~~open",
        "C:\\dir\\name and \\d+\\w",
        "- [ ] open\n- [x] done",
        "<b>bold?</b> & <br> &unknown; &",
    ],
)
def test_no_character_of_prose_is_lost(scripts: Any, text: str) -> None:
    """Marks that mark nothing are text: a name without its underscores is another name."""
    shown = text.replace("- [", "[").replace("\n", "").replace("__init__", "init")
    assert scripts.evaluate(RENDER, text)["text"] == shown


def test_a_fence_that_never_closes_keeps_all_that_follows_as_code(scripts: Any) -> None:
    body = "<script>window.hacked = 1</script>\n\n# no heading\n\n- no item\n| a |\n|---|\n[x](https://ok.example)"
    for fence in ("```", "~~~~", "``````"):
        found = scripts.evaluate(RENDER, f"{fence}html\n{body}\n{fence[:-1]}")
        assert found["text"] == f"htmlCopy{body}\n{fence[:-1]}" and found["links"] == [] and found["same"]
        assert set(found["names"]) == {"div", "span", "button", "pre", "code"}


@pytest.mark.parametrize(
    "text",
    [
        "> " * 20_000 + "end",
        ">" * 20_000 + "end",
        "1. " * 20_000 + "end",
        "> - " * 10_000 + "end",
        "".join("  " * depth + "- end\n" for depth in range(400)),
        "*" * 20_000 + "end" + "*" * 20_000,
        "*_" * 10_000 + "end" + "_*" * 10_000,
        "[" * 20_000 + "end" + "](https://ok.example)" * 2_000,
        "<div>" * 20_000 + "end",
    ],
    ids=["quotes", "tight", "lists", "both", "indents", "stars", "mixed", "brackets", "tags"],
)
def test_nesting_is_bounded(scripts: Any, text: str) -> None:
    """A page nested thousands deep would exhaust the stack of the browser's layout."""
    depth, shown = scripts.evaluate(
        """async (text) => {
          const { markdown } = await import("/markdown.js");
          const place = document.createElement("div");
          place.append(markdown(text));
          const walker = document.createTreeWalker(place);
          let deepest = 0;
          for (let node = walker.nextNode(); node; node = walker.nextNode()) {
            let depth = 0;
            for (let up = node; up !== place; up = up.parentNode) depth += 1;
            deepest = Math.max(deepest, depth);
          }
          return [deepest, place.textContent.includes("end")];
        }""",
        text,
    )
    assert depth <= 64 and shown


# Eight times the text may take 30 times as long on a busy machine, but not the 64 times of a quadratic scan.
@pytest.mark.parametrize("part", ["_a", "***a", "> ", "[", "[a](", "`a``", "<", "&", "http://", "![", "| a ", "x"])
def test_a_line_of_a_million_characters_takes_time_in_proportion(scripts: Any, part: str) -> None:
    short, long = scripts.evaluate(
        """async (part) => {
          const { markdown } = await import("/markdown.js");
          const seconds = (length) => {
            const text = part.repeat(length / part.length);
            const started = performance.now();
            markdown(text);
            return (performance.now() - started) / 1000;
          };
          seconds(1000);
          return [seconds(125_000), seconds(1_000_000)];
        }""",
        part,
    )
    assert long < 30 * max(short, 0.1), (short, long)
