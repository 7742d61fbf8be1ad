"""The chat page in a browser, against the real engine with a tiny random model.

Needs Chromium (`apt-get install chromium`) and `pip install playwright`; `playwright install` is not needed.
"""

from __future__ import annotations

import json
import re
import shutil
import time

import pytest

from sleb.engine.config import EngineConfig
from sleb.engine.engine import Engine

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here"),
]

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIERS = ["tiny-llama:sleb-3", "tiny-llama", "tiny-llama:sleb-5"]  # the default first
# Greedy, so that nothing depends on luck; short, unless a test wants to stop it.
SETTINGS = {"temperature": "0", "max_tokens": "24"}
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.violations.push(`${event.violatedDirective} ${event.blockedURI}`);
});
"""
METRICS = """\
# TYPE sleb:prompt_tokens_total counter
sleb:prompt_tokens_total{model_name="a"} %d.0
sleb:prompt_tokens_total{model_name="b"} 0.0
sleb:generation_tokens_total{model_name="a"} %d.0
sleb:num_requests_running{model_name="a"} 2.0
sleb:num_requests_running{model_name="b"} 1.0
sleb:num_requests_waiting{model_name="a"} 5.0
sleb:kv_cache_usage_perc 0.25
"""


@pytest.fixture(scope="module")
def engine(tiny_model_dir, tiny_chain):
    config = EngineConfig(
        model=str(tiny_model_dir),
        layer_map=tiny_chain,
        tiers=(0, 3, 5),
        dtype="float32",
        device="cpu",
        kv_cache_memory=0.01,
    )
    engine = Engine(config)
    step = engine.step

    def slow_step():
        time.sleep(engine.delay)
        return step()

    engine.delay = 0.0
    engine.step = slow_step
    return engine


@pytest.fixture(scope="module")
def server(engine, start_server):
    running = start_server(engine)
    yield running
    running.wait_idle()
    running.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """open_page(url, width, settings) -> a page of a fresh profile; at the end: no errors, no violations.

    `page.expected` names the statuses of answers that the browser may report as failed.
    """
    pages = []

    def start(url, width=1280, height=800, settings=None):
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        context.add_init_script(WATCH)
        stored = json.dumps(json.dumps({**SETTINGS, **(settings or {})}))
        context.add_init_script(f"localStorage['sleb.settings'] ??= {stored}")
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.problems, page.expected = [], set()
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on(
            "console",
            lambda message: (
                page.problems.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        page.goto(url)
        pages.append(page)
        return page

    yield start
    for page in pages:
        assert page.evaluate("window.violations") == []
        known = [f"status of {status}" for status in page.expected]
        assert [text for text in page.problems if not any(each in text for each in known)] == []
        page.context.close()


def wait_for(page, expression):
    """Waits until a JavaScript expression is true; the page's policy forbids playwright's own way, which evals."""
    deadline = time.monotonic() + 15
    while not page.evaluate(f"Boolean({expression})"):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


def send(page, text="Say something, 世界!"):
    page.locator("#tier-a .name").wait_for()
    page.fill("#text", text)
    page.keyboard.press("Enter")


def wait_done(page):
    page.locator("#send").wait_for()


def answers(page):
    return page.locator(".answer .markdown:not(.reasoning *)").all_inner_texts()


def add_chat(page, *turns):
    """Puts a conversation into the browser's storage and opens it."""
    chat = {"id": "made", "title": "Made", "created": 1, "updated": 2, "turns": list(turns)}
    page.evaluate(
        "(chat) => { localStorage['sleb.chat.made'] = chat; sessionStorage['sleb.current'] = 'made'; }",
        json.dumps(chat),
    )
    page.reload()
    page.locator(".answer").first.wait_for()


def turn(content, **fields):
    answer = {"model": TIERS[0], "seed": None, "content": content, "reasoning": "", "error": None}
    return {"text": "?", "answers": [answer | {"state": "done", "stats": None} | fields]}


