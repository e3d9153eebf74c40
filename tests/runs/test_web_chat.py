"""The web chat in a real browser, against scripted answers. By hand, for it takes a browser:

    apt-get install chromium && pip install playwright
    python -m pytest -m nightly tests/runs/test_web_chat.py        # SHOTS=DIR keeps screenshots

CHROMIUM names another browser of Chromium's kind."""

import importlib
import json
import os
import re
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import fake_chat_server as fake
import pytest
from conftest import ROOT

from lumen.conversations import Reader

pytestmark = pytest.mark.nightly
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SHOTS = os.environ.get("SHOTS")
TEMPERATURE = 'input[type=range][aria-label="Temperature"]'


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs a browser: pip install playwright"
    )
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("needs a browser: apt-get install chromium, or CHROMIUM=PATH")
    with playwright.sync_playwright() as p:
        # without a sandbox of its own, for in containers tests run as root
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server():
    with fake.serving() as server:
        yield server


@pytest.fixture
def context(browser):
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    context.set_default_timeout(20_000)
    yield context
    context.close()


@pytest.fixture
def page(context, server):
    with opened(context, server) as page:
        yield page


@contextmanager
def opened(context, server):
    """A page of the chat. Afterwards: it threw nothing, broke no rule of its policy and asked no
    other host."""
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(f"threw {error}"))
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(server.url)
    until(page, "model.id || failure || document.querySelector('#key').open")
    yield page
    wrong = [text for text in said if not text.startswith("Failed to load resource")]
    assert not wrong
    foreign = [url for url in asked if urlsplit(url).scheme not in ("data", "blob")]
    assert {urlsplit(url).netloc for url in foreign} == {urlsplit(server.url).netloc}


def shot(page, name: str):
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{SHOTS}/{name}.png")


def say(page, text: str):
    page.fill("#text", text)
    page.press("#text", "Enter")


def until(page, expression: str, meanwhile=lambda: None):
    """page.wait_for_function() would have the page evaluate text, which its policy forbids."""
    end = time.monotonic() + 20
    while not page.evaluate(expression):
        meanwhile()
        assert time.monotonic() < end, (expression, page.locator(".failure").all_inner_texts())
        page.wait_for_timeout(20)


def over(page):
    """Waits for the end of the reply, or of the attempt."""
    until(page, "!running && !document.body.hasAttribute('data-busy')")


def replies(page) -> list[str]:
    texts = page.locator("article.assistant .body").all_inner_texts()
    return [text.strip() for text in texts]


def contents(page) -> list[tuple[str, str]]:
    """The conversation as the page keeps it."""
    kept = json.loads(page.evaluate("localStorage.getItem('lumen.chat')"))
    return [(message["role"], message["content"]) for message in kept["messages"]]


# ---------------------------------------------------------------- talking


def test_a_conversation(page, server):
    server.answer = fake.says("Good ", "day", ", **you**.")
    say(page, "Hello <b>there</b>")
    over(page)
    assert replies(page) == ["Good day, you."]
    assert page.locator("article.assistant strong").inner_text() == "you"
    assert page.locator("article.user .body").inner_text() == "Hello <b>there</b>"
    assert re.match(r"3 tokens · .*first after \d+\.\d\d s", page.inner_text(".assistant .info"))
    assert page.inner_text("#room") == "13 of 2048 tokens"

    path, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "out/chat",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.8,
        "top_p": 1,
        "top_k": 50,
        "min_p": 0,
        "repetition_penalty": 1,
        "messages": [{"role": "user", "content": "Hello <b>there</b>"}],
    }
    say(page, "Again")
    over(page)
    assert [m["role"] for m in server.asked[1][1]["messages"]] == ["user", "assistant", "user"]
    assert server.asked[1][1]["messages"][1]["content"] == "Good day, **you**."


