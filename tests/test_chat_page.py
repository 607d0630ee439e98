"""The chat page: asking, stopping, settings, cards, keys, errors; tests/fake_openai.py answers what a test wrote."""

from __future__ import annotations

import re
from typing import Any

import chat_browser
import pytest
from chat_browser import answered, expect, last_answer, messages, send
from fake_openai import FakeServer, Reply, example_about
from http_samples import FakeEngine, serving

browser, running_server, server = chat_browser.browser, chat_browser.running_server, chat_browser.server
options, page = chat_browser.options, chat_browser.page


def test_an_answer_appears_as_it_streams(page: Any, server: FakeServer) -> None:
    server.replies.append(Reply(["The sky ", "is **blue**"], hold=True, delay_seconds=0.15))
    send(page, "Why?")
    answer = last_answer(page)
    expect(answer.locator(".text")).to_have_text("The sky is blue")
    expect(answer.locator(".numbers")).to_contain_text("2 tokens")
    expect(answer).to_have_attribute("aria-busy", "true")
    expect(page.locator("#spoken")).to_be_empty()  # nothing is read out token by token
    server.release()
    expect(answer.locator(".numbers")).to_have_text(re.compile(r"^[\d.]+.tokens/s · 4.tokens · first token after \d"))
    expect(answer.locator("strong")).to_have_text("blue")
    expect(page.locator("#spoken")).to_have_text("small-72MB answered: The sky is blue")
    expect(page.locator("#message")).to_be_focused()
    request = server.requests[-1]
    assert request["model"] == "small-72MB" and request["stream"] is True
    assert request["stream_options"] == {"include_usage": True}
    assert messages(server) == [("user", "Why?")]
    send(page, "And?")
    answered(page, 2)
    assert messages(server) == [("user", "Why?"), ("assistant", "The sky is **blue**"), ("user", "And?")]


def test_what_a_model_thinks_stands_apart_from_its_answer(page: Any, server: FakeServer) -> None:
    server.replies.append(Reply(["<think>\n", "Is it *blue*?", "\n</think>\n\n", "It is."]))
    send(page)
    answered(page, 1)
    expect(last_answer(page).locator(".text")).to_have_text("It is.")
    expect(last_answer(page).locator(".thoughts")).to_be_hidden()
    last_answer(page).locator("summary").click()
    expect(last_answer(page).locator(".thoughts")).to_have_text("Is it blue?")
    expect(page.locator("#spoken")).to_have_text("small-72MB answered: It is.")


def test_stop_keeps_the_text_and_closes_the_connection_then_retry(page: Any, server: FakeServer) -> None:
    server.replies.append(Reply(["Once upon"], hold=True))
    send(page, "A story")
    expect(last_answer(page).locator(".text")).to_have_text("Once upon")
    page.keyboard.press("Escape")
    expect(last_answer(page).locator(".numbers")).to_contain_text("about 1 token")
    expect(last_answer(page).locator(".numbers")).to_contain_text("stopped by you")
    assert server.cancelled.wait(5)
    server.replies.append(Reply(["A new one."]))
    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".answer .text")).to_have_text(["A new one."])
    assert messages(server) == [("user", "A story")]


def test_the_stop_button_and_a_double_click_on_send(page: Any, server: FakeServer) -> None:
    server.replies.append(Reply(["Here"], hold=True))
    expect(page.locator("#model")).to_be_enabled()
    page.fill("#message", "Hi")
    page.dblclick("#send")
    expect(last_answer(page).locator(".text")).to_have_text("Here")
    expect(last_answer(page)).to_have_class(re.compile("running"))
    page.get_by_role("button", name="Stop").click()
    expect(last_answer(page).locator(".numbers")).to_contain_text("stopped by you")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_the_last_message_is_edited_and_sent_again(page: Any, server: FakeServer) -> None:
    send(page, "one")
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    send(page, "twoo")
    answered(page, 2)
    expect(page.get_by_role("button", name="Edit")).to_have_count(1)  # of the last message alone
    page.get_by_role("button", name="Edit").click()
    expect(page.locator("#message")).to_have_value("twoo")
    page.fill("#message", "two")
    page.press("#message", "Enter")
    expect(page.locator(".question .text")).to_have_text(["one", "two"])
    answered(page, 2)
    assert messages(server) == [("user", "one"), ("assistant", "Hello there."), ("user", "two")]
    expect(page.locator("#editing")).to_be_hidden()