def test_an_answer_streams_and_is_there_after_a_reload(server, engine, open_page):
    page = open_page(server.url)
    page.locator("#tier-a .name").wait_for()
    assert page.locator("#empty-tiers .name").all_inner_texts() == TIERS
    engine.delay = 0.05
    send(page)
    page.locator(".stats:has-text('about')").wait_for()
    assert page.locator(".answer[aria-busy=true]").count() == 1  # words before the end
    engine.delay = 0
    wait_done(page)
    page.locator(".stats:has-text('24 tokens')").wait_for()
    [text] = answers(page)
    assert "tokens/s" in page.locator(".stats").inner_text()
    assert "first token" in page.locator(".stats").inner_text()
    page.reload()
    page.locator(".stats:has-text('24 tokens')").wait_for()
    assert answers(page) == [text]
    assert page.locator(".bubble").inner_text() == "Say something, 世界!"
    assert page.locator("#chats .chat-title").all_inner_texts() == ["Say something, 世界!"]


@pytest.mark.parametrize("how", ["button", "escape", "close"])
def test_stop_frees_the_engine(server, engine, open_page, wait_until, how):
    page = open_page(server.url, settings={"max_tokens": ""})
    engine.delay = 0.5  # the answer ends by itself after some tokens
    send(page)
    wait_until(lambda: engine.num_running == 1)
    page.locator(".stats:has-text('token')").wait_for()
    if how == "button":
        page.click("#stop")
    elif how == "escape":
        page.keyboard.press("Escape")
    else:
        page.expected = {404}  # /favicon.ico, where nothing names another icon
        page.goto(f"{server.url}/version")
    wait_until(lambda: engine.num_running == 0, 2)
    if how == "close":
        page.goto(server.url)
    engine.delay = 0
    wait_done(page)
    page.locator(".notice:has-text('Stopped.')").wait_for()
    server.wait_idle()


def test_shift_enter_breaks_the_line(server, open_page):
    page = open_page(server.url)
    page.locator("#tier-a .name").wait_for()
    page.fill("#text", "one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    wait_done(page)
    assert page.locator(".bubble").inner_text() == "one\ntwo"


def test_compare_asks_two_tiers_with_one_seed_at_once(server, engine, open_page, wait_until):
    page = open_page(server.url, settings={"temperature": "1"})
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.post_data else None)
    page.locator("#tier-a .name").wait_for()
    page.click("#compare")
    for side, tier in (("a", TIERS[1]), ("b", TIERS[2])):
        page.click(f"#tier-{side}")
        page.check(f"input[value='{tier}']")
        page.click("#tier-dialog button[value=use]")
    engine.delay = 0.1  # long enough to be seen beside each other, and to have a speed
    send(page)
    wait_until(lambda: engine.num_running == 2)
    wait_done(page)
    engine.delay = 0
    assert [body["model"] for body in bodies] == TIERS[1:]
    assert bodies[0]["seed"] == bodies[1]["seed"] >= 0
    assert {body["temperature"] for body in bodies} == {1}
    before = answers(page)
    assert len(before) == 2
    assert page.locator(".compared .stats:has-text('tokens/s')").count() == 2
    page.click("text=Show differences")
    assert page.locator(".diff mark").count() >= 1
    page.click("text=Show differences")
    wait_until(lambda: answers(page) == before)
    strips = page.locator(".answer .strip")
    assert strips.nth(0).locator("i.out").count() == 0
    # 3, 1 and 2 as blocks, the attention and the MLP of 4: four blocks of two halves
    assert strips.nth(1).locator("i.out").count() == 8
    assert "2 of 6 blocks" in strips.nth(1).get_attribute("aria-label")