def test_a_reply_appears_as_it_is_written_and_keeps_what_is_drawn(page, server):
    gate = threading.Semaphore(0)
    server.answer = fake.says("First paragraph.\n\nSec", "ond", ".", gate=gate)
    say(page, "Go")
    gate.release()
    page.wait_for_selector("text=Sec")
    page.evaluate("window.drawn = document.querySelector('article.assistant p')")
    assert page.locator("#stop").is_visible() and not page.locator("#send").is_visible()
    assert page.get_attribute("#chat", "aria-busy") == "true"
    gate.release()
    page.wait_for_selector("text=Second")
    gate.release()
    over(page)
    assert replies(page) == ["First paragraph.\n\nSecond."]
    # the first paragraph's node is the one that was there: what a reader selects stays selected
    assert page.evaluate("drawn === document.querySelector('article.assistant p')")
    assert page.get_attribute("#chat", "aria-busy") == "false"


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_a_reply_can_be_stopped_and_the_server_notices(page, server, way):
    gate = threading.Semaphore(0)
    server.answer = fake.says(*["word "] * 500, gate=gate)
    say(page, "Go")
    gate.release()
    page.wait_for_selector("article.assistant >> text=word")
    page.keyboard.press("Escape") if way == "Escape" else page.click("#stop")
    over(page)
    for _ in range(400):  # the server goes on writing, into a connection that closes soon
        gate.release()
        if server.gone.wait(0.05):
            break
    assert server.gone.is_set()
    assert replies(page) == ["word"]
    assert "stopped" in page.inner_text(".assistant .info")
    assert not page.locator(".failure").count()
    server.answer = fake.says("Fine.")
    say(page, "Go on")
    over(page)
    assert [m["content"] for m in server.asked[1][1]["messages"]] == ["Go", "word ", "Go on"]


def test_stopped_before_the_first_word_leaves_no_reply_and_one_question(page, server):
    server.answer = fake.says("late", gate=threading.Semaphore(0))
    say(page, "One")
    page.wait_for_selector("#stop")
    page.keyboard.press("Escape")
    over(page)
    assert contents(page) == [("user", "One")]
    server.answer = fake.says("", "")  # a model may have nothing to say
    say(page, "Two")
    over(page)
    assert "empty reply" in page.inner_text(".assistant .info")
    server.answer = fake.says("Three.")
    say(page, "Three")
    over(page)
    # roles take turns, as templates want it
    assert server.asked[2][1]["messages"] == [{"role": "user", "content": "One\n\nTwo\n\nThree"}]


def test_regenerate_asks_again_without_the_old_reply(page, server):
    for reply in ("One.", "Two."):
        server.answer = fake.says(reply)
        say(page, "Say") if reply == "One." else page.click("text=Regenerate")
        over(page)
    assert replies(page) == ["Two."]
    assert server.asked[1][1]["messages"] == server.asked[0][1]["messages"]
    assert page.evaluate("document.activeElement.id") == "text"


def test_edit_replaces_the_message_and_what_came_after_it(page, server):
    for word in ("one", "two", "three"):
        say(page, word)
        over(page)
    page.locator("text=Edit").nth(1).click()
    assert page.input_value("#text") == "two"
    page.keyboard.press("Escape")  # keeps it
    assert page.input_value("#text") == "" and len(contents(page)) == 6
    page.locator("text=Edit").nth(1).click()
    say(page, "zwei")
    over(page)
    sent = [m["content"] for m in server.asked[-1][1]["messages"]]
    assert sent == ["one", "Good day.", "zwei"]
    assert len(contents(page)) == 4