def test_another_model_is_asked_and_remembered(page: Any, server: FakeServer) -> None:
    expect(page.locator("#facts")).to_contain_text("71.95 MB")
    page.select_option("#model", "large-145MB")
    send(page)
    expect(last_answer(page).locator(".who")).to_have_text("large-145MB")
    answered(page, 1)
    assert server.requests[-1]["model"] == "large-145MB"
    page.reload()
    expect(page.locator("#model")).to_have_value("large-145MB")


def test_a_model_that_makes_embeddings_is_not_offered(page: Any, server: FakeServer) -> None:
    server.about["large-145MB"]["can"] = ["embed", "predict"]
    page.reload()
    expect(page.locator("#model option")).to_have_text(["small-72MB"])
    server.about["small-72MB"]["can"] = ["embed", "predict"]
    page.reload()
    expect(page.locator("#notice")).to_contain_text("no model that chats")


def test_settings_arrive_in_the_request_and_survive_a_reload(page: Any, server: FakeServer) -> None:
    wanted = {
        "temperature": 0.9, "max_tokens": 64, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1,
        "seed": 7,
    }  # fmt: skip
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    for name, value in wanted.items():
        page.fill(f"#option-{name}", str(value))
    page.keyboard.press("Escape")
    send(page)
    expect(page.get_by_role("button", name="Settings, 8 in use")).to_be_visible()
    expect(last_answer(page).locator(".numbers")).to_contain_text("6 tokens")
    assert {name: server.requests[-1][name] for name in wanted} == wanted
    assert messages(server) == [("system", "Be brief."), ("user", "Hello")]
    page.reload()
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#option-top_k")).to_have_value("40")
    page.fill("#option-top_p", "7")
    page.fill("#option-max_tokens", "1.5")
    expect(page.locator("#option-top_p")).to_have_attribute("aria-invalid", "true")
    page.keyboard.press("Escape")
    send(page)
    answered(page, 2)
    assert "top_p" not in server.requests[-1] and "max_tokens" not in server.requests[-1]
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Restore defaults").click()
    page.keyboard.press("Escape")
    send(page)
    answered(page, 3)
    assert set(server.requests[-1]) == {"model", "messages", "stream", "stream_options", "temperature"}
    assert server.requests[-1]["temperature"] == 0.7  # the page's own default


def test_the_card_and_the_evidence_of_the_model(page: Any) -> None:
    page.get_by_role("button", name="Evidence").click()
    dialog = page.get_by_role("dialog", name="small-72MB")
    row = dialog.get_by_role("row", name="kl divergence")
    expect(row).to_contain_text("0.0631\u00a0nat")
    expect(row).to_contain_text("0.0596 to 0.0665\u00a0nat")
    expect(dialog.get_by_role("row", name="baseline perplexity")).to_have_count(0)
    expect(dialog.get_by_role("row", name="perplexity").first).to_contain_text("baseline 677.5\u00a0ppl")
    expect(dialog).to_contain_text("Runs on the native backend. AVX512-VNNI kernels")
    page.keyboard.press("Tab")
    expect(dialog.get_by_role("tab", name="Evidence")).to_be_focused()
    page.keyboard.press("ArrowRight")
    panel = dialog.get_by_role("tabpanel", name="Model card")
    expect(panel.get_by_role("heading", name="A small model, 71.95 MB")).to_be_visible()
    expect(panel).not_to_contain_text("library_name")  # the front matter is for machines
    expect(panel).to_contain_text("Text with *escapes* and <b>entities</b>.")
    expect(panel.get_by_role("row", name="c4g32 99 48.12 MB")).to_be_visible()
    for _ in range(12):  # the dialog keeps the focus, or the browser itself has it
        page.keyboard.press("Tab")
        assert page.evaluate(
            "document.activeElement.closest('dialog') !== null || document.activeElement === document.body"
        )
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("button", name="Evidence")).to_be_focused()