def test_tiers_are_told_apart_before_one_is_chosen(server, open_page):
    page = open_page(server.url)
    page.locator("#tier-a .name").wait_for()
    cards = json.loads(server.http.get("/v1/models").text)["data"]
    cards[0]["pruning"] |= {
        "perplexity": {"dense": 20.04, "pruned": 31.72, "dataset": "some text"},
        "speedup": {"value": 1.375, "test": "decode", "batch": 1, "device": "a card"},
    }
    aliases = [card | {"id": f"other-{number}"} for number, card in enumerate(cards)]
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": cards + aliases}))
    page.reload()
    page.locator("#tier-a .name").wait_for()
    page.click("#tier-a")
    assert page.locator(".tier-card").count() == len(cards)
    shown = page.locator(".tier-card").nth(0).inner_text().replace("\n", " ")
    for each in ("Depth 3", "Blocks 4 of 6", "Weights", "Perplexity 31.7", "Speed 1.38 times"):
        assert each in shown
    assert "not known" in page.locator(".tier-card").nth(1).inner_text()
    source = page.inner_text("#tier-source")
    assert "on some text" in source
    assert "the full model has 20.0" in source
    assert "on a card (decode, batch 1)" in source
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    chosen = page.locator(f"#tier-a .name:has-text('{TIERS[1]}')")
    chosen.wait_for()
    page.reload()
    chosen.wait_for()


QUESTIONS = {
    "of": 20,
    "right": 9.0,
    "right_sampled": 7.9,
    "samples": 20,
    "sampling": {"temperature": 0.2, "top_p": 0.9},
    "command": "sleb eval tiny --questions",
}


def test_the_share_of_questions_is_shown_of_each_tier_that_was_asked(server, open_page):
    page = open_page(server.url)
    page.locator("#tier-a .name").wait_for()
    assert page.inner_text("#empty-source") == ""
    cards = json.loads(server.http.get("/v1/models").text)["data"]
    cards[0]["pruning"]["questions"] = QUESTIONS
    cards[1]["pruning"]["questions"] = QUESTIONS | {"right_sampled": None}
    cards[0]["sampling"] |= {"temperature": 0.2}
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": cards}))
    page.reload()
    page.locator("#tier-a .name").wait_for()
    shown = page.locator("#empty-tiers li").all_inner_texts()
    assert ["40 % right" in shown[0], "45 % right" in shown[1], "right" in shown[2]] == [True, True, False]
    source = "Right: of 20 plain questions, asked 20 times each at temperature 0.2, top p 0.9."
    assert page.inner_text("#empty-source") == source
    page.click("#tier-a")
    assert "40 % right" in page.locator(".tier-card").nth(0).inner_text()
    assert source in page.inner_text("#tier-source")
    page.keyboard.press("Escape")
    page.click("#open-settings")
    assert page.get_attribute("[data-setting=temperature]", "placeholder") == "0.2, the server's choice"


def test_settings_are_kept_for_each_model(server, open_page):
    page = open_page(server.url)
    page.locator("#tier-a .name").wait_for()
    page.click("#open-settings")
    page.fill("[data-setting=temperature]", "0.7")
    page.fill("[data-setting=seed]", "11")
    cards = json.loads(server.http.get("/v1/models").text)["data"]
    page.reload()
    page.locator("#tier-a .name").wait_for()
    assert page.input_value("[data-setting=temperature]") == "0.7"
    others = [card | {"root": "another"} for card in cards]
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": others}))
    page.reload()
    page.locator("#tier-a .name").wait_for()
    assert [page.input_value(f"[data-setting={name}]") for name in ("temperature", "seed")] == ["0", ""]
    page.unroute("**/v1/models")
    page.reload()
    page.locator("#tier-a .name").wait_for()
    assert [page.input_value(f"[data-setting={name}]") for name in ("temperature", "seed")] == ["0.7", "11"]


