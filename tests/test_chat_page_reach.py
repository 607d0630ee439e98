"""The chat page for every reader and against every text: keyboard, phone, contrast, hostile text, markdown, numbers."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import chat_browser
import pytest
from chat_browser import answered, expect, last_answer, send
from fake_openai import CONSOLE, FakeServer, Reply, example_about

from gulliver.report.html import FOLDER as REPORT
from gulliver.report.units import format_measured, format_value

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
browser, running_server, server = chat_browser.browser, chat_browser.running_server, chat_browser.server
options, page = chat_browser.options, chat_browser.page


def test_everything_is_done_with_the_keyboard(page: Any, server: FakeServer) -> None:
    expect(page.locator("#facts")).to_contain_text("MB")
    expect(page.locator("#message")).to_be_focused()
    reached = []
    for _ in range(9):  # back to the start of the page, and every control is on the way
        page.keyboard.press("Shift+Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.innerText"))
    assert reached[0].startswith("Show a Python") and reached[4:8] == ["conversation", "settings", "about", "model"]
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    page.keyboard.press("Enter")
    expect(page.locator(".question .text")).to_have_text("a\nb")
    expect(page.locator("#message")).to_have_value("")
    answered(page, 1)
    page.keyboard.press("ArrowUp")
    expect(page.locator("#message")).to_have_value("a\nb")
    page.keyboard.press("Escape")
    expect(page.locator("#message")).to_have_value("")
    names = []
    for _ in range(6):
        page.keyboard.press("Shift+Tab")
        names.append(page.evaluate("document.activeElement.innerText.trim()"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert names[:3] == ["Retry", "Copy", "Edit"] and names[4:] == ["New chat", "Settings"], names


def test_an_input_method_keeps_its_enter(page: Any, server: FakeServer) -> None:
    expect(page.locator("#model")).to_be_enabled()
    page.fill("#message", "日本")
    page.evaluate(
        "document.getElementById('message').dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
    )
    assert page.locator(".question").count() == 0


@pytest.mark.parametrize("options", [PHONE, {**PHONE, "viewport": {"width": 320, "height": 560}}], ids=["390", "320"])
def test_on_a_phone_nothing_is_too_wide_or_too_small(page: Any, server: FakeServer) -> None:
    def check() -> None:
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        wide = "(area) => area.scrollWidth - area.clientWidth"
        assert page.locator("#conversation").evaluate(wide) <= 0
        for dialog in page.locator("dialog[open]").all():
            assert dialog.evaluate(wide) <= 0
        small = page.evaluate(
            """() => [...document.querySelectorAll("button, select, input, textarea, summary")]
              .filter((item) => item.checkVisibility() && item.getClientRects().length)
              .map((item) => [item.id || item.textContent, item.getBoundingClientRect()])
              .filter(([, box]) => box.width < 44 || box.height < (box.width > 200 ? 40 : 44)).map(([name]) => name)"""
        )
        assert small == []

    expect(page.locator("#facts")).to_contain_text("MB")
    check()
    wide = "x" * 300
    table = f"| a | b | c |\n|-|-|-|\n| {'long words ' * 9} | 2 | 3 |"
    server.replies.append(Reply([f"# {wide}\n\n`{wide}` {wide}\n\n```py\n{wide}\n```\n\n{table}"]))
    send(page, f"https://example.org/{wide}")
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    expect(page.locator("#message")).not_to_be_focused()  # the keyboard would cover the answer
    check()
    page.get_by_role("button", name="Settings").tap()
    check()
    page.get_by_role("button", name="Close settings").tap()
    page.get_by_role("button", name="Evidence").tap()
    expect(page.get_by_role("dialog")).to_contain_text("perplexity")
    check()
    page.get_by_role("tab", name="Model card").tap()
    check()


HOSTILE = """
<script>window.hacked = 1</script><img src=x onerror="window.hacked=1"><iframe src="https://evil.example"></iframe>

