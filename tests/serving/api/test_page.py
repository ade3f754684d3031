"""The page, used as people use it, in a headless Chromium."""

import contextlib
import dataclasses
import json
import time

import pytest
from chromium import Chromium, find_chromium
from scripted_engine import ScriptedEngine

from serving.api.keys import Keys

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs chromium")
FIGURES = ".turn:last-child .figures"
ANSWER = ".turn:last-child .answer"
BUSY = "!document.querySelector('#stop').hidden"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def tab(browser, server):
    with browser.tab(f"{server.url}/") as tab:
        tab.until("document.querySelector('#model').value", "scripted")
        yield tab
        # The browser also logs the answers that refuse, as some tests want them.
        assert [one for one in tab.complaints() if "Failed to load resource" not in one] == []


def ask(tab, text):
    tab.click("#text")
    tab.type(text)
    tab.press("Enter")


def shows(tab, selector, text):
    """Waits until an element has a text in it."""
    inner = f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"
    tab.until(f"({inner}).includes({json.dumps(text)})")


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def prompts(engine):
    return [bytes(prompt).decode() for prompt, _ in engine.asked]


def test_an_answer_comes_with_its_figures(tab, engine):
    engine.pause = 0.002
    engine.cached = 5
    ask(tab, "How are you?")
    shows(tab, FIGURES, "tokens/s")
    assert tab.text(ANSWER) == "Hello there, how are you?"
    figures = tab.text(FIGURES)
    assert (
        "first token after" in figures
        and "25 tokens made" in figures
        and "5 of them cached" in figures
    )
    assert tab.run("document.activeElement.id") == "text" and tab.text("#told").startswith("Hello")
    assert tab.complaints() == []


def test_the_answer_grows_while_it_comes(tab, engine):
    engine.pause = 0.2
    ask(tab, "Slowly")
    shows(tab, ANSWER, "Hel")
    assert tab.run(BUSY) and len(tab.text(ANSWER)) < 25
    assert tab.run("document.querySelector('.turn').getAttribute('aria-busy')") == "true"
    engine.pause = 0.0
    shows(tab, ANSWER, "how are you?")
    tab.until(BUSY, False)


def test_a_chat_goes_on_and_starts_anew(tab, engine):
    tab.click("#adjust")
    tab.click("#system")
    tab.type("Be brief")
    tab.run("document.querySelector('#temperature').value = 0")
    tab.click("#most")
    tab.type("9")
    ask(tab, "One")
    shows(tab, FIGURES, "ended at the most tokens")
    ask(tab, "Two")
    tab.until("document.querySelectorAll('.turn:not(.coming)').length", 2)
    first, second = prompts(engine)
    assert first == "system: Be brief\nuser: One\nassistant:"
    assert second == f"{first} Hello the\nuser: Two\nassistant:"
    params = engine.asked[1][1]
    assert (params.max_tokens, params.temperature) == (9, 0)
    tab.click("#new")
    assert tab.run("document.querySelectorAll('.turn').length") == 0
    assert "Ask scripted something" in tab.run("getComputedStyle(log, '::before').content")
    ask(tab, "Three")
    shows(tab, FIGURES, "tokens/s")
    assert "One" not in prompts(engine)[-1]


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_ends_the_request_itself(tab, engine, way):
    engine.pause = 0.2
    ask(tab, "Talk")
    shows(tab, ANSWER, "H")
    if way == "button":
        tab.click("#stop")
    else:
        tab.press("Escape")
    wait_for(lambda: not engine.running)
    shows(tab, FIGURES, "stopped after")
    assert not tab.run(BUSY) and tab.run("document.activeElement.id") == "text"
    said = tab.text(ANSWER)
    engine.pause = 0.0
    ask(tab, "Again")
    tab.until("document.querySelectorAll('.turn:not(.coming)').length", 2)
    assert prompts(engine)[-1] == f"user: Talk\nassistant: {said}\nuser: Again\nassistant:"


def test_shift_enter_starts_a_line_and_the_keyboard_reaches_all(tab, engine):
    tab.click("#text")
    tab.type("One")
    tab.press("Enter", shift=True)
    tab.type("two")
    tab.press("Enter")
    shows(tab, FIGURES, "tokens/s")
    assert prompts(engine)[-1] == "user: One\ntwo\nassistant:"
    reached = set()
    for _ in range(12):
        tab.press("Tab")
        reached.add(tab.run("document.activeElement.id"))
        # The message's own ring is that of the box around it.
        ring = "getComputedStyle(document.activeElement).outlineStyle !== 'none'"
        assert tab.run(f"[document.body, text].includes(document.activeElement) || {ring}")
    assert {"model", "new", "theme", "adjust", "send"} <= reached


