"""The web page in a real browser: an image, a question, the streamed answer, and failures."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from mipha.deploy.serve.app import page, page_headers
from tests.deploy.serve.browser import CHROMIUM, Page, chromium

if TYPE_CHECKING:
    from mipha.assistant import Assistant

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt install chromium")


class Site(ThreadingHTTPServer):
    """A stand-in for the server; its answer depends on the question."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.key = ""
        self.full = False
        self.go_on = Event()

    def asked(self) -> list[dict[str, Any]]:
        """Return the messages of the last request."""
        return self.requests[-1]["messages"]


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/":
            self._send(200, "text/html; charset=utf-8", page().encode(), page_headers())
        elif self._may_ask():
            self._json(200, {"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._may_ask():
            return
        self.server.requests.append(request)
        content = request["messages"][-1]["content"]
        question = content if isinstance(content, str) else content[-1]["text"]
        if self.server.full:
            self._error(429, "128 requests wait already: ask again in a moment")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self._event({"delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        if question == "break":
            self._event({"delta": {"content": "A"}, "finish_reason": None})
            self.wfile.write(
                b'data: {"error": {"message": "the server failed on this request: see its log"}}'
                b"\n\ndata: [DONE]\n\n"
            )
            return
        words = {
            "wait": "first second",
            "markup": "<img src=x onerror=alert(1)> <b>b</b>",
            "wide": "w" * 500,
        }.get(question, f"You said: {question}")
        for word in re.split(r"(?<= )", words):
            self._event({"delta": {"content": word}, "finish_reason": None})
            if question == "wait" and word == "first ":
                self.server.go_on.wait(30)
        self._event({"delta": {}, "finish_reason": "length" if question == "long" else "stop"})
        self.wfile.write(b"data: [DONE]\n\n")

    def _may_ask(self) -> bool:
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self._error(401, "the API key is missing or wrong")
            return False
        return True

    def _event(self, choice: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps({'choices': [{'index': 0, **choice}]})}\n\n".encode())
        self.wfile.flush()

    def _error(self, status: int, message: str) -> None:
        self._json(status, {"error": {"message": message, "type": "x", "param": None, "code": "x"}})

    def _json(self, status: int, content: object) -> None:
        self._send(status, "application/json", json.dumps(content).encode(), {})

    def _send(self, status: int, kind: str, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def tab(browser: Page, site: Site) -> Page:
    """Return the page, just opened."""
    browser.complaints.clear()
    browser.size(1280, 800)
    _open(browser, site)
    browser.wait_for("document.getElementById('model').textContent === 'tiny'")
    return browser


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), (200, 30, 60)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def _open(tab: Page, site: Site) -> None:
    tab.open(f"http://127.0.0.1:{site.server_port}/")


def _choose(tab: Page, file: Path) -> None:
    tab.choose_file("#file", file)
    tab.wait_for(
        f"document.getElementById('caption').textContent.startsWith({json.dumps(file.name)})"
    )


def _ask(tab: Page, question: str) -> None:
    tab.run("document.getElementById('question').focus()")
    tab.type(question)
    tab.press("Enter")


def _wait_for_answers(tab: Page, number: int) -> None:
    tab.wait_for(f"document.querySelectorAll('.assistant .tools').length === {number}")


def _said(tab: Page) -> list[str]:
    return tab.run("[...document.querySelectorAll('.said')].map(said => said.textContent)")


def _press_link(tab: Page, label: str) -> None:
    tab.run(
        "[...document.querySelectorAll('button')]"
        f".find(button => button.textContent === {json.dumps(label)}).click()"
    )


def _sent_image(site: Site) -> bytes:
    url = site.asked()[0]["content"][0]["image_url"]["url"]
    return base64.b64decode(url.partition(";base64,")[2])


def test_the_page_needs_nothing_beside_it_and_runs_nothing_else() -> None:
    text, headers = page(), page_headers()
    assert "$" not in re.sub(r"\$\{", "", text)  # every place was filled
    loaded = re.findall(
        r"""(?:src|href)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import|<link[^>]*stylesheet""", text
    )
    assert [link for link, _ in loaded if not link.startswith("data:")] == []
    policy = dict(
        part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";")
    )
    assert (policy["default-src"], policy["connect-src"], policy["frame-ancestors"]) == (
        "'none'",
        "'self'",
        "'none'",
    )
    for tag in ("style", "script"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"


@needs_chromium
def test_a_question_about_an_image_and_another_one(tab: Page, site: Site, image_file: Path) -> None:
    _choose(tab, image_file)
    _ask(tab, "wait")
    tab.wait_for(
        "document.querySelector('.assistant .said')?.textContent === 'first '"
    )  # the server has not said the rest yet
    assert tab.run("document.getElementById('send').hidden") is True
    site.go_on.set()
    _wait_for_answers(tab, 1)
    _ask(tab, "And now?")
    _wait_for_answers(tab, 2)
    assert _said(tab) == ["wait", "first second", "And now?", "You said: And now?"]
    assert site.requests[0]["model"] == "tiny" and site.requests[0]["stream"] is True
    first, *rest = site.asked()
    assert [part["type"] for part in first["content"]] == ["image_url", "text"]
    assert first["content"][1]["text"] == "wait"
    assert rest == [
        {"role": "assistant", "content": "first second"},
        {"role": "user", "content": "And now?"},
    ]
    assert _sent_image(site) == image_file.read_bytes()  # a small file goes as it is
    assert tab.complaints == []
    _press_link(tab, "New image")
    assert _said(tab) == []
    _ask(tab, "Nothing to see?")
    _wait_for_answers(tab, 1)
    assert site.asked() == [{"role": "user", "content": "Nothing to see?"}]


@needs_chromium
def test_images_go_with_the_question_that_they_were_added_before(
    tab: Page, site: Site, image_file: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (20, 50), (20, 30, 200)).save(tmp_path / "blue.png")
    _choose(tab, image_file)
    tab.choose_file("#file", tmp_path / "blue.png")
    tab.wait_for("document.querySelectorAll('#previews img').length === 2")
    caption = "red.png, 40 × 30; blue.png, 20 × 50"
    assert tab.run("document.getElementById('caption').textContent") == caption
    _ask(tab, "Which is taller?")
    _wait_for_answers(tab, 1)
    tab.choose_file("#file", image_file)
    tab.wait_for("document.querySelectorAll('#previews img').length === 3")
    _ask(tab, "And this?")
    _wait_for_answers(tab, 2)
    first, _, second = site.asked()
    kinds = [[part["type"] for part in turn["content"]] for turn in (first, second)]
    assert kinds == [["image_url", "image_url", "text"], ["image_url", "text"]]
    assert first["content"][0] != first["content"][1] and tab.complaints == []
    _press_link(tab, "New image")
    assert tab.run("document.querySelectorAll('#previews img').length") == 0


@needs_chromium
@pytest.mark.parametrize(("turned", "size"), [(1, (1536, 1024)), (6, (1024, 1536))])
def test_a_large_photo_is_made_smaller_and_upright_before_it_is_sent(
    tab: Page, site: Site, tmp_path: Path, turned: int, size: tuple[int, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = turned
    Image.radial_gradient("L").resize((3000, 2000)).convert("RGB").save(
        tmp_path / "photo.jpg", exif=exif
    )
    _choose(tab, tmp_path / "photo.jpg")
    _ask(tab, "What?")
    _wait_for_answers(tab, 1)
    assert Image.open(io.BytesIO(_sent_image(site))).size == size


@needs_chromium
@pytest.mark.parametrize("way", ["drop", "paste"])
def test_an_image_is_dropped_or_pasted(tab: Page, site: Site, image_file: Path, way: str) -> None:
    data = base64.b64encode(image_file.read_bytes()).decode()
    event = "new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})"
    if way == "paste":
        event = (
            "new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true})"
        )
    tab.run(
        f"const bytes = Uint8Array.from(atob('{data}'), c => c.charCodeAt(0));"
        "const data = new DataTransfer();"
        "data.items.add(new File([bytes], 'given.png', {type: 'image/png'}));"
        f"document.body.dispatchEvent({event})"
    )
    tab.wait_for("document.getElementById('caption').textContent === 'given.png, 40 × 30'")
    _ask(tab, "What?")
    _wait_for_answers(tab, 1)
    assert _sent_image(site) == image_file.read_bytes()


@needs_chromium
def test_a_file_that_is_no_image_is_refused_in_words(
    tab: Page, site: Site, tmp_path: Path, image_file: Path
) -> None:
    (tmp_path / "letter.png").write_text("Dear reader")
    tab.choose_file("#file", tmp_path / "letter.png")
    tab.wait_for("!document.getElementById('notice').hidden")
    assert tab.run("document.getElementById('notice').textContent").startswith(
        "letter.png is not an image"
    )
    _choose(tab, image_file)
    assert tab.run("document.getElementById('notice').hidden") is True


@needs_chromium
@pytest.mark.parametrize("way", ["button", "key"])
def test_an_answer_is_stopped_and_what_was_said_is_kept(
    tab: Page, site: Site, image_file: Path, way: str
) -> None:
    _choose(tab, image_file)
    _ask(tab, "wait")
    tab.wait_for("document.querySelector('.assistant .said')?.textContent === 'first '")
    if way == "key":
        tab.press("Escape")
    else:
        tab.run("document.getElementById('stop').click()")
    _wait_for_answers(tab, 1)
    assert "stopped" in tab.run("document.querySelector('.tools').textContent")
    assert tab.run("document.getElementById('stop').hidden") is True
    _ask(tab, "Go on")
    _wait_for_answers(tab, 2)
    assert site.asked()[1:] == [
        {"role": "assistant", "content": "first "},
        {"role": "user", "content": "Go on"},
    ]


@needs_chromium
def test_errors_are_shown_in_words_and_asked_again(tab: Page, site: Site) -> None:
    site.full = True
    _ask(tab, "What?")
    _wait_for_answers(tab, 1)
    assert _said(tab) == ["What?", "128 requests wait already: ask again in a moment"]
    site.full = False
    _press_link(tab, "Try again")
    tab.wait_for(
        "document.querySelectorAll('.failed').length === 0 "
        "&& document.querySelectorAll('.tools').length === 1"
    )
    assert _said(tab) == ["What?", "You said: What?"]
    _ask(tab, "break")
    _wait_for_answers(tab, 2)
    assert _said(tab)[-1] == "A\n\nthe server failed on this request: see its log"
    _ask(tab, "long")
    _wait_for_answers(tab, 3)
    assert [message["content"] for message in site.asked()] == [
        "What?",
        "You said: What?",
        "long",
    ]  # what failed is no part of it
    assert "cut off at the longest answer" in tab.run(
        "[...document.querySelectorAll('.tools')].at(-1).textContent"
    )
    site.shutdown()
    site.server_close()
    _ask(tab, "Still there?")
    _wait_for_answers(tab, 4)
    assert _said(tab)[-1] == "The server cannot be reached. Is it still running?"


@needs_chromium
def test_a_key_is_asked_for_only_when_it_is_needed(browser: Page, site: Site) -> None:
    site.key = "secret"
    _open(browser, site)
    browser.wait_for("!document.getElementById('lock').hidden")
    for key, done in (
        ("wrong", "document.getElementById('notice').textContent.includes('does not accept')"),
        ("secret", "true"),
    ):
        browser.wait_for(
            "!document.getElementById('lock').hidden && document.activeElement.id === 'key'"
        )
        browser.type(key)
        browser.press("Enter")
        browser.wait_for(done)
    browser.wait_for(
        "document.getElementById('model').textContent === 'tiny' "
        "&& document.getElementById('lock').hidden"
    )
    _ask(browser, "What?")
    _wait_for_answers(browser, 1)
    site.key = "another"
    _ask(browser, "And now?")
    browser.wait_for("document.activeElement.id === 'key'")
    browser.type("another")
    browser.press("Enter")
    _wait_for_answers(browser, 2)
    assert _said(browser) == ["What?", "You said: What?", "And now?", "You said: And now?"]


@needs_chromium
def test_an_answer_is_text_and_never_markup(tab: Page, site: Site) -> None:
    _ask(tab, "markup")
    _wait_for_answers(tab, 1)
    assert _said(tab)[1] == "<img src=x onerror=alert(1)> <b>b</b>"
    assert tab.run("document.querySelectorAll('.said *').length") == 0
    assert tab.complaints == []
    tab.run(
        "window.ran = 0; const s = document.createElement('script'); "
        "s.textContent = 'window.ran = 1'; document.body.append(s)"
    )
    assert tab.run("window.ran") == 0  # the policy lets no other script run


@needs_chromium
def test_the_keyboard_is_enough(tab: Page, site: Site) -> None:
    _ask(tab, "one")
    _wait_for_answers(tab, 1)
    tab.type("two")
    tab.press("Enter", shift=True)
    tab.type("lines")
    tab.press("Enter")
    _wait_for_answers(tab, 2)
    assert site.asked()[-1]["content"] == "two\nlines"
    tab.press("Enter")  # nothing to ask
    assert len(site.requests) == 2
    unnamed = (
        "[...document.querySelectorAll('button, input, textarea')]"
        ".filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.length))"
    )
    assert tab.run(f"{unnamed}.map(e => e.outerHTML)") == []


@needs_chromium
@pytest.mark.parametrize("width", [360, 390, 1280])
def test_nothing_is_wider_than_the_screen(
    tab: Page, site: Site, image_file: Path, width: int
) -> None:
    tab.size(width, 640, phone=width < 900)
    _choose(tab, image_file)
    _ask(tab, "wide")
    _wait_for_answers(tab, 1)
    assert tab.run("document.documentElement.scrollWidth") <= width
    overflowing = (
        "[...document.querySelectorAll('body *')]"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML)"
    )
    assert tab.run(overflowing) == []
    assert tab.run("document.getElementById('send').getBoundingClientRect().bottom") <= 640


@needs_chromium
def test_the_real_server_answers_the_page(
    browser: Page, serving: Callable, assistant: Assistant, image_file: Path
) -> None:
    from mipha.deploy.serve.chat import Bounds
    from mipha.deploy.serve.requests import Limits

    browser.complaints.clear()
    with serving(bounds=Bounds(limits=Limits(max_new_tokens=8))) as server:
        browser.open(f"{server.url}/")
        browser.wait_for("document.getElementById('model').textContent === 'tiny'")
        _choose(browser, image_file)
        _ask(browser, "Which colour?")
        _wait_for_answers(browser, 1)
        answer = assistant.answer(image_file, "Which colour?", max_new_tokens=8).text
        assert _said(browser) == ["Which colour?", answer or "(no answer)"]
        assert browser.complaints == []