def test_the_settings_are_sent_and_kept(page, server):
    server.model["defaults"] = {"temperature": 0.5, "top_k": 40, "seed": "none of our types"}
    page.reload()
    page.click("#tune")
    until(page, f"document.querySelector('{TEMPERATURE}').value === '0.5'")
    page.fill("#system", "Be brief.")
    page.fill(TEMPERATURE, "1.2")
    page.fill('input[type=number][aria-label="Seed"]', "7")
    page.fill('input[type=number][aria-label="Most tokens"]', "99")
    shot(page, "settings")
    page.reload()
    say(page, "Hello")
    over(page)
    body = server.asked[0][1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    chosen = {name: body[name] for name in ("temperature", "top_k", "seed", "max_tokens")}
    assert chosen == {"temperature": 1.2, "top_k": 40, "seed": 7, "max_tokens": 99}

    page.click("#tune")
    assert page.input_value('input[type=number][aria-label="Temperature"]') == "1.2"
    page.fill('input[type=number][aria-label="Seed"]', "")
    page.click("#reset")
    say(page, "Hello")
    over(page)
    body = server.asked[1][1]
    assert body["temperature"] == 0.5 and "max_tokens" not in body and "seed" not in body


@pytest.mark.parametrize("words", [{"conversations": False}, {"template": None}])
def test_a_model_without_conversations_goes_on_with_a_text(page, server, tmp_path, words):
    server.model |= words
    page.reload()
    page.wait_for_selector("text=goes on with your text")
    server.answer = fake.says(" upon", " a time")
    say(page, "Once")
    over(page)
    say(page, ", there")
    over(page)
    path, body = server.asked[1]
    assert path == "/v1/completions" and "messages" not in body
    assert body["prompt"] == "Once upon a time, there"
    assert exported(page, tmp_path) == {"text": "Once upon a time, there upon a time"}


# ---------------------------------------------------------------- what is kept


def exported(page, folder) -> dict:
    with page.expect_download() as download:
        page.click("#export")
    assert download.value.suggested_filename == "chat.jsonl"
    download.value.save_as(folder / "chat.jsonl")
    line, rest = (folder / "chat.jsonl").read_text(encoding="utf-8").split("\n")
    assert rest == ""
    return json.loads(line)


def test_a_reload_keeps_the_conversation_and_the_draft(page, server):
    say(page, "Hello")
    over(page)
    page.fill("#text", "half a thou")
    page.reload()
    assert replies(page) == ["Good day."]
    assert page.input_value("#text") == "half a thou"
    page.click("#clear")
    page.reload()
    assert not page.locator("article").count()


def test_a_reload_in_the_middle_keeps_what_had_come(page, server):
    gate = threading.Semaphore(0)
    server.answer = fake.says("Some ", "more", gate=gate)
    say(page, "Go")
    gate.release()
    page.wait_for_selector("article.assistant >> text=Some")
    page.reload()
    assert contents(page) == [("user", "Go"), ("assistant", "Some ")]
    assert replies(page) == ["Some"]


GARBAGE = [
    "",
    "{",
    "null",
    "7",
    "[]",
    '{"messages": 7}',
    '{"messages": [null, 7, {}, {"role": "user"}, {"role": "system", "content": "x"}]}',
    '{"messages": [{"role": "user", "content": {"a": 1}}, {"role": "x y", "content": "x"}]}',
    '{"sampling": {"temperature": "hot", "x": 1}, "theme": 7, "system": null}',
    '{"sampling": 7, "messages": [{"role": "assistant", "content": "x", "info": "<b>"}]}',
    '{"messages": [{"role": "assistant", "content": "x", "info": null}]}',
    '{"messages": [{"role": "user", "content": "x", "info": {"tokens": {}, "usage": 7}}]}',
]


@pytest.mark.parametrize("text", GARBAGE)
def test_garbage_in_the_storage_is_no_obstacle(context, server, text):
    context.add_init_script(f"localStorage.setItem('lumen.chat', {json.dumps(text)})")
    with opened(context, server) as page:
        say(page, "Hello")
        over(page)
        assert replies(page)[-1] == "Good day."
        assert server.asked[0][1]["temperature"] == 0.8


def test_two_tabs_show_one_conversation(context, server):
    with opened(context, server) as one, opened(context, server) as two:
        say(one, "Hello")
        over(one)
        until(two, "document.querySelectorAll('article').length === 2")
        say(two, "Again")
        over(two)
        until(one, "document.querySelectorAll('article').length === 4")
        one.close()  # a tab that is closed does not bring back what it had
        assert len(contents(two)) == 4


def test_the_export_is_a_row_that_prepare_data_reads(page, server, tmp_path):
    page.click("#tune")
    page.fill("#system", "Be\nbrief.")
    server.answer = fake.says('A "quoted"\nreply \u2028 \U0001f600')
    say(page, "Hello \u00e9")
    over(page)
    server.answer = fake.refuses(500, "oops")
    say(page, "Without a reply")
    over(page)
    row = exported(page, tmp_path)
    messages = Reader(strict=True).messages(row)
    assert [(m.role, m.content) for m in messages] == [
        ("system", "Be\nbrief."),
        ("user", "Hello \u00e9"),
        ("assistant", 'A "quoted"\nreply \u2028 \U0001f600'),
    ]


# ---------------------------------------------------------------- hostile replies

HOSTILE = [
    "<img src=x onerror='hit = 1'><script>hit = 1</script><svg onload='hit = 1'>",
    "<iframe srcdoc='<script>parent.hit = 1</script>'></iframe><style>body{display:none}</style>",
    "[click](javascript:hit=1) <a href='javascript:hit=1'>x</a> ![x](https://evil.example/x.png)",
    "[click](https://evil.example) <https://evil.example> data:text/html,<script>hit=1</script>",
    "**<img src=x onerror=hit=1>** `<script>hit=1</script>` *<b onclick=hit=1>x</b>*",
    "# <img src=x onerror=hit=1>\n- <script>hit=1</script>\n  - <svg/onload=hit=1>\n1. <b>x",
    "```html\"><script>hit=1</script>\n<script>hit=1</script>\n```\n```x' onclick='hit=1\n</pre>",
    "</textarea></article></main><form action=https://evil.example><input name=x></form>",
    "&lt;script&gt;hit=1&lt;/script&gt; &#x3c;b&#x3e; ${hit=1} {{hit=1}} \\u003cscript\\u003e",
    "<!-- <script>hit=1</script> --> <![CDATA[<x>]]> <?php hit=1 ?> <base href=//evil.example>",
    "data: [DONE]\n\ndata: {}\n\nevent: x",
    "__proto__ constructor toString **__proto__**\n```__proto__\nx\n```",
]
ALLOWED = {"P", "STRONG", "EM", "CODE", "PRE", "UL", "OL", "LI", "H3", "H4", "H5", "H6"}
ALLOWED |= {"DIV", "SPAN", "BUTTON"}  # of a block of code


def check_harmless(page):
    body = "document.querySelectorAll('article.assistant .body *')"
    assert set(page.evaluate(f"[...{body}].map(n => n.tagName)")) <= ALLOWED
    names = page.evaluate(f"[...{body}].flatMap(n => n.getAttributeNames())")
    assert set(names) <= {"dir", "class", "type", "tabindex", "value"}
    assert page.evaluate("[typeof hit, window.hit, document.forms.length]")[0] == "undefined"
    assert page.evaluate("document.querySelectorAll('img, iframe, a, base').length") == 0
    assert page.locator("#send").is_visible()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_reply_is_text_whatever_is_in_it(page, server, text):
    # in small pieces: what is half written is shown too
    server.answer = fake.says(*(text[i : i + 7] for i in range(0, len(text), 7)))
    say(page, text)
    over(page)
    check_harmless(page)
    page.wait_for_timeout(100)  # for what would load or run later
    check_harmless(page)
    shown = re.sub(r"\W", "", page.inner_text("article.assistant .body"))
    assert "hit" not in text or "hit" in shown  # nothing was swallowed as a tag
    assert page.inner_text("article.user .body") == text.strip()
    assert contents(page)[1] == ("assistant", text)
    page.reload()  # and from the storage
    check_harmless(page)


def test_all_hostile_replies_at_once(page, server):
    server.answer = fake.says("\n\n".join(HOSTILE))
    say(page, "Attack")
    over(page)
    check_harmless(page)
    shot(page, "hostile")


def test_hostile_names_and_errors_are_text(page, server):
    server.model["id"] = HOSTILE[0]
    page.reload()
    page.wait_for_selector("b >> text=onerror")
    server.answer = fake.refuses(400, HOSTILE[0], code=HOSTILE[1])
    say(page, "Hello")
    over(page)
    assert HOSTILE[0] in page.inner_text(".failure")
    check_harmless(page)
    server.answer = fake.sends_a_proxy_page
    page.click("text=Try again")
    over(page)
    assert "Bad gateway" in page.inner_text(".failure")
    check_harmless(page)


def test_the_policy_holds_even_if_the_page_did_not(context, server):
    """What a fault of the page could do is tried on purpose, inside the page."""
    page = context.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(server.url)
    attempts = {
        "document.body.innerHTML = '<img src=x onerror=hit=1>'": "TrustedHTML",
        "eval('hit = 1')": "unsafe-eval|TrustedScript|Trusted Type",
        "setTimeout('hit = 1')": "TrustedScript|Trusted Type",
        "document.body.setAttribute('onclick', 'hit = 1')": "TrustedScript|Trusted Type",
        "fetch('http://127.0.0.1:9/').catch(e => { throw e })": "Failed to fetch|Refused|violates",
    }
    for code, reason in attempts.items():
        said.clear()
        # after a pause, for the first turn of what a test evaluates is free of the policy
        outcome = page.evaluate(f"""async () => {{
            await new Promise(later => setTimeout(later, 1));
            try {{ await ({code}); return "ran" }} catch (error) {{ return String(error) }}
        }}""")
        assert re.search(reason, outcome + " ".join(said)), (code, outcome, said)
    page.evaluate("document.body.append(Object.assign(document.createElement('img'), {src: '/x'}))")
    page.wait_for_timeout(200)
    assert any("img-src" in text for text in said)
    assert page.evaluate("typeof hit") == "undefined"


def test_control_characters_are_shown_and_neither_colour_nor_reverse(page, server):
    text = "\x1b[31mred\x1b[0m \x00\x07\x08 a\u202egpj.exe\u202c b\u2066c\u2069 \U000e0041 \x9b31m"
    server.answer = fake.says(text + "\r\nnext\rline")
    say(page, text)
    over(page)
    wanted = "␛[31mred␛[0m ␀␇␈ a⟨U+202E⟩gpj.exe⟨U+202C⟩ b⟨U+2066⟩c⟨U+2069⟩ ⟨U+E0041⟩ ⟨U+009B⟩31m"
    assert page.inner_text("article.user .body") == wanted
    assert replies(page) == [wanted + "\nnext\nline"]
    assert contents(page)[1][1] == text + "\r\nnext\rline"  # kept as it came
    # languages from right to left are no attack, and turn no more than their own paragraph
    server.answer = fake.says("שלום עולם\n\nHello")
    page.click("text=Regenerate")
    over(page)
    ways = "[...document.querySelectorAll('.assistant p')].map(p => getComputedStyle(p).direction)"
    assert page.evaluate(ways) == ["rtl", "ltr"]


LONG = {
    "a line of 1 MB": "x" * 1_000_000,
    "1 MB of words": "word " * 200_000,
    "brackets": "[" * 1_000_000,
    "backquotes and stars": "`a **b *c " * 50_000,
    "fences": "```\n" * 20_000,
    "items, each deeper": "\n".join(" " * i + "- x" for i in range(700)),
    "headings": "# x\n" * 20_000,
    "spaces": " " * 500_000 + "x",
    "an open block": "```py\n" + "print(1)\n" * 50_000,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_long_reply_leaves_the_page_alive(page, server, text):
    server.answer = fake.says(*(text[i : i + 50_000] for i in range(0, len(text), 50_000)))
    say(page, "Go")
    over(page)
    assert contents(page)[1] == ("assistant", text)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    server.answer = fake.says("Fine.")
    say(page, "Alive?")
    over(page)
    assert replies(page)[-1] == "Fine."
    check_harmless(page)


def test_a_conversation_larger_than_the_storage_says_so(page, server):
    server.answer = fake.says("x" * 6_000_000)
    say(page, "Go")
    over(page)
    assert "export it" in page.inner_text("#keys")
    assert len(replies(page)[0]) == 6_000_000


# ---------------------------------------------------------------- errors


def test_the_key_is_asked_for_and_kept_in_this_tab_only(context, server):
    server.key = "sesam-öffne"
    server.key = server.key.encode().decode("latin-1")  # as http.server reads a header
    with opened(context, server) as page:
        page.fill("#secret", "wrong")
        shot(page, "key")
        page.press("#secret", "Enter")
        page.wait_for_selector("text=did not accept this key")
        page.fill("#secret", " sesam-öffne ")
        page.click("text=Use it")
        until(page, "model.id === 'out/chat'")
        say(page, "Hello")
        over(page)
        assert replies(page) == ["Good day."]
        assert "sesam" not in page.evaluate("JSON.stringify({...localStorage})")
        assert "sesam" in page.evaluate("JSON.stringify({...sessionStorage})")
        assert "sesam" not in page.url
        page.reload()
        until(page, "model.id === 'out/chat'")
    with opened(context, server) as page:  # another tab has to ask
        assert page.locator("#key").is_visible()
        page.keyboard.press("Escape")
        page.wait_for_selector("text=The server needs its API key")
        page.click("text=Try again")
        page.wait_for_selector("#key[open]")
        page.fill("#secret", "sesam-öffne")
        page.press("#secret", "Enter")
        until(page, "model.id === 'out/chat'")


def test_a_key_that_is_asked_for_in_the_middle_of_a_chat(page, server):
    server.key = "k"
    say(page, "Hello")
    page.fill("#secret", "k")
    page.press("#secret", "Enter")
    over(page)
    assert replies(page) == ["Good day."]


def test_a_full_server_names_the_time_to_wait_and_the_button_counts_down(page, server):
    server.answer = fake.refuses(503, "16 requests wait already", "E503", **{"Retry-After": "2"})
    say(page, "Hello")
    page.wait_for_selector("text=Try again in 2 s")
    shot(page, "busy")
    assert page.locator(".failure button").is_disabled()
    assert "16 requests wait already" in page.inner_text(".failure[role=alert]")
    server.answer = fake.says("Now.")
    page.click("button:text-is('Try again')")
    over(page)
    assert replies(page) == ["Now."] and not page.locator(".failure").count()
    assert [m["content"] for m in server.asked[1][1]["messages"]] == ["Hello"]


@pytest.mark.parametrize("wait", ["Wed, 21 Oct 2026 07:28:00 GMT", "-5", "1e99", "x", ""])
def test_a_strange_retry_after_is_no_trap(page, server, wait):
    server.answer = fake.refuses(503, "full", "E503", **{"Retry-After": wait})
    say(page, "Hello")
    over(page)
    assert re.fullmatch(r"Try again( in (600|599) s)?", page.inner_text(".failure button"))


REFUSALS = {
    "context": (fake.refuses(400, "2100 tokens", "context_length_exceeded"), "no longer fits"),
    "bad request": (fake.refuses(400, "temperature: 200 is out of range"), "200 is out of range"),
    "exception": (fake.refuses(500, "E505", None), "(500)"),
    "a proxy": (fake.sends_a_proxy_page, "(502)"),
    "broken off": (fake.breaks_off, "connection ended before the reply did"),
    "killed": (fake.dies_midway, "network error"),
    "an error in the stream": (fake.fails_midway, "took longer than 60 s"),
    "no JSON": (fake.sends_no_json, "<b>oops</b>"),
    "no stream": (lambda handler: handler.json(200, {}), "connection ended"),
}


@pytest.mark.parametrize("answer, words", REFUSALS.values(), ids=REFUSALS)
def test_errors_say_what_happened_and_nothing_is_lost(page, server, answer, words):
    server.answer = answer
    say(page, "Hello")
    over(page)
    assert words in page.inner_text(".failure")
    kept = contents(page)
    assert kept[0] == ("user", "Hello")
    assert kept[1:] in ([], [("assistant", "Half a")])
    shot(page, words.strip("()<>b/").replace(" ", "_"))
    server.answer = fake.says("Now.")
    page.click("text=Try again")
    over(page)
    assert replies(page) == ["Now."] and not page.locator(".failure").count()


def test_a_server_that_has_gone_is_named_and_its_return_is_enough(context):
    with fake.serving() as server:
        port = server.server_address[1]
        page = context.new_page()
        page.goto(server.url)
        say(page, "Hello")
        over(page)
    say(page, "Still there?")
    over(page)
    assert "Is serve.py still running?" in page.inner_text(".failure")
    with fake.serving(port):
        page.click("text=Try again")
        over(page)
        assert replies(page) == ["Good day.", "Good day."]


def test_a_server_that_was_started_anew_with_another_model(page, server):
    server.answer = fake.refuses(404, "'out/chat' is not served here", "model_not_found")
    say(page, "Hello")
    over(page)
    server.model["id"], server.answer = "out/other", fake.says("Now.")
    page.click("text=Try again")
    until(page, "kept.messages.length === 2 && !running")
    assert server.asked[1][1]["model"] == "out/other"
    assert replies(page) == ["Now."]


# ---------------------------------------------------------------- the real server


@pytest.fixture
def serving(monkeypatch):
    """tests/serving.py, which stands on a test of another folder."""
    for package in ("fastapi", "uvicorn", "httpx"):
        pytest.importorskip(package, reason="pip install -r requirements-serve.txt httpx")
    monkeypatch.syspath_prepend(ROOT / "tests" / "unit")
    return importlib.import_module("serving")


def choose(page, **options):
    page.click("#tune")
    for label, number in options.items():
        page.fill(f'input[type=number][aria-label="{label.replace("_", " ")}"]', str(number))
    page.click("#close")


def test_with_the_real_server(context, serving):
    with serving.live() as real, opened(context, real) as page:
        sent = real.http.get("/")
        assert sent.headers["content-security-policy"].startswith("default-src 'none'; script-src")
        choose(page, Seed=5, Most_tokens=20)
        say(page, "hi")
        over(page)
        options = {"seed": 5, "max_tokens": 20, "temperature": 0.8, "top_k": 50}
        wanted = real.ask(content="hi", **options).json()
        assert contents(page)[1] == ("assistant", wanted["choices"][0]["message"]["content"])
        assert wanted["usage"]["total_tokens"] > 20
        assert page.inner_text("#room") == f"{wanted['usage']['total_tokens']} of 160 tokens"

        say(page, "long " * 400)
        over(page)
        assert "no longer fits into the model's context of 160 tokens" in page.inner_text(
            ".failure"
        )
        real.hold()
        page.click("#clear")
        choose(page, Most_tokens=0)
        say(page, "again")
        until(page, "running && kept.messages.at(-1).content", lambda: real.go(1))
        page.keyboard.press("Escape")
        over(page)
        serving.wait(lambda: real.desk.gauges.ended["gone"] == 1)
        real.go()
        serving.wait(real.idle)


def test_with_the_real_server_and_a_key(context, serving):
    with serving.live(key="sesam") as real, opened(context, real) as page:
        page.fill("#secret", "wröng")
        page.press("#secret", "Enter")
        page.wait_for_selector("text=did not accept this key")
        page.fill("#secret", "sesam")
        page.press("#secret", "Enter")
        until(page, "model.id === 'tiny'")
        choose(page, Most_tokens=5)
        say(page, "hi")
        over(page)
        assert page.locator("article.assistant").count() == 1


# ---------------------------------------------------------------- hands, eyes, ears


def test_the_keyboard_alone_is_enough(page, server):
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    over(page)
    assert contents(page)[0] == ("user", "one\ntwo")
    page.keyboard.press("Enter")  # nothing to send
    page.keyboard.type("  ")
    page.keyboard.press("Enter")
    assert len(server.asked) == 1
    # Enter that ends a word of an input method sends nothing
    page.fill("#text", "にほん")
    enter = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true})"
    page.evaluate(f"document.querySelector('#text').dispatchEvent({enter})")
    assert len(server.asked) == 1 and page.input_value("#text") == "にほん"
    page.fill("#text", "")

    page.focus("#clear")
    reached = {}
    for _ in range(40):
        page.keyboard.press("Tab")
        where = "document.activeElement"
        name = page.evaluate(f"{where}.id || {where}.textContent")
        if name.strip() and not name.startswith("\n"):
            reached[name] = page.evaluate(f"getComputedStyle({where}).outlineStyle")
    wanted = {"clear", "export", "theme", "tune", "Copy", "Edit", "Regenerate", "text", "send"}
    assert wanted <= set(reached)
    assert {reached[name] for name in wanted - {"text"}} == {"solid"}  # focus can be seen