def test_what_a_model_says_is_never_markup(tab, engine):
    said = '<img src=x onerror="document.title=1"><script>document.title=2</script> **b** `<i>`'
    engine.reply = lambda prompt, params: f"{said}\n\n# Top\n```html\n<b>\n```\nend".encode()
    ask(tab, "<b>me</b>")
    shows(tab, FIGURES, "tokens/s")
    assert tab.text(".user") == "<b>me</b>"
    blocks = tab.run("[...document.querySelectorAll('.answer > *')].map((x) => x.textContent)")
    assert blocks == [said.replace("**", "").replace("`", ""), "Top", "<b>", "end"]
    assert tab.run("document.querySelectorAll('.answer :is(img, script, i, b)').length") == 0
    assert tab.run("document.querySelector('.answer strong').textContent") == "b"
    assert tab.run("document.title") == "wsekern" and tab.complaints() == []


def test_reasoning_is_apart_and_folded(browser, serving):
    said = b"<think>\nLet me see.\n</think>\n\nIt is 4."
    template = "{% for m in messages %}{{ m.content }}{% if false %}<think></think>{% endif %}"
    engine = ScriptedEngine(lambda prompt, params: said)
    with (
        serving(engine, template + "{% endfor %}") as server,
        browser.tab(f"{server.url}/") as tab,
    ):
        tab.until("document.querySelector('#model').value", "scripted")
        ask(tab, "2 + 2?")
        shows(tab, FIGURES, "of them reasoning")
        assert tab.text(ANSWER) == "It is 4."
        assert tab.run("document.querySelector('.reasoning').open") is False
        tab.click(".reasoning summary")
        assert "Let me see." in tab.text(".reasoning")


def test_errors_are_said_and_a_question_can_be_asked_again(tab, engine):
    engine.queue_is_full = True
    ask(tab, "Hi")
    shows(tab, ".wrong", "the queue is full: 64 requests wait (429)")
    engine.queue_is_full = False
    engine.error, engine.error_after = "logits are not finite", 3
    tab.click(".wrong button")
    shows(tab, ".wrong", "logits are not finite (500)")
    assert tab.text(ANSWER) == "Hel"
    engine.error = ""
    tab.click(".wrong button")
    shows(tab, FIGURES, "tokens/s")
    assert tab.run("document.querySelectorAll('.turn').length") == 1
    assert prompts(engine)[-1] == "user: Hi\nassistant:"


def test_a_server_that_goes_is_seen(browser, serving):
    with contextlib.ExitStack() as stack:
        with serving(ScriptedEngine(lambda prompt, params: b"x")) as server:
            tab = stack.enter_context(browser.tab(f"{server.url}/"))
            shows(tab, "#state", "ready")
        ask(tab, "Hi")
        shows(tab, ".wrong", "The server does not answer")
        shows(tab, "#state", "The server does not answer")


