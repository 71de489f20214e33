"""The chat page in a real browser."""

import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# As root in a container, and without a word to anybody but the server.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def opened(browser):
    """Opens a server's page, and checks at the end that the browser had nothing to complain about."""
    contexts, complaints, asked = [], [], []

    def open_page(server, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.url)
        assert all(url.startswith(server.url) for url in asked)
        return page

    yield open_page
    for context in contexts:
        context.close()
    # What the tests provoke, the browser reports by itself.
    expected = ("the server responded with a status of", "Executing inline script violates")
    assert [text for text in complaints if not any(part in text for part in expected)] == []


def send(page, text):
    page.get_by_role("textbox", name="Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answer(page, index=0):
    return page.locator("li.assistant").nth(index)


def close_settings(page):
    """By the keyboard; then the message has the focus again."""
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#prompt")).to_be_focused()


def is_done(page):
    page.get_by_role("button", name="Send").wait_for()


def test_a_conversation(server, opened):
    page = opened(server)
    page.get_by_role("heading", name="small").wait_for()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("24")
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_role("button", name="Done").click()
    send(page, "def hello")
    is_done(page)
    client, messages = server.openai, [{"role": "system", "content": "Be brief."}]

    def expected(text):
        messages.append({"role": "user", "content": text})
        found = client.chat.completions.create(model="small", messages=messages, temperature=0, max_tokens=24)
        messages.append({"role": "assistant", "content": found.choices[0].message.content})
        return messages[-1]["content"]

    assert answer(page).locator(".text").last.text_content() == expected("def hello")
    assert "24 tokens" in answer(page).locator(".note").text_content()
    send(page, "again")
    is_done(page)
    # The model has seen the whole conversation.
    assert answer(page, 1).locator(".text").last.text_content() == expected("again")
    page.reload()
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("Most tokens").input_value() == "24"
    page.keyboard.press("Escape")
    page.get_by_role("button", name="New chat").click()
    assert page.locator("li").count() == 0


def test_only_the_keyboard(server, opened):
    page = opened(server)
    page.get_by_role("heading", name="small").wait_for()
    page.keyboard.type("first")  # the message has the focus
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    assert page.get_by_role("textbox", name="Message", exact=True).input_value() == "first\nsecond"
    for name in ("Settings", "New chat"):
        page.keyboard.press("Shift+Tab")
        assert page.evaluate("document.activeElement.textContent") == name
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.get_by_role("dialog").is_visible()
    close_settings(page)


def test_stop(serving, opened, eventually):
    with serving(delay=0.03) as server:
        page = opened(server)
        for stop in ("button", "key"):
            send(page, "def hello")
            page.get_by_role("button", name="Stop").wait_for()
            eventually(lambda: server.engine.running == 1)
            if stop == "button":
                page.get_by_role("button", name="Stop").click()
            else:
                page.keyboard.press("Escape")
            is_done(page)
            eventually(lambda: not server.engine.has_work)
            assert page.locator(".note").last.text_content() == "stopped"
        assert server.metric('dsjax_requests_finished_total{finish="cancelled"}') == 2


def test_text_is_never_html(server, opened):
    page = opened(server)
    attack = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
    # From both sides: what the user writes, and what a server says.
    answered = (
        'data: {"choices":[{"index":0,"delta":{"reasoning_content":"TEXT"},"finish_reason":null}]}\n\n'
        'data: {"choices":[{"index":0,"delta":{"content":"TEXT\\n```html\\nTEXT\\n```\\nend"}}]}\n\n'
        'data: {"choices":[],"usage":{"completion_tokens":3}}\n\ndata: [DONE]\n\n'
    ).replace("TEXT", attack.replace('"', '\\"'))
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=answered, content_type="text/event-stream"))
    send(page, attack)
    is_done(page)
    assert page.locator("li.user").text_content() == attack
    assert answer(page).locator(".text").last.text_content() == f"{attack}{attack}\nend"
    assert answer(page).locator("pre").text_content() == f"{attack}\n"
    assert page.locator("li img, li script").count() == 0
    assert page.title() == "small"
    # Thinking is folded away until somebody wants to see it.
    thinking = answer(page).locator("details .text")
    assert not thinking.is_visible()
    answer(page).get_by_text("Thinking", exact=True).click()
    assert thinking.is_visible()
    assert thinking.text_content() == attack


def test_the_policy(server, opened):
    """Scripts that are not the page's own do not run, not even if they got into it."""
    page = opened(server)
    with server.http as http:
        policy = http.get("/").headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    refused = page.evaluate(
        """() => new Promise(done => {
            addEventListener("securitypolicyviolation", event => done(event.violatedDirective));
            const made = document.createElement("script");
            made.textContent = "document.title = 'taken'";
            document.body.append(made);
        })"""
    )
    assert refused == "script-src-elem"
    assert page.title() != "taken"


def test_a_key_and_errors(serving, opened):
    with serving(key="secret", max_tokens=30) as server:
        page = opened(server)
        send(page, "def hello")
        answer(page).get_by_text("no API key").wait_for()
        assert page.get_by_role("textbox", name="Message", exact=True).input_value() == "def hello"  # to be sent again
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("API key").fill("secret")
        page.get_by_label("Most tokens").fill("31")
        close_settings(page)
        page.get_by_role("heading", name="small").wait_for()
        page.keyboard.press("Enter")
        answer(page, 1).get_by_text("max_tokens = 31: must be at most 30").wait_for()
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Most tokens").fill("9")
        close_settings(page)
        page.keyboard.press("Enter")
        answer(page, 2).get_by_text("9 tokens").wait_for()


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits(server, opened, width, scheme):
    page = opened(server, viewport={"width": width, "height": 640}, color_scheme=scheme)
    send(page, "x" * 400)
    is_done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.get_by_role("textbox", name="Message", exact=True).is_visible()
    # Text can be told from its ground: contrast of at least 4.5 (WCAG 2, level AA).
    for selector in ("body", "li.user", ".note", "button.main"):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector


CONTRAST = """selector => {
    const channels = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const luminance = color => channels(color)
        .map(value => value / 255)
        .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
    const element = document.querySelector(selector);
    let behind = element;
    while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const [low, high] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]
        .map(luminance).sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
}"""
