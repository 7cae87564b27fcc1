"""The chat page in a headless Chromium, against a real server; and what must hold of the file itself."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from serve_tools import assert_clean
from ui_tools import MARKUP, grounding, long_engine, says, toy_index

from modicum.serve import ui
from modicum.serve.server import BackgroundServer, ServerConfig

PAGE = ui.page().decode()
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
Opened = Callable[..., Any]


def test_page_is_self_contained() -> None:
    """No address but the namespace of its icon, nothing loaded from elsewhere, nothing that makes markup of text."""
    assert set(re.findall(r"""https?://[^\s"'<>`]+|["'(]//[^\s"']+""", PAGE)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\bsrc(set)?\s*=|url\(|@import", PAGE.split("<script>")[0])
    assert not re.search(r"<(?:iframe|object|embed|img|base|meta http-equiv|link rel=.(?!icon))", PAGE)
    for maker in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "srcdoc"):
        assert maker not in PAGE
    markup = PAGE.split("<script>")[0].split("</style>")[1]
    assert not re.search(r"\s(?:style|on\w+)\s*=", markup)  # the policy would refuse them


def test_policy_lets_only_this_page_run() -> None:
    policy = dict(rule.split(" ", 1) for rule in ui.headers()["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'" and policy["frame-ancestors"] == "'none'"
    for tag in ("script", "style"):
        (body,) = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", PAGE, re.DOTALL)
        assert policy[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'"


def test_page_is_served_only_if_asked_for() -> None:
    with BackgroundServer(long_engine(), ServerConfig(port=0)) as server:
        assert httpx.get(server.url).status_code == 404 and "--ui" in httpx.get(server.url).text
    with BackgroundServer(long_engine(), ServerConfig(port=0, ui=True, api_key="sesame")) as server:
        page = httpx.get(server.url)
        assert page.text == PAGE and page.headers["content-security-policy"] == ui.headers()["content-security-policy"]
        assert page.headers["content-type"] == "text/html; charset=utf-8" and "sesame" not in page.text


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackgroundServer]:
    index = grounding(toy_index(tmp_path_factory.mktemp("ui") / "orchard"))
    config = ServerConfig(model="tiny", adapter="pirate", port=0, ui=True)
    with BackgroundServer(long_engine(), config, index) as running:
        yield running
    assert_clean(running.server.worker.engine)


@pytest.fixture
def opened(browser: Any) -> Iterator[Opened]:
    """Opens the page of a server; at the end, nothing may have been refused by the policy or raised by the script."""
    contexts, complaints = [], []

    def open_page(server: BackgroundServer, search: bool = False, max_tokens: int = 24, **options: Any) -> Any:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
        contexts.append(context)
        context.set_default_timeout(20_000)
        settings = f'{{"temperature": 0, "maxTokens": {max_tokens}, "search": {str(search).lower()}}}'
        context.add_init_script(f"localStorage.setItem('modicum.settings', '{settings}')")
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if "Content Security Policy" in m.text else None)
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def ask(page: Any, text: str) -> None:
    page.wait_for_selector("#welcome h1:not(:empty)", state="attached")
    page.fill("#input", text)
    page.press("#input", "Enter")


def engine_of(server: BackgroundServer) -> Any:
    return server.server.worker.engine


def test_streams_and_says_how_fast(server: BackgroundServer, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "One two three four five six seven eight nine ten."
    go_on = threading.Event()
    monkeypatch.setattr(engine_of(server), "step", says(engine_of(server), text, seconds=0.1, go_on=go_on))
    page = opened(server)
    page.wait_for_selector("#welcome h1:not(:empty)")
    assert page.locator("#model option").all_inner_texts() == ["tiny + pirate"]
    assert "2,048 tokens of context" in page.inner_text("#welcome")
    ask(page, "Count")
    page.wait_for_selector(".assistant .text:not(:empty)")
    partial = page.inner_text(".assistant .text")
    assert text.startswith(partial) and partial != text  # shown while more is to come
    assert page.get_attribute(".assistant", "aria-busy") == "true" and page.is_visible("#stop")
    time.sleep(1)
    go_on.set()
    page.wait_for_selector(".foot")
    assert page.inner_text(".assistant .text") == text and page.inner_text(".user .text") == "Count"
    figures = page.inner_text(".figures")
    form = r"(\d+) tokens · ([\d.]+) tokens/s · first token ([\d.]+) s( · length limit)?"
    matched = re.fullmatch(form, figures)
    assert matched, figures
    tokens, rate, first = (float(matched[i]) for i in (1, 2, 3))
    assert 4 < tokens <= 24 and first >= 0.1
    assert 0 < rate < tokens - 1  # it took more than a second from the first token to the last
    assert page.get_attribute(".assistant", "aria-busy") == "false" and page.is_visible("#send")
    assert page.inner_text("#announcer p") == text and page.get_attribute("#announcer", "aria-live") == "polite"


@pytest.mark.parametrize("by", ["Escape", "button", "new chat"])
def test_stop_frees_the_sequence(
    server: BackgroundServer, opened: Opened, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    engine = engine_of(server)
    aborted = server.server.api.metrics.aborted._value.get()
    monkeypatch.setattr(engine, "step", says(engine, "word " * 400, seconds=0.02))
    page = opened(server, max_tokens=1500)  # half a minute
    ask(page, "Go on")
    page.wait_for_selector(".assistant .text:not(:empty)")
    assert engine.busy
    if by == "Escape":
        page.keyboard.press("Escape")
    else:
        page.click("#stop" if by == "button" else "#new")
    until = time.monotonic() + 10
    while engine.busy and time.monotonic() < until:
        time.sleep(0.02)
    assert not engine.busy and engine.stats()["used_blocks"] == 0
    assert server.server.api.metrics.aborted._value.get() == aborted + 1
    if by == "new chat":
        assert page.locator(".turn").count() == 0 and page.is_visible("#welcome")
    else:
        assert page.inner_text(".figures").endswith("stopped") and page.inner_text(".assistant .text").startswith(
            "word"
        )
    assert page.is_visible("#send") and page.evaluate("document.activeElement.id") == "input"


def test_stopped_before_the_first_word_gives_the_question_back(
    server: BackgroundServer, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(server)
    monkeypatch.setattr(engine, "step", says(engine, "", seconds=0.05))
    page = opened(server, max_tokens=500)
    ask(page, "Something to change")
    page.wait_for_selector(".waiting")
    page.keyboard.press("Escape")
    page.wait_for_selector("#welcome", state="visible")
    assert page.input_value("#input") == "Something to change" and page.locator(".turn").count() == 0


def test_markdown_and_inert_markup(server: BackgroundServer, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        f"# Heading {MARKUP}\n\nA **bold** and `code` word, *slanted*, 2 * 3 * 4, "
        f"{MARKUP} [link](javascript:pwned=1)\n\n"
        f"- one\n- two\n  1. inner\n\n```html\n{MARKUP}\n# no heading\n```\n\n> quoted <b>raw</b>\n\n3. three\n4. four"
    )
    monkeypatch.setattr(engine_of(server), "step", says(engine_of(server), text))
    page = opened(server)
    ask(page, f"Say {MARKUP}")
    page.wait_for_selector(".foot")
    body = page.locator(".assistant .text")
    assert page.evaluate("window.pwned") is None
    assert page.locator("#conversation").locator("img, script, b, iframe, a:not(.cite)").count() == 0
    assert body.inner_text().count(MARKUP) == 3 and page.inner_text(".user .text") == f"Say {MARKUP}"
    assert body.locator("h3").inner_text() == f"Heading {MARKUP}"
    assert body.locator("strong").all_inner_texts() == ["bold"] and body.locator("em").all_inner_texts() == ["slanted"]
    assert body.locator("p code").all_inner_texts() == ["code"] and "2 * 3 * 4" in body.inner_text()
    assert body.locator("pre code").inner_text() == f"{MARKUP}\n# no heading"
    assert body.locator("> ul > li").count() == 2 and body.locator("> ul > li ol").inner_text() == "inner"
    assert body.locator("> ol").get_attribute("start") == "3" and body.locator("> ol > li").count() == 2
    assert body.locator("blockquote").inner_text() == "quoted <b>raw</b>"
    # drawn a few characters at a time, it is what it is when drawn in one go
    slow, once = page.evaluate(
        """(text) => {
            const [slow, once] = [document.createElement('div'), document.createElement('div')];
            for (let i = 0; i < text.length + 3; i += 3) drawMarkdown(slow, text.slice(0, i), () => null);
            drawMarkdown(once, text, () => null);
            return [slow.innerHTML, once.innerHTML];
        }""",
        text,
    )
    assert slow == once


def test_sources_and_citations(server: BackgroundServer, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "In the cellar [1], pears elsewhere [2, 1]; not [7], nor `[1]`."
    monkeypatch.setattr(engine_of(server), "step", says(engine_of(server), text))
    page = opened(server, search=True)
    page.wait_for_selector("#search:checked")
    assert page.inner_text("#search-name") == "Search orchard"
    ask(page, "Where are apples and pears kept?")
    page.wait_for_selector(".foot")
    titles = page.locator(".sources .title").all_inner_texts()
    assert sorted(titles) == ["Apples", "Pears"] and page.locator(".sources .origin").count() == 2
    assert page.locator(".cite").all_inner_texts() == ["1", "2", "1"] and "[7]" in page.inner_text(".assistant .text")
    assert page.locator(".sources .cited .number").all_inner_texts() == ["1", "2"]
    pears = titles.index("Pears")
    excerpt = page.locator(".sources .excerpt").nth(pears)
    assert not excerpt.is_visible()
    page.locator(".cite", has_text=str(pears + 1)).first.click()
    assert excerpt.is_visible() and excerpt.inner_text() == f"Pears are kept in the attic. {MARKUP}"
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.locator(".sources summary").nth(1 - pears).click()
    assert page.locator(".sources .excerpt").nth(1 - pears).locator("strong").inner_text() == "kept"  # Markdown
    ask(page, "And what do plums say?")
    page.wait_for_selector(".foot >> nth=1")
    assert MARKUP in page.locator(".sources .title").all_inner_texts()[2] and page.evaluate("window.pwned") is None
    page.set_checked("#search", False, force=True)
    ask(page, "Thanks")
    page.wait_for_selector(".foot >> nth=2")
    assert page.locator(".sources").count() == 2


def test_keyboard_and_settings(server: BackgroundServer, opened: Opened) -> None:
    page = opened(server)
    page.wait_for_selector("#welcome h1:not(:empty)")
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    assert page.input_value("#input") == "first line\nsecond" and page.locator(".turn").count() == 0
    with page.expect_request("**/v1/chat/completions") as request:
        page.keyboard.press("Enter")
    sent = request.value.post_data_json
    assert sent["messages"] == [{"role": "user", "content": "first line\nsecond"}]
    assert (sent["temperature"], sent["max_tokens"], "search" in sent) == (0, 24, False)
    page.wait_for_selector(".foot")
    answer = page.evaluate("turns[1].content")
    names = page.evaluate(
        """[...document.querySelectorAll('button, input, select, textarea')].filter(e => !(e.labels?.length
        || e.getAttribute('aria-label') || e.textContent.trim())).map(e => e.id)"""
    )
    assert names == []  # everything that takes input has a name
    page.focus("#new")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "open-settings"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.is_visible("#settings")
    page.fill("#system", "Be brief.")
    page.locator("#temperature").fill("1.5")
    page.fill("#max-tokens", "7")
    page.keyboard.press("Escape")
    assert not page.is_visible("#settings")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "Again")
    sent = request.value.post_data_json
    assert [m["role"] for m in sent["messages"]] == ["system", "user", "assistant", "user"]
    assert sent["messages"][0]["content"] == "Be brief." and sent["messages"][2]["content"] == answer
    assert (sent["temperature"], sent["max_tokens"]) == (1.5, 7)
    page.wait_for_selector(".foot >> nth=1")
    page.click("#new")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "Fresh")
    assert [m["content"] for m in request.value.post_data_json["messages"]] == ["Be brief.", "Fresh"]
    page.wait_for_selector(".foot")


def test_copy_and_answer_again(server: BackgroundServer, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Take **this**:\n\n```\nx = 1\n```"
    monkeypatch.setattr(engine_of(server), "step", says(engine_of(server), text))
    page = opened(server, permissions=["clipboard-read", "clipboard-write"])
    ask(page, "Code")
    page.get_by_label("Copy answer").click()
    assert page.evaluate("navigator.clipboard.readText()") == text
    page.locator(".code button").click()
    page.wait_for_selector("text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "x = 1"
    with page.expect_request("**/v1/chat/completions") as request:
        page.get_by_label("Answer again").click()
    assert [m["role"] for m in request.value.post_data_json["messages"]] == ["user"]
    page.wait_for_selector(".foot")
    assert page.locator(".assistant").count() == 1


def test_errors_say_what_to_do(server: BackgroundServer, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    page, worker = opened(server), server.server.worker
    with monkeypatch.context() as busy:
        busy.setattr(worker, "max_queue", 0)
        ask(page, "Hello?")
        page.wait_for_selector(".error")
        assert "busy" in page.inner_text(".error") and "Wait" in page.inner_text(".error")
    page.click(".error button")
    page.wait_for_selector(".foot")
    assert page.locator(".error").count() == 0 and page.locator(".user").count() == 1

    with monkeypatch.context() as broken:

        def fall(*_: object) -> None:
            raise RuntimeError("a bit fell over")

        broken.setattr(worker.engine, "runner", fall)
        ask(page, "And now?")
        page.wait_for_selector(".error")
        assert "The server failed" in page.inner_text(".error") and "a bit fell over" in page.inner_text(".error")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "Better?")  # instead of trying again: the question that failed is not sent
    assert [m["role"] for m in request.value.post_data_json["messages"]] == ["user", "assistant", "user"]
    page.wait_for_selector(".foot >> nth=1")
    ask(page, "long " * 1000)
    page.wait_for_selector(".error strong:has-text('too long')")


def test_a_server_that_goes_away(opened: Opened) -> None:
    with BackgroundServer(long_engine(), ServerConfig(model="tiny", port=0, ui=True, drain=0)) as server:
        engine = engine_of(server)
        engine.step = says(engine, "word " * 400, seconds=0.02)
        page = opened(server, max_tokens=1500)
        ask(page, "Go on")
        page.wait_for_selector(".assistant .text:not(:empty)")
    page.wait_for_selector(".error")
    assert "modicum serve" in page.inner_text(".error") and page.inner_text(".assistant .text").startswith("word")
    page.click(".error button")
    page.wait_for_selector(".error strong:has-text('does not answer')")
    assert server.url in page.inner_text(".error")


def test_choice_of_a_model(server: BackgroundServer, opened: Opened) -> None:
    """With several models, the one chosen is asked for; one that has gone is said so."""
    page = opened(server)
    page.wait_for_selector("#welcome h1:not(:empty)")
    assert page.is_disabled("#model")  # there is no choice
    listed = httpx.get(server.url + "/v1/models").json()
    listed["data"].append(listed["data"][0] | {"id": "other", "adapter": None, "search": None, "max_model_len": 64})
    page.route("**/v1/models", lambda route: route.fulfill(json=listed))
    page.reload()
    page.wait_for_selector("#model:enabled")
    assert page.locator("#model option").all_inner_texts() == ["tiny + pirate", "other"]
    page.select_option("#model", "other")
    assert page.inner_text("#welcome h1") == "other" and not page.is_visible("#search-toggle")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "Hello")
    assert request.value.post_data_json["model"] == "other"
    page.wait_for_selector(".error strong:has-text('not there')")


def test_key_is_asked_for_and_kept_in_the_session_only(opened: Opened) -> None:
    with BackgroundServer(long_engine(), ServerConfig(model="tiny", port=0, ui=True, api_key="sesame")) as server:
        page = opened(server)
        page.wait_for_selector("#key-dialog[open]")
        for key in ("guess", "sesame"):
            page.fill("#key", key)
            page.keyboard.press("Enter")
            if key == "guess":
                page.wait_for_selector("#key-note:has-text('not accepted')")
        ask(page, "Hello")
        page.wait_for_selector(".foot")
        assert page.evaluate("sessionStorage.getItem('modicum.key')") == "sesame"
        assert "sesame" not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
        page.reload()
        ask(page, "Still here?")
        page.wait_for_selector(".foot")
        page.click("#open-settings")
        page.click("#forget-key")
        page.wait_for_selector("#key-dialog[open]")
        assert page.evaluate("sessionStorage.length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone(server: BackgroundServer, opened: Opened, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    text = "A" * 300 + "\n\n```\n" + "x" * 300 + "\n```\n\n[1]"
    monkeypatch.setattr(engine_of(server), "step", says(engine_of(server), text, size=50))
    page = opened(server, search=True, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    ask(page, "Where are apples kept? " + "b" * 200)
    page.wait_for_selector(".foot")
    page.locator(".sources summary").first.click()
    widest = page.evaluate("Math.max(document.documentElement.scrollWidth, document.querySelector('main').scrollWidth)")
    assert widest <= 390
    send = page.locator("#send").bounding_box()
    assert send["y"] + send["height"] <= 844 and send["width"] >= 36
    page.click("#open-settings")
    assert page.locator("#settings").bounding_box()["width"] <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) > 384) == (scheme == "light")