def test_enter_while_a_reply_is_written_keeps_the_draft(page, server):
    gate = threading.Semaphore(0)
    server.answer = fake.says("a", gate=gate)
    say(page, "Go")
    say(page, "next")
    assert page.input_value("#text") == "next" and len(contents(page)) == 1
    gate.release()
    over(page)
    assert page.input_value("#text") == "next"


def test_everything_that_can_be_pressed_has_a_name(page, server):
    server.answer = fake.says("```py\nx\n```")
    say(page, "Hello")
    over(page)
    page.click("#tune")
    nameless = page.evaluate("""[...document.querySelectorAll('button, input, textarea, aside')]
        .filter(n => !(n.ariaLabel || n.textContent.trim() || n.labels?.length))
        .map(n => n.outerHTML)""")
    assert nameless == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_until_the_toggle_says_otherwise(browser, server, scheme):
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1100, "height": 800})
    with opened(context, server) as page:
        server.answer = fake.says("# Words\n**Bold** and `code`\n\n```py\nx = 1\n```")
        say(page, "Hello")
        over(page)
        paper = "getComputedStyle(document.body).backgroundColor"
        now = page.evaluate(paper)
        assert (now == "rgb(23, 24, 27)") == (scheme == "dark")
        shot(page, scheme)
        for text, ground in (("#model", "body"), (".foot", "body"), (".failure b", ".failure")):
            if page.locator(text).count():
                assert contrast(page, text, ground) >= 4.5  # WCAG 2.2, 1.4.3
        page.click("#theme")
        other = page.evaluate(paper)
        assert other != now
        page.reload()
        assert page.evaluate(paper) == other
        page.click("#theme")
        assert page.evaluate(paper) == now
        assert page.evaluate("kept.theme") == ""  # with the system again
    context.close()