![x](https://evil.example/x.png) [a](javascript:window.hacked=1) [b](data:text/html,<script>hacked=1</script>)
[c](JaVaScRiPt:alert(1)) [d]( javascript:alert(1)) [e](java\tscript:alert(1)) [f](&#106;avascript:alert(1))
<javascript:alert(1)> [g](https://ok.example/" onmouseover="window.hacked=1) [h](/relative) <a href="x">i</a>
[j](https://ok.example/fine "title")

```html" onload="window.hacked=1
</code></pre><script>window.hacked = 1</script>
```

| <script>window.hacked=1</script> | b |
| --- | --- |
| <svg onload=window.hacked=1> | &lt;script&gt; |
"""


def test_what_a_model_writes_stays_text(page: Any, server: FakeServer) -> None:
    name = "<img src=x onerror=window.hacked=1>"
    server.models = [name]
    server.about = {name: {**example_about(name), "card": HOSTILE, "why": name}}
    server.replies.extend([Reply([HOSTILE]), Reply(status=400, message=HOSTILE)])
    page.reload()
    send(page, HOSTILE)
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    expect(last_answer(page).locator(".text")).to_contain_text("<script>window.hacked = 1</script>")
    send(page, HOSTILE)
    expect(page.get_by_role("alert")).to_contain_text("<script>")
    page.get_by_role("button", name="Evidence").click()
    page.get_by_role("tab", name="Model card").click()
    expect(page.locator("#card-panel")).to_contain_text("<iframe")
    page.keyboard.press("Escape")
    page.reload()
    answered(page, 1)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#turns :is(script, img, iframe), #about-dialog :is(script, img, iframe)").count() == 0
    links = page.evaluate("[...document.querySelectorAll('#turns a')].map((link) => link.href)")
    assert links and all(link.startswith("https://") for link in links), links
    assert page.evaluate("[...document.querySelectorAll('#turns a')].every((link) => link.rel.includes('noopener'))")
    attributes = page.evaluate("[...document.querySelectorAll('#turns *')].flatMap((item) => item.getAttributeNames())")
    assert not [attribute for attribute in attributes if attribute.startswith("on")]


@pytest.fixture(scope="module")
def scripts(browser: Any, running_server: FakeServer) -> Iterator[Any]:
    """A page for tests of its modules alone; nobody types into it."""
    page = browser.new_page()
    page.goto(running_server.url)
    yield page
    page.close()


MARKDOWN = """Some *text* with **bold**, `code`, ***both***, ~~gone~~, snake_case_name and 2 * 3 * 4.
A second line. <https://example.org/a_b> and https://example.org/x(y).

# One
### Three ###

- a
- b
  - c
    ```py
    def f():
        return 1
    ```

  still b
10. ten
11. eleven

> quoted
> - item

| left | right |
|:-----|------:|
| a\\|b | `c` |

---
Last paragraph
with | a bar
"""


def test_markdown(scripts: Any) -> None:
    html = scripts.evaluate(
        """async (text) => {
          const { markdown } = await import("/markdown.js");
          const place = document.createElement("div");
          place.append(markdown(text));
          for (const bar of place.querySelectorAll(".code-bar")) bar.remove();
          for (const item of place.querySelectorAll("*")) {
            for (const name of item.getAttributeNames()) if (!/^(href|start)$/.test(name)) item.removeAttribute(name);
          }
          return place.innerHTML;
        }""",
        MARKDOWN,
    )
    assert html == (
        "<p>Some <em>text</em> with <strong>bold</strong>, <code>code</code>, <strong><em>both</em></strong>, "
        "<del>gone</del>, snake_case_name and 2 * 3 * 4.<br>A second line. "
        '<a href="https://example.org/a_b">https://example.org/a_b</a> and '
        '<a href="https://example.org/x(y)">https://example.org/x(y)</a>.</p>'
        "<h3>One</h3><h5>Three</h5>"
        "<ul><li>a</li><li>b<ul><li>c<div><pre><code>def f():\n    return 1</code></pre></div></li></ul>"
        "<p>still b</p></li></ul>"
        '<ol start="10"><li>ten</li><li>eleven</li></ol>'
        "<blockquote><p>quoted</p><ul><li>item</li></ul></blockquote>"
        "<div><table><thead><tr><th>left</th><th>right</th></tr></thead>"
        "<tbody><tr><td>a|b</td><td><code>c</code></td></tr></tbody></table></div>"
        "<hr><p>Last paragraph<br>with | a bar</p>"
    )


def test_a_stream_ends_as_the_whole_text_would(scripts: Any) -> None:
    """Random markdown in random pieces: the same page as at once, and no element that is not in the list."""
    parts = ["a", "b c", " ", "\n", "\n\n", "- ", "1. ", "  ", "    ", "```", "~~~", "*", "**", "_", "`", "|", "|-|-|"]
    parts += [*("# ", "> ", "---", "<b>", "&lt;", "\\", "\t", "\na|b\n", "|-|-", "https://e.org", "[x](https://e.org)")]
    parts += ["| a | b |\n|---|---|\n"]
    chance = random.Random(5)
    texts = ["".join(chance.choices(parts, k=chance.randint(1, 40))) for _ in range(1200)]
    cuts = [[*sorted(chance.sample(range(len(text)), min(len(text), 12))), len(text)] for text in texts]
    result = scripts.evaluate(
        """async ([texts, cuts]) => {
          const { markdown, MarkdownStream } = await import("/markdown.js");
          const names = new Set();
          const wrong = [];
          texts.forEach((text, index) => {
            const [streamed, whole] = [document.createElement("div"), document.createElement("div")];
            const stream = new MarkdownStream(streamed);
            for (const cut of cuts[index]) stream.update(text.slice(0, cut));
            whole.append(markdown(text));
            for (const item of whole.querySelectorAll("*")) names.add(item.localName);
            if (streamed.innerHTML !== whole.innerHTML) wrong.push([text, streamed.innerHTML, whole.innerHTML]);
          });
          return [wrong.slice(0, 2), [...names]];
        }""",
        [texts, cuts],
    )
    allowed = (
        "a blockquote br button code del div em h3 h4 h5 h6 hr li ol p pre span strong table tbody td th thead tr ul"
    )
    assert result[0] == []
    assert set(result[1]) <= set(allowed.split()) and len(result[1]) > 20


def test_streaming_touches_only_the_last_block_and_no_text_is_slow(scripts: Any) -> None:
    same, seconds = scripts.evaluate(
        """async (parts) => {
          const { MarkdownStream, markdown } = await import("/markdown.js");
          const place = document.createElement("div");
          const stream = new MarkdownStream(place);
          let text = "First.\\n\\n```py\\n";
          stream.update(text);
          const [first, code] = [place.children[0], place.children[1]];
          for (let line = 0; line < 2000; line += 1) stream.update((text += `line ${line}\\n`));
          const same = place.children[0] === first && place.children[1] === code && /line 1999$/.test(code.textContent);
          const started = performance.now();
          for (const part of parts) markdown(part.repeat(20000));
          return [same, (performance.now() - started) / 1000];
        }""",
        [
            "*a ",
            "**a*",
            "_a",
            "[",
            "[a](",
            "`a``",
            "> ",
            "- ",
            "| ",
            "\\",
            "&",
            "~~",
            "http://",
            "#",
            "x\n",
            "a|b\n-|-\n",
        ],
    )
    assert same
    assert seconds < 20  # about 1 where nothing else runs; a scan of the rest for every mark would take far longer


def test_numbers_read_as_in_the_reports(scripts: Any) -> None:
    units = ["bytes", "fraction", "ppl", "ratio", "count", "tokens/s", "nat"]
    chance = random.Random(1)
    samples = [
        (chance.choice([-1, 1]) * 10 ** chance.uniform(-7, 12), 10 ** chance.uniform(-9, 3), unit)
        for unit in units * 12
    ]
    samples += [
        (float(value), 0.0, unit) for value in (0, 1, 24, 1000, 999_999, 1_000_000, 71_950_336) for unit in units
    ]
    triples = [(value, value - width / 3, value + width, unit) for value, width, unit in samples]
    shown = scripts.evaluate(
        """async (triples) => {
          const { formatMeasured, formatValue } = await import("/units.js");
          return triples.map((triple) => [...formatMeasured(...triple), formatValue(triple[0], triple[3])]);
        }""",
        triples,
    )
    for triple, texts in zip(triples, shown, strict=True):
        assert texts == [*format_measured(*triple), format_value(triple[0], triple[3])], triple


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb, as WCAG 2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def colours(style: str) -> list[dict[str, str]]:
    """The colour variables of the light and of the dark theme."""
    found = [dict(re.findall(r"--([\w-]+):(#\w+)", block)) for block in re.findall(r":root\{(.*?)\}", style, re.DOTALL)]
    return [found[0], {**found[0], **found[1]}]


@pytest.mark.parametrize("dark", [0, 1], ids=["light", "dark"])
def test_contrast_and_the_colours_of_the_reports(dark: int) -> None:
    theme = colours((CONSOLE / "style.css").read_text())[dark]
    report = colours((REPORT / "style.css").read_text())[dark]
    assert {name: theme[name] for name in theme.keys() & report.keys()} == {
        name: report[name] for name in theme.keys() & report.keys()
    }
    text = [
        ("ink", "paper"),
        ("ink", "panel"),
        ("ink", "faint"),
        ("soft", "paper"),
        ("soft", "panel"),
        ("soft", "faint"),
    ]
    text += [
        ("blue", "paper"),
        ("blue", "faint"),
        ("on-blue", "blue"),
        ("red", "paper"),
        ("red", "refuse"),
        ("ink", "refuse"),
    ]
    for least, pairs in ((4.5, text), (3.0, [("edge", "panel"), ("edge", "paper"), ("blue", "panel")])):
        for front, back in pairs:
            high, low = sorted((luminance(theme[front]), luminance(theme[back])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= least, (front, back)


@pytest.mark.parametrize("options", [{"reduced_motion": "reduce"}, {"reduced_motion": "no-preference"}])
def test_nothing_moves_for_a_reader_who_asked_for_that(page: Any, server: FakeServer, options: dict[str, Any]) -> None:
    server.replies.append(Reply(["Text"], hold=True))
    send(page)
    expect(last_answer(page).locator(".text")).to_have_text("Text")
    page.get_by_role("button", name="Settings").click()
    moving = page.evaluate("document.getAnimations().length")
    assert (moving == 0) == (options["reduced_motion"] == "reduce")
