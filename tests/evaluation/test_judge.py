"""Recorded replies, and an endpoint asked over a real connection."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mipha.evaluation.judge import TRIES, Endpoint, Replay


def _recorded(path: Path, *rows: dict[str, Any] | str) -> Replay:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n",
        encoding="utf-8",
    )
    return Replay(path)


def test_replies_come_back_by_question_run_and_try(tmp_path: Path) -> None:
    replay = _recorded(
        tmp_path / "r.jsonl",
        {"question_id": "v1_0", "run": 1, "responses": ["about half", None, "0.5"]},
        {"question_id": "v1_0", "run": 2, "responses": ["1.0"]},
        {"question_id": 7, "text": "B"},
    )
    assert replay.num_runs == 2  # numbered from 1 in this file, asked for from 0
    assert [replay.ask("v1_0", "p", attempt=attempt) for attempt in range(3)] == [
        "about half",
        "",
        "0.5",
    ]
    assert replay.ask("v1_0", "p", run=1) == "1.0"
    assert [replay.ask("7", "p", attempt=attempt) for attempt in range(3)] == ["B"] * 3
    assert _recorded(tmp_path / "t.jsonl", {"question_id": 7, "text": "B"}).num_runs is None


def test_a_reply_that_was_not_recorded_is_named(tmp_path: Path) -> None:
    replay = _recorded(
        tmp_path / "r.jsonl",
        {"question_id": "v1_0", "run": 0, "responses": ["hm"], "prompt_sha256": "0" * 64},
    )
    with pytest.raises(
        ValueError, match=r"r\.jsonl has no reply for question v1_9 \(run 0, try 1\)"
    ):
        replay.ask("v1_9", "p")
    with pytest.raises(ValueError, match=r"question v1_0 \(run 0, try 2\)"):
        replay.ask("v1_0", "p", attempt=1)
    with pytest.raises(ValueError, match=r"question v1_0 \(run 1, try 1\)"):
        replay.ask("v1_0", "p", run=1)
    with pytest.raises(ValueError, match="replies for question v1_0, but to other prompts"):
        replay.ask("v1_0", "p")
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        Replay(tmp_path / "gone.jsonl")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"question_id": "a", "text"', "is not valid JSON"),
        ('["a"]', "is not a JSON object"),
        ('{"text": "B"}', "has no 'question_id'"),
        (
            '{"question_id": "a", "run": "first", "responses": ["1"]}',
            "run 'first' should be a valid integer",
        ),
        ('{"question_id": "a"}', 'neither "responses"'),
        ('{"question_id": "a", "responses": "1"}', "responses '1' should be a valid list"),
        ('{"question_id": "a", "responses": [1]}', "responses.0 1 should be a valid string"),
        ('{"question_id": "a", "text": null}', 'neither "responses"'),
        ('{"question_id": "b", "text": "A"}', "second reply for question b"),
    ],
)
def test_a_malformed_line_is_named(line: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"line 2.*{sentence}"):
        _recorded(tmp_path / "r.jsonl", {"question_id": "b", "text": "B"}, line)


class Server:
    """A judge's server with a script: a text, (status, body), or seconds to keep waiting."""

    def __init__(self) -> None:
        self.script: list[str | tuple[int, str] | float] = []
        self.requests: list[tuple[str, str | None, dict[str, Any]]] = []
        told = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                told.requests.append((self.path, self.headers.get("Authorization"), body))
                answer = told.script.pop(0)
                if isinstance(answer, float):
                    time.sleep(answer)
                    return  # closes the connection silently
                choices = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
                status, text = answer if isinstance(answer, tuple) else (200, json.dumps(choices))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = Server()
    thread = threading.Thread(target=served.http.serve_forever, args=(0.01,))
    thread.start()
    yield served
    served.http.shutdown()
    thread.join()
    served.http.server_close()