def contrast(page, text: str, ground: str) -> float:
    def light(value):
        numbers = [int(x) / 255 for x in re.findall(r"\d+", value)[:3]]
        r, g, b = (x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in numbers)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    style = "getComputedStyle(document.querySelector('{}')).{}"
    a = light(page.evaluate(style.format(text, "color")))
    b = light(page.evaluate(style.format(ground, "backgroundColor")))
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


def test_a_phone(browser, server):
    size = {"width": 360, "height": 740}
    context = browser.new_context(viewport=size, has_touch=True, is_mobile=True)
    server.model["id"] = "a/long/path/to/a/model-of-ours-with-a-name"
    with opened(context, server) as page:
        code = "```py\n" + "x = 1  # long " * 20 + "\n```"
        server.answer = fake.says("W" * 200 + "\n\n- " + "item " * 30 + "\n\n" + code)
        say(page, "https://example.org/" + "a" * 200)
        over(page)
        shot(page, "phone")
        wide = "document.documentElement.scrollWidth"
        assert page.evaluate(wide) == 360
        for name in ("#clear", "#export", "#theme", "#tune", "#send"):
            box = page.locator(name).bounding_box()
            assert 0 <= box["x"] and box["x"] + box["width"] <= 360
            assert min(box["width"], box["height"]) >= 32
        page.tap("#tune")
        shot(page, "phone_settings")
        assert page.evaluate(wide) == 360
        box = page.locator("#settings").bounding_box()
        assert box["width"] == 360 and box["height"] > 600
        page.locator("#reset").scroll_into_view_if_needed()
        page.tap("#close")
        assert not page.locator("#settings").is_visible()
        server.answer = fake.refuses(503, "full", "E503", **{"Retry-After": "9"})
        say(page, "More")
        over(page)
        shot(page, "phone_busy")
        assert page.evaluate(wide) == 360
    context.close()


def test_reading_back_is_not_disturbed_by_what_is_written(page, server):
    gate = threading.Semaphore(0)
    server.answer = fake.says("line\n\n" * 100, "more\n\n" * 20, "end", gate=gate)
    say(page, "Go")
    gate.release()
    until(page, "document.querySelectorAll('.assistant p').length === 100")
    main = "document.querySelector('main')"
    at_end = f"{main}.scrollHeight - {main}.scrollTop - {main}.clientHeight < 2"
    until(page, at_end)  # it follows
    page.evaluate(f"{main}.scrollTop = 100")
    gate.release(2)
    over(page)
    assert page.evaluate(f"{main}.scrollTop") == 100