def import_file(page, content):
    """Chooses a file of that content; what the page says of it."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    file = {"name": "conversations.json", "mimeType": "application/json", "buffer": raw}
    page.set_input_files("#import-file", file)
    page.locator("#toast:has-text('mported')").wait_for()
    said = page.inner_text("#toast")
    page.evaluate("document.getElementById('toast').hidden = true")
    return said


def stored_chats(page):
    return page.evaluate(
        "Object.entries(localStorage).filter(([key]) => key.startsWith('sleb.chat.')).sort()"
        ".map(([key, text]) => [key, JSON.parse(text)])"
    )


def test_what_was_exported_is_imported_elsewhere_and_once(server, open_page):
    page = open_page(server.url)
    send(page, "first")
    wait_done(page)
    page.locator("#sidebar .new-chat").click()
    send(page, "second")
    wait_done(page)
    with page.expect_download() as download:
        page.click("#export-all")
    exported = download.value.path().read_bytes()
    before = stored_chats(page)
    assert import_file(page, exported) == "0 imported, 2 here already."
    assert stored_chats(page) == before
    other = open_page(server.url)
    other.locator("#tier-a .name").wait_for()
    assert import_file(other, exported) == "2 imported."
    assert stored_chats(other) == before
    assert sorted(other.locator("#chats .chat-title").all_inner_texts()) == ["first", "second"]
    assert other.locator(".bubble").count() == 1  # one of them is open
    # One of them alone, changed meanwhile: it comes beside the one that is here.
    chat = json.loads(exported)[0]
    chat["turns"][0]["text"] = "changed"
    assert import_file(other, chat) == "1 imported."
    now = stored_chats(other)
    assert len(now) == 3 and [each for each in now if each in before] == before


def test_a_bad_file_brings_nothing_and_loses_nothing(server, open_page):
    good = {"id": "good", "title": "Good", "created": 1, "updated": 2, "turns": [turn("fine")]}
    page = open_page(server.url)
    add_chat(page, turn("here"))
    before = stored_chats(page)
    bad_turns = (
        [{}],
        [turn(1)],
        [turn("a") | {"answers": []}],
        [turn("a", stats={"rate": "fast"})],
        "x",
        None,
    )
    for content, why in (
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"", "is no JSON"),
        ([], "holds 0 conversations"),
        ([good] * 1001, "holds 1001 conversations"),
        ("text", "number 1 is no conversation"),
        (None, "number 1 is no conversation"),
        *(([good, good | {"turns": turns}], "number 2 is no conversation") for turns in bad_turns),
        (b" " * (20 * 2**20 + 1), "larger than 20 MiB"),
        ([good, good | {"id": "large", "turns": [turn("x" * 6_000_000)]}], "no room"),
    ):
        said = import_file(page, content)
        assert said.startswith("Nothing was imported.") and why in said, said
        assert stored_chats(page) == before, why
    # Fields that are not known, and an id that is none, are left behind.
    odd = good | {"id": "../x", "html": "<b>", "turns": [turn("a", state="running", error={}, more=1)]}
    assert import_file(page, odd) == "1 imported."
    [(key, kept)] = [each for each in stored_chats(page) if each not in before]
    assert re.fullmatch(r"sleb\.chat\.[a-z0-9]+", key) and "html" not in kept
    [answer] = kept["turns"][0]["answers"]
    assert (answer["state"], answer["error"], "more" in answer) == ("stopped", None, False)


def test_the_api_description_is_linked_with_keys_and_without(server, serve_engine, fake_engine, open_page):
    page = open_page(server.url)
    page.locator("#tier-a .name").wait_for()
    page.expected = {404}  # /favicon.ico
    page.click("#docs-link")
    page.locator("h2:has-text('Endpoints')").wait_for()
    guarded = serve_engine(fake_engine, api_keys=("secret",))
    page = open_page(guarded.url)
    page.expected = {401}
    page.locator("#key-dialog").wait_for()
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    page.locator("#tier-a .name:has-text('fake')").wait_for()
    page.expected = {401, 404}
    page.click("#docs-link")
    page.locator("h2:has-text('Endpoints')").wait_for()


def test_answer_again_and_edit_replace_the_last_turn(server, open_page):
    page = open_page(server.url)
    send(page, "first")
    wait_done(page)
    send(page, "second")
    wait_done(page)
    page.get_by_label("Answer again").click()
    wait_done(page)
    assert page.locator(".turn").count() == 2
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.post_data else None)
    page.locator(".question").nth(1).get_by_label("Edit the message").click()
    page.locator(".editor textarea").fill("third")
    page.keyboard.press("Enter")
    page.locator(".bubble:has-text('third')").wait_for()
    wait_done(page)
    assert page.locator(".bubble").all_inner_texts() == ["first", "third"]
    [body] = bodies
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]


def test_key_is_asked_for_and_kept_for_the_tab(serve_engine, fake_engine, open_page):
    server = serve_engine(fake_engine, api_keys=("secret",))
    page = open_page(server.url)
    page.expected = {401}
    dialog = page.locator("#key-dialog")
    dialog.wait_for()
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    wait_for(page, "document.getElementById('key').value === 'wrong'")  # asked again
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    page.locator("#tier-a .name:has-text('fake')").wait_for()
    page.fill("#text", "echo")
    page.keyboard.press("Enter")
    page.locator(".stats:has-text('tokens')").wait_for()
    assert answers(page) == ["echo"]
    page.reload()
    page.locator("#tier-a .name:has-text('fake')").wait_for()
    assert not dialog.is_visible()
    assert page.evaluate("localStorage['sleb.key'] ?? null") is None
    page.evaluate("sessionStorage['sleb.key'] = 'wrong again'")
    page.fill("#text", "once more")
    page.keyboard.press("Enter")
    dialog.wait_for()
    page.fill("#key", "secret")
    page.check("#keep-key")
    page.keyboard.press("Enter")
    wait_for(page, "document.querySelectorAll('.answer')[1]?.innerText.includes('once more')")
    assert page.evaluate("localStorage['sleb.key']") == "secret"
    assert page.evaluate("sessionStorage['sleb.key'] ?? null") is None


def test_errors_are_shown_and_can_be_tried_again(server, open_page):
    page = open_page(server.url, settings={"top_p": "5"})
    page.expected = {400}
    page.locator("#tier-a .name").wait_for()
    page.fill("#text", "hello")
    page.keyboard.press("Enter")
    error = page.locator(".answer .notice.error")
    error.wait_for()
    assert "top_p" in error.inner_text()
    page.click("#open-settings")
    page.fill("[data-setting=top_p]", "0.5")
    error.get_by_role("button").click()
    page.locator(".stats:has-text('tokens/s')").wait_for()
    assert error.count() == 0
    page.click("#reset")
    assert page.input_value("[data-setting=top_p]") == ""


def test_a_server_that_is_gone_is_told(server, open_page):
    page = open_page(server.url)
    page.locator("#tier-a .name").wait_for()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.fill("#text", "hello")
    page.keyboard.press("Enter")
    page.locator(".notice.error:has-text('cannot be reached')").wait_for()
    page.problems.clear()


def test_what_a_model_writes_cannot_do_harm(server, open_page):
    hostile = (
        "<script>window.harm = 1</script><img src=x onerror='window.harm = 2'>\n\n"
        "[a](javascript:window.harm=3) [b](https://example.com/?q) ![pixel](https://example.com/p.png)\n\n"
        "<a href='javascript:1' onclick='window.harm=4'>c</a> <p style='position:fixed'>d</p>\n\n"
        "```js\nlet x = '<b>';\n```\n\n- [x] done\n\n| a |\n|:-:|\n| 1 |\n"
    )
    page = open_page(server.url)
    add_chat(page, turn(hostile, reasoning="<iframe src='https://example.com'></iframe>\n\n*why*"))
    answer = page.locator(".answer")
    answer.locator(".code").wait_for()
    assert page.evaluate("window.harm") is None
    assert answer.locator("script, img, iframe, [onclick], [onerror], [style]").count() == 0
    hrefs = answer.locator("a[href]").evaluate_all("links => links.map((a) => a.getAttribute('href'))")
    assert hrefs == ["https://example.com/?q", "https://example.com/p.png"]
    assert answer.locator("a[href^=http]").first.get_attribute("rel") == "noopener noreferrer"
    assert answer.locator(".code code").inner_text().strip() == "let x = '<b>';"
    assert answer.locator("input[type=checkbox]:disabled:checked").count() == 1
    assert answer.locator("td[align=center]").inner_text() == "1"
    assert answer.locator(".reasoning em").text_content() == "why"


HOSTILE = {
    "lines of quotes": "> a\n" * 2000,
    "signs of quotes": ">" * 2000,
    "quotes": "> " * 2000 + "x",
    "lists in a line": "- " * 2000 + "x",
    "numbered lists in a line": "1. " * 2000 + "x",
    "lists that deepen": "\n".join("  " * depth + "- a" for depth in range(1000)),
    "lists that deepen a little": "\n".join("  " * depth + "- a" for depth in range(200)),
    "rules": "- " * 50_000 + "x",
    "emphasis": "*a" * 20_000,
    "underscores": "_a" * 20_000,
    "links": "[a](b)" * 20_000,
    "half links": "[a](" * 20_000,
    "brackets": "[" * 50_000,
    "backticks": "a".join("`" * number for number in range(1, 600)),
    "fences": "```\n" * 100_000,
    "blocks of code": "```\na\n```\n" * 8_000,
    "a wide table": "|" + "a|" * 1000 + "\n|" + "-|" * 1000 + "\n" + ("|" + "a|" * 1000 + "\n") * 100,
    "a tall table": "|a|\n|-|\n" + "|a|\n" * 50_000,
    "an address": "a." * 50_000 + "@",
    "a long link": "https://a.b/" + "a" * 1_000_000,
    "a shorter link": "https://a.b/" + "a" * 190_000,
    "one line": "a" * 1_000_000,
    "a shorter line": "a" * 190_000,
    "words": "word " * 200_000,
    "lines": "a\n" * 500_000,
    "paragraphs": "a\n\n" * 60_000,
    "a long block of code": "```\n" + "a\n" * 90_000,
    "tags": "<a " * 50_000,
    # As much as is shown as Markdown.
    "many links": "[a](b) " * 4_900,
    "many items": "- a\n" * 2_400,
    "many blocks of code": "```\na\n```\n" * 800,
    "many cells": "|" + "a|" * 45 + "\n|" + "-|" * 45 + "\n" + ("|" + "a|" * 45 + "\n") * 50,
    "many lines": "```\n" + "a\n" * 4_900,
}
# How long the page did nothing else: the longest time between two turns of its event loop.
HEARTBEAT = """
window.longest = 0;
let last = performance.now();
setInterval(() => {
  const now = performance.now();
  window.longest = Math.max(window.longest, now - last);
  last = now;
}, 5);
"""


def test_no_text_holds_the_page(server, open_page):
    page = open_page(server.url)
    page.context.add_init_script(HEARTBEAT)
    for name, text in HOSTILE.items():
        add_chat(page, turn(text, reasoning=text) | {"text": text})
        answer = page.locator(".answer > .markdown")
        answer.locator(":scope > :not(.plain), :scope > .too-much").first.wait_for()
        # Below a second where little else runs; the browser shares the processors with the server and the test.
        assert page.evaluate("window.longest") < 3000, name
        if name.startswith("many"):
            assert answer.locator(".plain").count() == 0, name
        elif answer.locator(".plain").count():  # whole, but for what is not in sight
            assert answer.evaluate("(each) => each.textContent") == text, name
    page.locator("#chats li").first.hover()
    page.get_by_label("Delete: Made").click()
    assert page.locator(".turn").count() == 0


def test_a_stream_that_turns_hostile_is_shown_as_it_is(server, open_page):
    text = "Some *words*.\n\n" + ">" * 2000
    events = [
        {"choices": [{"index": 0, "delta": {"content": text[i : i + 10]}}]} for i in range(0, len(text), 10)
    ]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page = open_page(server.url)
    page.locator("#tier-a .name").wait_for()
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body),
    )
    page.fill("#text", "go on")
    page.keyboard.press("Enter")
    page.locator(".answer .too-much").wait_for()
    wait_done(page)
    assert page.locator(".answer > .markdown").evaluate("(each) => each.textContent") == text
    page.unroute("**/v1/chat/completions")
    page.locator("#sidebar .new-chat").click()
    send(page)  # the page lives, and another answer is Markdown
    wait_done(page)
    page.locator(".answer .markdown > p").wait_for()


def test_without_a_worker_texts_are_shown_as_they_are(server, open_page):
    page = open_page(server.url)
    page.expected = {404}
    page.route("**/markdown-worker.js", lambda route: route.fulfill(status=404))
    add_chat(page, turn("*a*"), turn("*b*"))
    page.locator(".answer .too-much").nth(1).wait_for()
    assert answers(page) == ["*a*", "*b*"]


@pytest.mark.parametrize(
    "stored", ["{", "[]", '{"turns": [{}]}', '{"turns": [{"text": "a", "answers": [{"content": 1}]}]}']
)
def test_a_conversation_that_cannot_be_shown_can_be_deleted(server, open_page, stored):
    page = open_page(server.url)
    page.locator("#tier-a .name").wait_for()
    page.evaluate(
        "(text) => { localStorage['sleb.chat.bad'] = text; sessionStorage['sleb.current'] = 'bad'; }", stored
    )
    page.reload()
    page.locator("#tier-a .name").wait_for()
    assert page.locator("#chats .chat-title").all_inner_texts() == ["Cannot be shown"]
    page.locator("#chats li").hover()
    with page.expect_download() as download:
        page.get_by_label("Export: Cannot be shown").click()
    assert download.value.path().read_text() == stored
    page.locator("#chats li").hover()
    page.get_by_label("Delete: Cannot be shown").click()
    assert page.evaluate("localStorage['sleb.chat.bad'] ?? null") is None
    page.click("text=Undo")
    assert page.evaluate("localStorage['sleb.chat.bad']") == stored
    send(page)
    wait_done(page)
    page.locator(".stats:has-text('tokens')").wait_for()


def test_reasoning_streams_into_its_own_part(server, open_page):
    deltas = [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Let me "},
        {"reasoning_content": "think."},
        {"content": "The answer."},
    ]
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    body = "".join(f"data: {json.dumps(event)}\r\n\r\n" for event in events) + "data: [DONE]\r\n\r\n"
    page = open_page(server.url)
    page.locator("#tier-a .name").wait_for()
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=": hi\r\n\r\n" + body),
    )
    page.fill("#text", "why?")
    page.keyboard.press("Enter")
    page.locator(".answer:has-text('The answer.')").wait_for()
    reasoning = page.locator("details.reasoning")
    assert not reasoning.get_attribute("open")
    reasoning.locator("summary").click()
    assert reasoning.locator(".markdown").inner_text() == "Let me think."


def test_live_panel(server, open_page):
    page = open_page(server.url)
    page.expected = {404}
    counts = [0]

    def metrics(route):
        counts[0] += 1
        route.fulfill(status=200, content_type="text/plain", body=METRICS % (100 * counts[0], 10 * counts[0]))

    page.route("**/metrics", lambda route: route.fulfill(status=404, json={"error": {"message": "no"}}))
    page.click("#open-live")
    page.locator("#live-note:has-text('no /metrics')").wait_for()
    assert not page.locator("#live-values").is_visible()
    page.route("**/metrics", metrics)
    wait_for(page, "document.getElementById('live-prompt').textContent > 0")
    assert not page.locator("#live-note").is_visible()
    assert page.inner_text("#live-running") == "3"
    assert page.inner_text("#live-waiting") == "5"
    assert page.inner_text("#live-kv") == "25.0 %"
    prompt, generation = (float(page.inner_text(f"#live-{name}")) for name in ("prompt", "generation"))
    assert prompt == pytest.approx(10 * generation, rel=0.05)
    assert page.locator(".chart canvas").count() == 2
    page.click("#open-live")
    seen = counts[0]
    page.wait_for_timeout(2500)
    assert counts[0] <= seen + 1


def test_conversations_are_renamed_deleted_restored_and_exported(server, open_page):
    page = open_page(server.url)
    send(page, "first")
    wait_done(page)
    page.locator("#sidebar .new-chat").click()
    send(page, "second")
    wait_done(page)
    titles = page.locator("#chats .chat-title")
    assert titles.all_inner_texts() == ["second", "first"]
    page.locator("#chats li").nth(1).hover()
    page.get_by_label("Rename: first").click()
    page.keyboard.type("renamed")
    page.keyboard.press("Enter")
    assert titles.all_inner_texts() == ["second", "renamed"]
    page.locator("#chats li").nth(1).hover()
    with page.expect_download() as download:
        page.get_by_label("Export: renamed").click()
    exported = json.loads(download.value.path().read_text())
    assert exported["title"] == "renamed"
    assert exported["turns"][0]["answers"][0]["content"]
    page.locator("#chats li").nth(0).hover()
    page.get_by_label("Delete: second").click()
    assert titles.all_inner_texts() == ["renamed"]
    assert page.locator(".turn").count() == 0
    page.click("text=Undo")
    assert titles.all_inner_texts() == ["second", "renamed"]
    titles.nth(1).click()
    assert page.locator(".bubble").all_inner_texts() == ["first"]


def test_theme_is_kept(server, open_page):
    page = open_page(server.url)
    page.emulate_media(color_scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.click("#theme")
    light = page.evaluate(colour)
    assert dark != light
    page.reload()
    assert page.evaluate(colour) == light


@pytest.mark.parametrize("width", [360, 390])
def test_nothing_is_wider_than_a_phone(server, open_page, width):
    page = open_page(server.url, width=width, height=740)
    page.locator("#tier-a .name").wait_for()
    page.click("#compare")
    send(page, "a" * 300)
    wait_done(page)
    sideways = """() => [...document.querySelectorAll("body *")].filter((each) =>
        !each.closest(".off-screen, .code, svg") && each.getBoundingClientRect().right > innerWidth + 1
    ).map((each) => each.outerHTML.slice(0, 80))"""
    assert page.evaluate(sideways) == []
    for button, part in (("menu", "sidebar"), ("open-settings", "settings"), ("open-live", "live")):
        page.click(f"#{button}")
        page.locator(f"#{part}").wait_for()
        assert page.evaluate(sideways) == []
        page.keyboard.press("Escape")
        page.locator(f"#{part}").wait_for(state="hidden")
        assert page.evaluate("document.activeElement.id") == button
    page.click("#tier-a")
    assert page.evaluate(sideways) == []
    page.keyboard.press("Escape")
    page.expected = {404}


def test_the_description_of_the_api_opens_where_a_link_leads_and_fits_a_phone(server, open_page):
    page = open_page(f"{server.url}/docs", width=390)
    page.expected = {404}  # /favicon.ico
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.append(page.evaluate("getComputedStyle(document.documentElement).color"))
    assert colours[0] != colours[1]
    page.locator("summary:has-text('/v1/chat/completions')").click()
    page.locator("a[href='#ChatBody']").click()
    page.locator("#ChatBody code:text-is('max_completion_tokens')").wait_for()  # shown, so opened
    for summary in page.locator("details:not([open]) > summary").all()[::-1]:
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    style = "getComputedStyle(document.querySelector('h2')).marginTop"
    assert page.evaluate(style) == "40px"  # its own style, which the policy names by its hash
