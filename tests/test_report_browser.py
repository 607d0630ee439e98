"""A report in a real browser: its pictures are drawn under its own content policy, and nothing else runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_browser import browser
from report_samples import fitted

from gulliver.report.gather import gather
from gulliver.report.html import page

__all__ = ["browser"]  # a fixture


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_are_drawn_and_nothing_else_runs(browser: Any, scheme: str, tmp_path: Path) -> None:
    store, model = fitted(tmp_path / "home")
    data = replace(gather(model, store), title="<img src=x onerror=\"document.title='run'\"><script>alert(1)</script>")
    (tmp_path / "report.html").write_text(page(data), encoding="utf-8")
    tab = browser.new_page(color_scheme=scheme)
    told: list[str] = []
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("dialog", lambda dialog: told.append(dialog.message))
    tab.goto((tmp_path / "report.html").as_uri())
    tab.wait_for_selector("#memory .main-svg")
    assert tab.locator("div.plot:has(.main-svg)").count() == 5
    assert "<img src=x" in tab.title() and told == []
    ink = tab.evaluate("getComputedStyle(document.querySelector('#memory .xtitle')).fill")
    assert ink == ("rgb(27, 31, 36)" if scheme == "light" else "rgb(231, 234, 238)")
    tab.close()