def test_what_the_server_does_is_said(tab, server, engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(server.app.interface.models, "state", "loading")
        shows(tab, "#state", "loading")
    shows(tab, "#state", "ready")
    engine.is_alive = False
    shows(tab, "#state", "the engine has failed")


def test_a_key_is_asked_for_and_forgotten_with_the_tab(tab, server):
    interface = server.app.interface
    open_to_all, interface.keys = interface.keys, Keys(frozenset({"right"}))
    try:
        tab.until("!document.querySelector('#key-form').hidden")
        shows(tab, "#state", "needs a key")
        for key in ("wrong", "right"):
            tab.click("#key")
            tab.type(key)
            tab.press("Enter")
            if key == "wrong":
                shows(tab, "#key-reason", "does not know this key")
        shows(tab, "#state", "ready")
        assert tab.run("document.querySelector('#key-form').hidden")
        ask(tab, "Hi")
        shows(tab, FIGURES, "tokens/s")
        assert tab.run("[sessionStorage.getItem('key'), localStorage.length]") == ["right", 0]
    finally:
        interface.keys = open_to_all


def test_the_theme_is_the_systems_until_it_is_chosen(tab):
    def darkness():
        color = tab.run("getComputedStyle(document.body).backgroundColor")
        return 255 - max(map(int, color[4:-1].split(",")))

    tab.prefer("dark")
    assert darkness() > 200
    tab.prefer("light")
    assert darkness() < 30
    tab.until("document.querySelector('#theme').title", "Dark theme")
    tab.click("#theme")
    assert darkness() > 200
    tab.call("Page.reload")
    tab.until("document.querySelector('#theme')?.title", "Light theme")
    assert darkness() > 200


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_every_width_shows_all_without_scrolling_sideways(tab, engine, width):
    engine.reply = lambda prompt, params: b"x" * 300 + b"\n```\n" + b"y" * 300 + b"\n```"
    tab.resize(width, 700)
    tab.run("document.querySelector('#model').options[0].text = 'm'.repeat(60)")
    tab.click("#adjust")
    ask(tab, "z" * 300)
    shows(tab, FIGURES, "tokens/s")
    assert tab.run("document.documentElement.scrollWidth") == width
    outside = f"""[...document.querySelectorAll('header > *, .turn > *, .row > *, #settings > *')]
      .filter((x) => x.offsetParent && !x.matches('.unseen'))
      .filter((x) => x.getBoundingClientRect().right > {width}
                  || x.getBoundingClientRect().left < 0).map((x) => x.id || x.className)"""
    assert tab.run(outside) == []
    if width <= 960:
        assert not tab.run("document.querySelector('#machine').offsetParent")
        tab.click("#view")
    assert tab.run("document.querySelector('#map').getBoundingClientRect().width") > 300
    assert tab.run("document.documentElement.scrollWidth") == width


def test_the_machine_is_shown_alive(tab, engine):
    kinds = "hhe" + "." * 61
    engine.shown = dataclasses.replace(
        engine.shown,
        waiting=2,
        pages_held=2,
        pages_evictable=1,
        pages_free=61,
        page_kinds=kinds,
        grid=(2, 4),
        totals={"generated_tokens": 0.0},
    )
    engine.pause = 0.2
    ask(tab, "Talk")
    tab.until("document.querySelectorAll('#slots tr').length", 1)
    cells = tab.run("[...document.querySelectorAll('#slots td')].map((x) => x.innerText)")
    assert cells[1:] == ["3", "1", "1"]
    shows(tab, "#slots-count", "1 of 4 run")
    assert tab.text("#waiting-line") == "3 slots are idle; 2 requests wait."
    assert tab.text("#wafer") == "wafer of 2 × 4 PEs"
    assert tab.text("#tile") == "A tile is a page of 16 tokens, which lies over all PEs."
    assert [tab.text(f"#{kind}") for kind in ("held", "evictable", "free")] == ["2", "1", "61"]
    engine.shown = dataclasses.replace(engine.shown, totals={"generated_tokens": 1e6})
    tab.until("/[1-9]/.test(document.querySelector('#rate').innerText)")
    # The tiles: 8 to a row, and the first three differ from each other and from the rest.
    tiles = """[0, 1, 2, 3, 63].map((page) => {
      const map = document.querySelector('#map');
      const step = (map.width - 20) / 8;
      const [x, y] = [page % 8, Math.floor(page / 8)].map((i) => 10 + (i + 0.5) * step);
      return [...map.getContext('2d').getImageData(x, y, 1, 1).data].join();
    })"""
    tab.until(f"new Set({tiles}).size", 3)
    held, also_held, evictable, free, last = tab.run(tiles)
    assert held == also_held and free == last and len({held, evictable, free}) == 3
    engine.pause = 0.0
    tab.until("document.querySelectorAll('#slots tr').length", 0)


def test_nothing_is_asked_while_the_page_is_hidden(tab):
    tab.run(
        """(() => {
          window.asked = 0;
          const ask = fetch;
          window.fetch = (...args) => { asked += 1; return ask(...args); };
          window.hide = (hidden) => {
            Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
            document.dispatchEvent(new Event("visibilitychange"));
          };
        })()"""
    )
    tab.until("asked > 1")
    tab.run("hide(true); asked = 0")
    assert tab.run("new Promise((done) => setTimeout(() => done(asked), 1500))") == 0
    tab.run("hide(false)")
    tab.until("asked > 1")