def test_a_model_of_which_nothing_is_known(page: Any, server: FakeServer) -> None:
    about = {**example_about("large-145MB"), "card": None, "evidence": [], "why": "", "size_bytes": 145_000_000}
    server.about = {"large-145MB": about}
    page.get_by_role("button", name="Evidence").click()
    expect(page.locator("#notice")).to_contain_text("Nothing is known about small-72MB. there is no such model")
    page.select_option("#model", "large-145MB")
    page.get_by_role("button", name="Evidence").click()
    expect(page.get_by_role("dialog")).to_contain_text("Evidence: not measured")
    page.get_by_role("tab", name="Model card").click()
    expect(page.get_by_role("dialog")).to_contain_text("This model has no card")


def test_a_key_is_asked_for_kept_in_the_tab_alone_and_sent(page: Any, server: FakeServer) -> None:
    server.key = "right"
    page.reload()
    dialog = page.get_by_role("dialog", name="An API key is needed")
    expect(dialog.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("did not accept the key")
    page.keyboard.type("right")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    send(page)
    expect(last_answer(page).locator(".text")).to_have_text("Hello there.")
    assert page.evaluate("JSON.stringify({...localStorage})").count("right") == 0
    assert page.evaluate("sessionStorage['gulliver.key']") == "right"
    server.key = "changed"  # while a conversation runs
    send(page, "Still there?")
    expect(page.get_by_role("alert")).to_contain_text("Give a key.")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Enter an API key").click()
    page.keyboard.type("changed")
    page.keyboard.press("Enter")
    answered(page, 2)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_busy_server_is_asked_again_when_it_said(page: Any, server: FakeServer) -> None:
    page.clock.install()
    server.replies.append(Reply(status=429, message="the queue is full", headers={"Retry-After": "90"}))
    send(page)
    expect(page.get_by_role("alert")).to_contain_text("The server is busy")
    expect(page.get_by_role("alert")).to_contain_text("The queue is full.")
    button = page.locator(".failure button")
    expect(button).to_be_disabled()
    expect(button).to_have_text(re.compile(r"Try again in (90|[678]\d).s"))
    page.clock.fast_forward("01:31")
    expect(button).to_be_enabled()
    expect(button).to_have_text("Try again")
    button.click()
    expect(page.locator(".turn .text")).to_have_text(["Hello", "Hello there."])


@pytest.mark.parametrize(
    ("reply", "shown", "kept"),
    [
        (Reply(status=400, message="the prompt has 9000 tokens; 2048 fit"), "The prompt has 9000 tokens; 2048 fit.", 0),
        (Reply(status=500), "The server answered with status 500.", 0),
        (Reply(["Half an"], fault="out of memory"), "Out of memory.", 1),
        (Reply(["Half an"], cut=True), "The connection ended before the answer did.", 1),
    ],
)
def test_errors_say_what_happened(page: Any, server: FakeServer, reply: Reply, shown: str, kept: int) -> None:
    server.replies.append(reply)
    send(page)
    expect(page.get_by_role("alert").locator(".text")).to_have_text(shown)
    answered(page, kept)
    if kept:
        expect(last_answer(page).locator(".numbers")).to_contain_text("incomplete")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer .text")).to_have_text(["Hello there."])
    expect(page.get_by_role("alert")).to_have_count(0)
    assert messages(server) == [("user", "Hello")]


def test_a_server_that_is_gone(page: Any, server: FakeServer) -> None:
    expect(page.locator("#model")).to_be_enabled()
    page.context.set_offline(True)
    send(page)
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    expect(last_answer(page).locator(".text")).to_have_text("Hello there.")


def test_the_end_is_followed_only_where_the_reader_is(page: Any, server: FakeServer) -> None:
    area = page.locator("#conversation")
    left = "(area) => area.scrollHeight - area.clientHeight - area.scrollTop"
    long = [f"Line {number} of a long answer.\n\n" for number in range(80)]
    server.replies.append(Reply(long, delay_seconds=0.001))
    send(page)
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    assert area.evaluate(left) < 4
    server.replies.append(Reply(long, hold=True))
    server.released.clear()
    send(page)
    expect(last_answer(page)).to_contain_text("Line 79")
    area.hover()
    page.mouse.wheel(0, -900)
    expect(page.get_by_role("button", name="Go to the end")).to_be_visible()
    before = area.evaluate("(area) => area.scrollTop")
    server.release()
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    assert area.evaluate("(area) => area.scrollTop") == before
    page.get_by_role("button", name="Go to the end").click()
    assert area.evaluate(left) < 4
    expect(page.get_by_role("button", name="Go to the end")).to_be_hidden()
    page.mouse.wheel(0, -900)
    expect(page.get_by_role("button", name="Go to the end")).to_be_visible()
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("button", name="Go to the end")).to_be_hidden()
    assert area.evaluate("(area) => area.scrollTop") == 0


