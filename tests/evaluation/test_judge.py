"""Recorded replies, and an endpoint asked over a real connection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mipha.evaluation.chat_completions import TRIES
from mipha.evaluation.judge import Endpoint, Replay, strip_reasoning
from tests.evaluation.judge_server import Server, serving


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


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as served:
        yield served


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
        ((200, "[" * 100_000), "does not answer as chat completions do"),
        ((200, '{"choices": []}'), "does not answer as chat completions do"),
        (
            (200, '{"choices": [{"message": {"content": {"text": "0.5"}}}]}'),
            "does not answer as chat completions do",
        ),
        (
            (200, '{"choices": [{"message": {"content": [{"text": "0.5"}]}}]}'),
            "does not answer as chat completions do",
        ),
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


def test_parts_of_a_reply_that_are_not_text_are_no_part_of_it(server: Server) -> None:
    thinks = {"type": "thinking", "thinking": [{"type": "text", "text": "0.1?"}]}
    says = [{"type": "text", "text": "0."}, {"type": "text", "text": "5"}]
    server.script = [
        (200, json.dumps({"choices": [{"message": {"content": parts}}]}))
        for parts in ([thinks, *says], [thinks], [])
    ]
    judge = Endpoint(server.url, "m")
    assert [judge.ask(name, "p") for name in "123"] == ["0.5", "", ""]


def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(server: Server) -> None:
    server.script = ["0.5"]
    assert Endpoint(server.url, "m", api_key="secret\r\n").ask("1", "p") == "0.5"
    assert server.requests[0][1] == "Bearer secret"
    for key in ("sec\nret", "s\u0435cret"):
        with pytest.raises(ValueError, match="the judge's key holds a character") as error:
            Endpoint(server.url, "m", api_key=key)
        assert "sec" not in str(error.value) and "cret" not in str(error.value)


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


def _refusal(message: str) -> str:
    return json.dumps({"error": {"message": message, "code": "unsupported_parameter"}})


GPT_5 = _refusal(
    "Unsupported parameter: 'max_tokens' is not supported with this model. "
    "Use 'max_completion_tokens' instead."
)
TEMPERATURE = _refusal("Unsupported value: 'temperature' does not support 0.0 with this model.")


def test_a_request_is_adapted_to_what_the_server_refuses(server: Server, tmp_path: Path) -> None:
    record = tmp_path / "r.jsonl"
    server.script = [(400, GPT_5), (400, TEMPERATURE), "0.8", "0.9"]
    judge = Endpoint(server.url, "m", record=record)
    assert judge.ask("1", "p", max_tokens=3) == "0.8"
    bodies = [body for _, _, body in server.requests]
    assert [body.get("max_tokens") for body in bodies] == [3, None, None]
    assert [body.get("max_completion_tokens") for body in bodies] == [None, 3, 3]
    assert [body.get("temperature") for body in bodies] == [0.0, 0.0, None]
    # What the server refused once is not sent again, and a reader of the score is told.
    assert judge.ask("2", "p", max_tokens=5) == "0.9" and len(server.requests) == 4
    assert server.requests[-1][2] == {
        "model": "m",
        "messages": [{"role": "user", "content": "p"}],
        "max_completion_tokens": 5,
    }
    notes = (
        "the judge's server refused max_tokens: max_completion_tokens was sent instead",
        "the judge's server refused temperature: it was left out",
    )
    assert judge.notes == notes
    replay = Replay(record)
    assert replay.notes == () and replay.ask("1", "p") == "0.8" and replay.notes == notes
    again = Endpoint(server.url, "m", record=record)
    assert again.ask("2", "p", max_tokens=5) == "0.9" and again.notes == notes


@pytest.mark.parametrize("status", [400, 422])
def test_a_field_without_another_name_is_left_out(status: int, server: Server) -> None:
    said = json.dumps({"detail": [{"loc": ["body", "max_tokens"], "msg": "extra field"}]})
    other = said.replace("max_tokens", "max_completion_tokens")
    server.script = [(status, said), (status, other), "B"]
    assert Endpoint(server.url, "m").ask("1", "p", temperature=0.5) == "B"
    assert server.requests[-1][2].keys() == {"model", "messages", "temperature"}


def test_a_refusal_of_something_else_ends_it(server: Server) -> None:
    """So does one that names a field that the user has set, or that is gone already."""
    server.script = [(400, _refusal("max_model_len is 512"))]
    with pytest.raises(ValueError, match=r"refuses \(HTTP 400, .*512.*--judge-request"):
        Endpoint(server.url, "m").ask("1", "p")
    server.script = [(400, TEMPERATURE), (400, TEMPERATURE)]
    with pytest.raises(ValueError, match="refuses"):
        Endpoint(server.url, "m").ask("1", "p")
    server.script = [(400, TEMPERATURE)]
    with pytest.raises(ValueError, match="refuses"):
        Endpoint(server.url, "m", request={"temperature": 0.2}).ask("1", "p")
    assert server.script == []


def test_fields_of_the_request_can_be_set(server: Server, tmp_path: Path) -> None:
    record = tmp_path / "r.jsonl"
    server.script = ["<think>", "0.5", "0.7"]
    assert Endpoint(server.url, "m", record=record).ask("1", "p") == "<think>"
    request = {"max_completion_tokens": 4096, "temperature": None, "reasoning_effort": "low"}
    judge = Endpoint(server.url, "m", record=record, request=request)
    # A reply to another request is none to this one.
    assert judge.ask("1", "p", max_tokens=3) == "0.5"
    assert server.requests[-1][2] == {
        "model": "m",
        "messages": [{"role": "user", "content": "p"}],
        "max_completion_tokens": 4096,
        "reasoning_effort": "low",
    }
    assert judge.notes[0] == (
        "--judge-request set max_completion_tokens to 4096 in the judge's request"
    )
    assert Endpoint(server.url, "m", record=record, request=request).ask("1", "p") == "0.5"
    assert len(server.requests) == 2
    replay = Replay(record)
    assert replay.ask("1", "p") == "0.5" and replay.notes == judge.notes
    for name in ("model", "messages", "stream", "n"):
        with pytest.raises(
            ValueError, match=f"the field {name} of the judge's request is not free"
        ):
            Endpoint(server.url, "m", request={name: 2})


@pytest.mark.parametrize(
    ("reply", "rest"),
    [
        ("0.5", "0.5"),
        ("<think>0.1 or 0.2?</think>\n0.5", "\n0.5"),
        ("<think>a</think>0.5<think>b</think>", "0.5"),
        ("<thinking>\nOkay,", ""),
        ("0.5 <think> sure", "0.5 "),
        ("so 0.1 it is</think> 0.5", " 0.5"),
        ("[THINK]hm[/THINK]0.5", "0.5"),
        ("<Think>0.1?</Think>0.5", "0.5"),
        ('<thinking budget="9">0.1 or', ""),
        ("◁think▷0.1?◁/think▷0.5", "0.5"),
        ("◁think▷0.1 or", ""),
        (
            "<|channel|>analysis<|message|>0.1?<|end|><|start|>assistant"
            "<|channel|>final <|constrain|>json<|message|>0.5",
            "0.5",
        ),
        ("<|channel|>analysis<|message|>0.1 or", ""),
        ("I <b>think</b> 0.5", "I <b>think</b> 0.5"),
        ("", ""),
    ],
)
def test_the_part_in_which_a_judge_thinks_is_left_out(reply: str, rest: str) -> None:
    assert strip_reasoning(reply) == rest


def test_replies_that_could_not_be_read_are_asked_for_again(server: Server, tmp_path: Path) -> None:
    record = tmp_path / "r.jsonl"
    server.script = ["hm", "hm", "1.0", "0.5", "B"]
    first = Endpoint(server.url, "m", record=record)
    assert [first.ask("1", "p"), first.ask("1", "again", attempt=1)] == ["hm", "hm"]
    assert first.ask("2", "p") == "1.0"
    first.forget("1")
    # A replay shows the same failure, and the next call asks about this question alone.
    assert [Replay(record).ask("1", "p"), Replay(record).ask("2", "p")] == ["hm", "1.0"]
    again = Endpoint(server.url, "m", record=record)
    assert [again.ask("2", "p"), again.ask("1", "p")] == ["1.0", "0.5"]
    assert len(server.requests) == 4
    assert [Replay(record).ask("1", "p"), Replay(record).ask("2", "p")] == ["0.5", "1.0"]
    assert Endpoint(server.url, "m", record=record).ask("1", "p") == "0.5"
    Endpoint(server.url, "m").forget("1")  # without a record there is nothing to void


def test_a_reply_that_was_cut_stays_known_as_cut(server: Server, tmp_path: Path) -> None:
    cut = {"choices": [{"message": {"content": "Score: 0"}, "finish_reason": "length"}]}
    whole = {"choices": [{"message": {"content": "Score: 0"}, "finish_reason": "stop"}]}
    server.script = [(200, json.dumps(cut)), (200, json.dumps(whole)), "Score: 0"]
    record = tmp_path / "r.jsonl"
    judge = Endpoint(server.url, "m", record=record)
    assert [judge.ask(name, "p").is_cut for name in "123"] == [True, False, False]
    for again in (Endpoint(server.url, "m", record=record), Replay(record)):
        assert [again.ask(name, "p").is_cut for name in "123"] == [True, False, False]
