"""A model behind an endpoint: what is sent, what is an answer, and what a fault ends."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mipha.data.images import open_image
from mipha.evaluation.benchmark import Benchmark, Judgement, Metric, Plan, Question, Split
from mipha.evaluation.chat_completions import TRIES, WrongServer, is_same_model
from mipha.evaluation.endpoint import EndpointModel, data_uri
from mipha.evaluation.predict import asked_hash, merge, predict

Rule = Callable[[str, int], Any]
"""Question and number of the request to a text, or (status, body, headers), or seconds to wait."""


class Server:
    """A server that answers by a rule, as many requests at a time as come."""

    def __init__(self) -> None:
        self.rule: Rule = lambda question, number: f"about {question}"
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_at_a_time = 0
        now, lock, told = 0, threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                nonlocal now
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                content = body["messages"][-1]["content"]
                question = content if isinstance(content, str) else content[-1]["text"]
                with lock:
                    now += 1
                    told.most_at_a_time = max(told.most_at_a_time, now)
                    told.requests.append(body)
                    told.keys.append(self.headers.get("Authorization"))
                    number = sum(_question(one) == question for one in told.requests)
                try:
                    self._say(told.rule(question, number), body["model"])
                finally:
                    with lock:
                        now -= 1

            def _say(self, answer: Any, model: str) -> None:
                if isinstance(answer, float):
                    time.sleep(answer)
                    return
                status, text, headers = 200, reply(answer, model=model), {}
                if isinstance(answer, tuple):
                    status, text, headers = answer
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


def _question(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def reply(text: Any, model: str | None = "m", reason: str = "stop") -> str:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return json.dumps({"choices": [choice], "model": model, "usage": {"completion_tokens": 3}})


@contextmanager
def serving() -> Iterator[Server]:
    served = Server()
    thread = threading.Thread(target=served.http.serve_forever, args=(0.01,))
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        yield served
    served.http.shutdown()
    thread.join()
    served.http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as served:
        yield served


TOY = Benchmark(
    name="toy",
    metrics=(Metric("accuracy", "%", "all questions"),),
    splits={"test": Split(6)},
    protocol="none",
    source="get it nowhere",
    max_new_tokens=8,
    read=lambda root, split: [],
    read_labels=lambda path: [],
    score=lambda questions, predictions, judge: Judgement({}, []),
    measure=lambda totals: {},
)
QUESTIONS = [Question(f"q{n}", f"what is {n}?", None) for n in range(6)]


def ask(server: Server, folder: Path, **options: Any) -> dict[str, str]:
    """Ask the questions of a toy benchmark, and return id to text of all predictions so far."""
    model = EndpointModel(server.url, "m", **{"pause": 0.001, "parallel": 3} | options)
    plan = Plan(TOY, "test", QUESTIONS)
    predict(model, plan, folder, checkpoint_sha256=model.sha256, progress=False)
    return merge(folder, QUESTIONS)


def errors(folder: Path) -> dict[str, str]:
    rows = map(json.loads, (folder / "errors.jsonl").read_text().splitlines())
    return {row["question_id"]: row["error"] for row in rows}


ALL = {f"q{n}": f"about what is {n}?" for n in range(6)}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.jpg"
    Image.new("RGB", (20, 10), (200, 30, 30)).save(path, quality=60)
    return path


def test_the_request_holds_the_prompt_and_the_bytes_of_the_file(
    server: Server, picture: Path
) -> None:
    model = EndpointModel(server.url + "/", "org/m", api_key="secret", request={"seed": 7})
    pairs = [(picture, "What is it?"), (None, "Why?"), (picture.read_bytes(), "Which colour?")]
    answers = model.answer_many(pairs, max_new_tokens=5)
    texts = ["about What is it?", "about Why?", "about Which colour?"]
    assert [answer.text for answer in answers] == texts
    assert all(answer.finished and answer.num_tokens == 3 for answer in answers)

    by_question = {_question(body): body for body in server.requests}
    uri = "data:image/jpeg;base64," + base64.b64encode(picture.read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": uri}}
    for question, content in (
        ("What is it?", [image, {"type": "text", "text": "What is it?"}]),
        ("Why?", "Why?"),
        ("Which colour?", [image, {"type": "text", "text": "Which colour?"}]),
    ):
        message = {"role": "user", "content": content}
        settings = {"temperature": 0, "max_tokens": 5, "seed": 7}
        assert by_question[question] == {"model": "org/m", "messages": [message]} | settings
    assert set(server.keys) == {"Bearer secret"}


def test_several_images_stand_in_front_of_the_question(server: Server, picture: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (10, 20)).save(buffer, "PNG")
    model = EndpointModel(server.url, "m")
    model.answer_many([((picture, buffer.getvalue()), "Which is older?")])
    (body,) = server.requests
    *images, question = body["messages"][0]["content"]
    uris = [data_uri(picture), data_uri(buffer.getvalue())]
    assert [image["image_url"]["url"] for image in images] == uris
    assert question == {"type": "text", "text": "Which is older?"}


def test_an_image_that_few_servers_read_is_sent_as_png(picture: Path, tmp_path: Path) -> None:
    Image.open(picture).save(tmp_path / "picture.tiff")
    head, content = data_uri(tmp_path / "picture.tiff").split(",")
    assert head == "data:image/png;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(content)))
    assert sent.tobytes() == open_image(tmp_path / "picture.tiff").tobytes()
    with pytest.raises(FileNotFoundError, match=r"no image file .*gone\.png"):
        data_uri(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="is not an image in a known format"):
        data_uri(b"not an image")


def test_many_are_asked_at_a_time_and_each_gets_its_own_answer(
    server: Server, tmp_path: Path
) -> None:
    barrier = threading.Barrier(3, timeout=20)  # breaks unless three requests are there at once

    def together(question: str, number: int) -> str:
        barrier.wait()
        return f"about {question}"

    server.rule = together
    assert ask(server, tmp_path) == ALL
    assert server.most_at_a_time == 3 and len(server.requests) == 6


def test_the_fingerprint_is_of_what_was_sent(server: Server, tmp_path: Path) -> None:
    hashes = []
    for name, options in (("a", {}), ("b", {"parallel": 1}), ("c", {"request": {"seed": 7}})):
        ask(server, tmp_path / name, **options)
        hashes.append(asked_hash(tmp_path / name))
    assert hashes[0] == hashes[1] != hashes[2]


def test_trouble_that_passes_is_waited_out(server: Server, tmp_path: Path) -> None:
    trouble = {1: (429, "slow down", {}), 2: (503, "", {}), 3: 0.0}
    server.rule = lambda question, number: trouble.get(number, f"about {question}")
    assert ask(server, tmp_path) == ALL
    assert len(server.requests) == 4 * 6


def test_a_rate_limit_says_how_long_all_wait(server: Server, tmp_path: Path) -> None:
    """However often it refuses, as long as it answers others."""
    open_at = [time.monotonic()]

    def one_in_a_while(question: str, number: int) -> Any:
        now = time.monotonic()
        if now < open_at[0]:
            return 429, "", {"Retry-After": "0.2"}
        open_at[0] = now + 0.2
        return f"about {question}"

    server.rule = one_in_a_while
    assert ask(server, tmp_path, pause=100.0) == ALL


def test_a_rate_limit_that_lasts_too_long_ends_the_asking(server: Server, tmp_path: Path) -> None:
    until = formatdate(time.time() + 7200, usegmt=True)
    limit = (429, "quota", {"Retry-After": until})
    server.rule = lambda question, number: limit if question[-2] == "4" else f"about {question}"
    with pytest.raises(ConnectionError, match=r"takes no request for 7,\d\d\d seconds .*quota"):
        ask(server, tmp_path, parallel=1)
    assert not (tmp_path / "errors.jsonl").exists()
    server.rule = lambda question, number: f"about {question}"
    assert ask(server, tmp_path) == ALL


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ((200, "<html>please log in</html>", {}), "does not answer as chat completions do"),
        ((200, "[]", {}), "does not answer as chat completions do"),
        ((401, '{"error": {"message": "bad secret"}}', {}), r"\(HTTP 401, bad \*\*\*\): check URL"),
        ((404, "", {}), r"refuses \(HTTP 404, Not Found\): check URL, model 'm' and key"),
        ((302, "", {"Location": "http://elsewhere/"}), "redirects to http://elsewhere/: give that"),
        ((200, reply("yes", model="other"), {}), "answers as 'other', not 'm': name the model"),
    ],
)
def test_what_no_question_can_pass_ends_the_asking(
    fault: Any, sentence: str, server: Server, tmp_path: Path
) -> None:
    """What was answered before stays, nothing else is taken for an answer, and it can go on."""
    server.rule = lambda question, number: fault if question[-2] == "3" else f"about {question}"
    with pytest.raises(WrongServer, match=sentence):
        ask(server, tmp_path, parallel=1, api_key="secret")
    assert merge(tmp_path, QUESTIONS) == {f"q{n}": ALL[f"q{n}"] for n in range(3)}
    assert not (tmp_path / "errors.jsonl").exists()

    num_before = len(server.requests)
    server.rule = lambda question, number: f"about {question}"
    assert ask(server, tmp_path) == ALL and len(server.requests) == num_before + 3


def test_a_server_that_is_down_ends_the_asking(server: Server, tmp_path: Path) -> None:
    server.rule = lambda question, number: (500, "out of memory", {})
    with pytest.raises(ConnectionError, match=rf"in {TRIES} tries \(HTTP 500, out of memory\)"):
        ask(server, tmp_path, parallel=1)
    assert len(server.requests) == TRIES and merge(tmp_path, QUESTIONS) == {}


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ((200, '{"choices": []}', {}), "does not answer as chat completions do"),
        ((200, '{"error": {"message": "no capacity"}}', {}), r"an error \(no capacity\)"),
        ((200, reply(None, reason="content_filter"), {}), "a filter of the endpoint"),
        ((400, '{"error": {"message": "too long"}}', {}), r"refuses \(HTTP 400, too long\)"),
        ((413, "", {}), "make the image smaller"),
        ((500, "broken", {}), "though it answers others"),
        (0.3, r"in 2 tries \(timed out\), though it answers others"),
    ],
)
def test_what_fails_for_one_question_is_its_error_and_no_answer(
    fault: Any, sentence: str, server: Server, tmp_path: Path
) -> None:
    server.rule = lambda question, number: fault if question[-2] == "3" else f"about {question}"
    found = ask(server, tmp_path, timeout=0.2, parallel=1)
    assert found == {name: text for name, text in ALL.items() if name != "q3"}
    (failed,) = errors(tmp_path).items()
    assert failed[0] == "q3" and re.search(sentence, failed[1])


def test_a_fault_of_every_question_is_one_of_the_setup(server: Server, tmp_path: Path) -> None:
    server.rule = lambda question, number: (400, "no images here", {})
    many = [Question(f"q{n}", f"what is {n}?", None) for n in range(100)]
    model = EndpointModel(server.url, "m", parallel=1)
    with pytest.raises(ValueError, match=r"questions on 20 images in a row failed.*no images here"):
        predict(model, Plan(TOY, "test", many), tmp_path, checkpoint_sha256="a", progress=False)
    assert len(server.requests) <= 21 and merge(tmp_path, many) == {}


def test_a_model_that_says_nothing_has_answered(server: Server) -> None:
    server.rule = lambda question, number: (200, reply(None, reason="length"), {})
    (answer,) = EndpointModel(server.url, "m").answer_many([(None, "Why?")])
    assert (answer.text, answer.finished) == ("", False)


@pytest.mark.parametrize(
    ("asked", "answered", "same"),
    [
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("llava", "llava:latest", True),
        ("Qwen/Qwen2-VL-2B", "qwen2-vl-2b", True),
        ("mipha", "/models/mipha.gguf", True),
        ("mipha-3b", "mipha-1b", False),
        ("mipha", "gpt-3.5-turbo", False),
    ],
)
def test_a_name_with_a_version_or_an_owner_is_the_same(
    asked: str, answered: str, same: bool
) -> None:
    assert is_same_model(asked, answered) == same


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="the endpoint's URL 'localhost:8000' does not start"):
        EndpointModel("localhost:8000", "m")
    with pytest.raises(ValueError, match="field messages of the endpoint's request is not free"):
        EndpointModel("http://localhost", "m", request={"messages": []})
    with pytest.raises(ValueError, match="--parallel is 0"):
        EndpointModel("http://localhost", "m", parallel=0)
