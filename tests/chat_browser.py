"""Headless Chromium on the chat page, for its tests: fixtures, and what a test does often."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from fake_openai import FakeServer, example_about, fake_server
from needed import missing, needed_module

playwright = needed_module("playwright.sync_api", "pages are tested by playwright: pip install playwright")
CHROMIUM = shutil.which("chromium")
expect = playwright.expect
expect.set_options(timeout=20_000)  # milliseconds; a machine may be busy with other tests


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        missing("no chromium on the PATH: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def running_server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


@pytest.fixture
def server(running_server: FakeServer) -> Iterator[FakeServer]:
    running_server.reset()
    running_server.about = {name: example_about(name) for name in running_server.models}
    yield running_server
    running_server.release()


@pytest.fixture
def options() -> dict[str, Any]:
    """Options of the browser's context; a test gives others by parametrizing this fixture."""
    return {"viewport": {"width": 1100, "height": 700}}


@pytest.fixture
def page(browser: Any, server: FakeServer, options: dict[str, Any]) -> Iterator[Any]:
    """The open page. Afterwards: it asked no other host, ran into no script error, and broke no security policy."""
    context = browser.new_context(**options)
    page = context.new_page()
    hosts: set[str] = set()
    faults: list[str] = []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: faults.append(line.text) if line.type in ("error", "warning") else None)
    page.goto(server.url)
    yield page
    context.close()
    assert hosts == {urlsplit(server.url).netloc}
    assert [line for line in faults if "Failed to load resource" not in line] == []


def send(page: Any, text: str = "Hello") -> None:
    expect(page.locator("#model")).to_be_enabled()
    page.fill("#message", text)
    page.press("#message", "Enter")


def answered(page: Any, count: int) -> None:
    """Wait until there are `count` answers, all of them whole."""
    expect(page.locator(".answer:not(.running)")).to_have_count(count)


def last_answer(page: Any) -> Any:
    return page.locator(".answer").last


def messages(server: FakeServer) -> list[tuple[str, str]]:
    """(role, content) of the last request's messages."""
    return [(message["role"], message["content"]) for message in server.requests[-1]["messages"]]