def test_a_conversation_survives_a_reload_and_is_forgotten_when_told(page: Any, server: FakeServer) -> None:
    send(page, "Remember me")
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    server.replies.append(Reply(["Half of"], hold=True))
    send(page, "More")
    expect(last_answer(page).locator(".text")).to_have_text("Half of")
    page.reload()
    expect(page.locator(".turn .text")).to_have_text(["Remember me", "Hello there.", "More", "Half of"])
    expect(last_answer(page).locator(".numbers")).to_contain_text("incomplete")
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("heading", name="Talk to a model that fits here")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".turn")).to_have_count(4)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("secret")
    page.get_by_role("button", name="Forget everything").click()
    page.get_by_role("button", name="Press again to forget").click()
    expect(page.locator(".turn")).to_have_count(0)
    assert page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])") == "[{},{}]"


def test_what_is_kept_may_be_damaged(page: Any) -> None:
    page.evaluate(
        'localStorage[\'gulliver.turns\'] = \'[{"role":"user"},7,{"role":"system","content":"x"}]\';'
        "localStorage['gulliver.settings'] = 'nonsense'; localStorage['gulliver.model'] = '{}'"
    )
    page.reload()
    expect(page.locator("#welcome")).to_be_visible()
    send(page)
    expect(last_answer(page).locator(".text")).to_have_text("Hello there.")


def test_an_example_is_asked_with_one_click_and_copied(page: Any, server: FakeServer) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    server.replies.append(Reply(["*Because.*\n\n```\nx = 1\n```"]))
    expect(page.locator("#model")).to_be_enabled()
    page.get_by_role("button", name="Explain in three sentences").click()
    assert page.locator(".question .text").inner_text().startswith("Explain in three sentences")
    page.get_by_role("button", name="Copy", exact=True).last.click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "*Because.*\n\n```\nx = 1\n```"
    page.locator(".copy-code").click()
    expect(page.locator(".copy-code")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "x = 1"


def test_the_application_serves_this_page(browser: Any) -> None:
    """The stand-in of the other tests promises what the application keeps: paths, fields, policy, stream, stopping."""
    engine = FakeEngine(answer=lambda request: "A **bold** answer", pause=0.005, context=4096)
    with serving(engine) as running:
        page = browser.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if line.type in ("error", "warning") else None)
        page.goto(running.url)
        expect(page.locator("#facts")).to_contain_text("4\u202f096")
        page.get_by_role("button", name="Settings").click()
        page.fill("#system", "Be brief.")
        for field in page.locator("#options input").all():
            field.fill("1")
        page.fill("#option-max_tokens", "100")
        page.keyboard.press("Escape")
        send(page)
        expect(last_answer(page).locator("strong")).to_have_text("bold")
        expect(last_answer(page).locator(".numbers")).to_contain_text(re.compile("tokens/s · 17.tokens · first"))
        assert engine.requests[-1].max_tokens == 100 and engine.requests[-1].sampling.top_k == 1
        engine.answer = lambda request: "word " * 200
        send(page, "Another")
        expect(last_answer(page).locator(".text")).to_contain_text("word word")
        page.keyboard.press("Escape")
        answered(page, 2)
        page.get_by_role("button", name="Evidence").click()
        expect(page.get_by_role("dialog")).to_contain_text("Runs on the fake backend. Tests need no model.")
        page.close()
        assert engine.cancelled == 1 and faults == []