def test_the_request_is_one_of_chat_completions(server: Server) -> None:
    server.script = ["0.8"]
    judge = Endpoint(server.url + "/", "gpt-4-0613", api_key="secret")
    assert judge.num_runs is None
    assert judge.ask("v1_0", "Grade 好.", temperature=0.5, max_tokens=3) == "0.8"
    message = {"role": "user", "content": "Grade 好."}
    body = {"model": "gpt-4-0613", "messages": [message], "temperature": 0.5, "max_tokens": 3}
    assert server.requests == [("/v1/chat/completions", "Bearer secret", body)]


def test_trouble_that_passes_is_waited_out(server: Server) -> None:
    server.script = [(429, "slow down"), (503, ""), 0.0, 0.3, "B"]
    assert Endpoint(server.url, "m", timeout=0.1, pause=0.001).ask("1", "p") == "B"
    assert len(server.requests) == 5 and all(key is None for _, key, _ in server.requests)


def test_no_reply_is_an_error_never_an_empty_one(server: Server, tmp_path: Path) -> None:
    server.script = [(500, "out of memory")] * TRIES
    judge = Endpoint(server.url, "m", record=tmp_path / "r.jsonl", pause=0.001)
    with pytest.raises(
        ConnectionError,
        match=rf"in {TRIES} tries \(HTTP 500, out of memory\): run the same command again",
    ):
        judge.ask("1", "p")
    assert server.script == [] and not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ((401, "bad key"), r"refuses \(HTTP 401, bad key\).*model 'm'"),
        ((404, ""), r"refuses \(HTTP 404, Not Found\)"),
        ((200, "<html>"), "does not answer as chat completions do"),
        ((200, '{"choices": []}'), "does not answer as chat completions do"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(
    answer: tuple[int, str], sentence: str, server: Server
) -> None:
    server.script = [answer]
    with pytest.raises(ValueError, match=sentence) as error:
        Endpoint(server.url, "m", api_key="secret").ask("1", "p")
    assert "secret" not in str(error.value) and len(server.requests) == 1
    with pytest.raises(ValueError, match="'file:///etc' does not start with http"):
        Endpoint("file:///etc", "m")


def test_a_model_that_says_nothing_has_replied(server: Server) -> None:
    server.script = [(200, '{"choices": [{"message": {"content": null}}]}')]
    assert Endpoint(server.url, "m").ask("1", "p") == ""


def test_an_interrupted_judging_goes_on_and_can_be_replayed(server: Server, tmp_path: Path) -> None:
    record = tmp_path / "sub" / "r.jsonl"
    server.script = ["half", "0.5", "1.0", "A", "0.1"]
    first = Endpoint(server.url, "m", record=record)
    assert [first.ask("v1_0", "p"), first.ask("v1_0", "p again", attempt=1)] == ["half", "0.5"]
    with record.open("a") as file:
        file.write('{"question_id": "v1_0", "run": 1, "respon')  # the machine went down here
    again = Endpoint(server.url, "m", record=record)
    assert [
        again.ask("v1_0", "p"),
        again.ask("v1_0", "p again", attempt=1),
        again.ask("v1_0", "p", run=1),
    ] == ["half", "0.5", "1.0"]
    assert (
        again.ask("v1_0", "another answer to grade") == "A"
    )  # a question of another benchmark may have the same id
    assert len(server.requests) == 4
    replay = Replay(record)
    assert replay.num_runs == 2
    assert [
        replay.ask("v1_0", "p"),
        replay.ask("v1_0", "p again", attempt=1),
        replay.ask("v1_0", "p", run=1),
    ] == ["half", "0.5", "1.0"]
    assert replay.ask("v1_0", "another answer to grade") == "A"
    assert Endpoint(server.url, "another model", record=record).ask("v1_0", "p") == "0.1"
    with pytest.raises(
        ValueError, match=r"line 5 is a second reply for question v1_0: keep one judge's"
    ):
        Replay(record)
