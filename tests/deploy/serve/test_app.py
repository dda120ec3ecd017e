"""OpenAI's own client at a real server: answers, streams, usage, names, keys and errors."""

from __future__ import annotations

import asyncio
import gzip
import socket
from collections.abc import Callable
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from PIL import Image

from mipha.assistant import Assistant
from mipha.deploy.serve.chat import Bounds
from mipha.deploy.serve.gate import Access, HostNames
from mipha.deploy.serve.requests import Limits

CHAT = "/v1/chat/completions"
LOCAL = HostNames(frozenset({"localhost", "127.0.0.1", "::1"}))
JSON = {"content-type": "application/json"}
QUESTIONS = (
    "Which colour?",
    "Is it a circle, a square or a triangle? Look well.",
    "yes or no",
    "left or right in the picture?",
)


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def ask(http: httpx.Client, **changes: Any) -> httpx.Response:
    content = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "yes or no"}],
        "max_tokens": 4,
    } | changes
    return http.post(CHAT, json=content)


def test_the_clients_answers_are_the_assistants(
    serving: Callable,
    assistant: Assistant,
    make_image: Callable[[int], Image.Image],
    messages_about: Callable,
) -> None:
    with serving() as server, client(server.url) as asked:
        assert [model.id for model in asked.models.list()] == ["tiny"]
        assert asked.models.retrieve("tiny").object == "model"
        num_pieces = 0
        for number, question in enumerate(QUESTIONS):
            image = make_image(number) if number != 2 else None
            wanted = assistant.answer(image, question, max_new_tokens=12)
            said = asked.chat.completions.create(
                model="tiny", messages=messages_about(question, image), max_tokens=12
            )
            assert said.choices[0].message.content == wanted.text
            assert said.choices[0].finish_reason == ("stop" if wanted.finished else "length")
            assert said.usage is not None and said.usage.completion_tokens == wanted.num_tokens
            # Two by two patches of the image, and the words around them.
            text_only = asked.chat.completions.create(
                model="tiny", messages=messages_about(question), max_tokens=1
            ).usage
            assert text_only is not None and said.usage.prompt_tokens >= text_only.prompt_tokens + (
                4 if image else 0
            )
            assert (
                said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens
            )

            stream = asked.chat.completions.create(
                model="tiny",
                messages=messages_about(question, image),
                max_completion_tokens=12,
                stream=True,
                stream_options={"include_usage": True},
            )
            *chunks, counted = list(stream)
            assert counted.choices == [] and counted.usage == said.usage
            assert {chunk.id for chunk in chunks} == {counted.id} and all(
                chunk.usage is None for chunk in chunks
            )
            assert chunks[0].choices[0].delta.role == "assistant"
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted.text
            reasons = [chunk.choices[0].finish_reason for chunk in chunks]
            assert reasons == [None] * (len(chunks) - 1) + [said.choices[0].finish_reason]
            num_pieces += len(chunks) - 2
        assert num_pieces > 2 * len(QUESTIONS), (
            "they came piece by piece, as far as bytes of a random model are characters"
        )


def test_a_conversation_a_seed_and_a_stop(
    serving: Callable, make_image: Callable, messages_about: Callable
) -> None:
    with serving() as server, client(server.url) as asked:
        turns = messages_about(QUESTIONS[0], make_image(1))
        whole = (
            asked.chat.completions.create(model="tiny", messages=turns, max_tokens=12)
            .choices[0]
            .message.content
        )
        assert whole is not None and len(whole) > 4
        middle = whole[2:4]
        cut = asked.chat.completions.create(
            model="tiny", messages=turns, max_tokens=12, stop=[middle]
        ).choices[0]
        assert (cut.message.content, cut.finish_reason) == (
            whole[: whole.index(middle)].strip(),
            "stop",
        )
        follow = [
            *turns,
            {"role": "assistant", "content": whole},
            {"role": "user", "content": "Sure?"},
        ]
        first = (
            asked.chat.completions.create(model="tiny", messages=follow, max_tokens=12)
            .choices[0]
            .message.content
        )
        assert (
            first
            == asked.chat.completions.create(model="tiny", messages=follow, max_tokens=12)
            .choices[0]
            .message.content
        )
        drawn = [
            asked.chat.completions.create(
                model="tiny", messages=turns, max_tokens=12, temperature=2, seed=seed
            )
            .choices[0]
            .message.content
            for seed in (1, 1, 2, 3)
        ]
        assert drawn[0] == drawn[1] and len({*drawn, whole}) > 2


def test_64_clients_at_once_each_get_their_own_answer(
    serving: Callable, assistant: Assistant, make_image: Callable, messages_about: Callable
) -> None:
    pairs = [
        (make_image(number) if number % 5 else None, f"{QUESTIONS[number % 4]} {number}")
        for number in range(64)
    ]
    lengths = [3 + number % 5 for number in range(64)]
    wanted = [
        assistant.answer(*pair, max_new_tokens=length)
        for pair, length in zip(pairs, lengths, strict=True)
    ]
    assert len({answer.text for answer in wanted}) > 32, (
        "answers that are alike would hide a mix-up"
    )

    async def one(asked: openai.AsyncOpenAI, number: int) -> str:
        (image, question), length = pairs[number], lengths[number]
        given = {"model": "tiny", "messages": messages_about(question, image), "max_tokens": length}
        if number % 2:
            return (await asked.chat.completions.create(**given)).choices[0].message.content
        stream = await asked.chat.completions.create(**given, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def everyone(url: str) -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120
        ) as asked:
            return await asyncio.gather(*(one(asked, number) for number in range(64)))

    with serving() as server:
        assert asyncio.run(everyone(server.url)) == [answer.text for answer in wanted]
        assert server.metric(f'requests_total{{path="{CHAT}",status="200"}}') == 64
        assert (
            server.metric("batch_rows_total")
            == server.metric("request_seconds_count")
            == server.metric("first_token_seconds_count")
            == 64
        )
        assert server.metric("batches_total") < 32, "they were answered together"
        assert server.metric("completion_tokens_total") == sum(
            answer.num_tokens for answer in wanted
        )
        assert server.comes_to_rest()
        assert f"mipha_batch_rows_total {64}" in server.http.get("/metrics").text


def test_one_request_too_many_is_told_to_come_back(serving: Callable, gate: Event) -> None:
    async def crowd(url: str) -> list[httpx.Response]:
        content = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "yes or no"}],
            "max_tokens": 3,
        }
        async with httpx.AsyncClient(timeout=60) as http:
            asked = [asyncio.ensure_future(http.post(url + CHAT, json=content)) for _ in range(5)]
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            while len(done) < 2:
                more, _ = await asyncio.wait(set(asked) - done, return_when=asyncio.FIRST_COMPLETED)
                done |= more
            assert {task.result().status_code for task in done} == {429}
            gate.set()
            return await asyncio.gather(*asked)

    gate.clear()
    with serving(bounds=Bounds(max_requests=3), batch_size=1) as server:
        responses = asyncio.run(crowd(server.url))
        assert sorted(response.status_code for response in responses) == [200, 200, 200, 429, 429]
        refused = next(response for response in responses if response.status_code == 429)
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "server_busy" and refused.json()["error"][
            "message"
        ].endswith("ask again in a moment")
        assert ask(server.http).status_code == 200


def test_an_answer_that_takes_too_long_is_given_up(
    serving: Callable, gate: Event, assistant: Assistant
) -> None:
    with serving(bounds=Bounds(request_seconds=1)) as server:
        gate.clear()
        late = ask(server.http)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        gate.set()
        assert ask(server.http).status_code == 200
        steps = []

        def close_on_the_way(*_: object) -> None:
            steps.append(1)
            if len(steps) == 8:
                gate.clear()

        hook = assistant.model.lm_head.register_forward_pre_hook(close_on_the_way)
        try:
            with (
                pytest.raises(openai.APIError, match=r"no whole answer within 1 seconds"),
                client(server.url) as asked,
            ):
                for chunk in asked.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": "Which colour?"}],
                    max_tokens=30,
                    stream=True,
                ):
                    assert chunk.choices
        finally:
            hook.remove()
            gate.set()
        assert server.metric('failed_streams_total{code="timeout"}') == 1
        assert ask(server.http).status_code == 200


def test_a_client_that_leaves_frees_its_place(serving: Callable, gate: Event) -> None:
    with serving(bounds=Bounds(max_requests=2), batch_size=1) as server:
        gate.clear()
        for stream in (False, True):
            with pytest.raises(httpx.ReadTimeout):
                server.http.post(
                    CHAT,
                    json={
                        "model": "tiny",
                        "messages": [{"role": "user", "content": "left?"}],
                        "max_tokens": 400,
                        "stream": stream,
                    },
                    timeout=httpx.Timeout(10, read=0.3),
                )
        while server.metric("cancelled_total") < 2:
            assert server.http.get("/health").status_code == 200
        gate.set()
        assert ask(server.http).status_code == 200
        assert server.metric("batch_rows_total") == 2, (
            "who left while waiting was never generated for"
        )


def test_a_failing_model_is_a_sentence_and_the_server_lives(
    serving: Callable, assistant: Assistant
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret of the inside")

    with serving() as server:
        hook = assistant.model.model.language_model.register_forward_pre_hook(fail)
        try:
            failed = ask(server.http)
        finally:
            hook.remove()
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
        assert "secret" not in failed.text and "Traceback" not in failed.text
        assert ask(server.http).status_code == 200
        assert server.http.get("/health").json() == {
            "status": "ok",
            "engine": "transformers",
            "model": "tiny",
        }


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "sentence"),
    [
        ("POST", CHAT, {"content": b"{", "headers": JSON}, 400, "the body is no JSON"),
        (
            "POST",
            CHAT,
            {"content": b"{}", "headers": {"content-type": "text/plain"}},
            415,
            "must be application/json",
        ),
        (
            "POST",
            CHAT,
            {"content": gzip.compress(b"{}"), "headers": {**JSON, "content-encoding": "gzip"}},
            415,
            "a compressed body is not read: send it without Content-Encoding",
        ),
        (
            "POST",
            CHAT,
            {"json": {"model": "gpt-4o", "messages": [{"role": "user", "content": "?"}]}},
            404,
            "ask for 'tiny'",
        ),
        (
            "POST",
            CHAT,
            {"json": {"model": "tiny", "messages": [{"role": "user", "content": "no " * 600}]}},
            400,
            "the model reads 512",
        ),
        (
            "POST",
            CHAT,
            {"json": {"model": "tiny", "messages": [], "x": "y" * 60_000}},
            413,
            "more than 50,000 bytes",
        ),
        (
            "POST",
            CHAT,
            {"content": iter([b"y" * 30_000] * 2), "headers": JSON},
            413,
            "more than 50,000 bytes",
        ),
        ("GET", CHAT, {}, 405, "does not exist: ask with another method"),
        (
            "OPTIONS",
            CHAT,
            {"headers": {"origin": "https://evil.example"}},
            405,
            "ask with another method",
        ),
        ("GET", "/v1/models/other", {}, 404, "ask for 'tiny'"),
        ("GET", "/../../etc/passwd", {}, 404, "is not here"),
        ("GET", "/health", {"headers": {"x-long": "y" * 100_000}}, 431, "the headers have 100,"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_a_sentence(
    serving: Callable, method: str, path: str, options: dict[str, Any], status: int, sentence: str
) -> None:
    with serving(bounds=Bounds(limits=Limits(body_bytes=50_000))) as server:
        response = server.http.request(method, path, **options)
        assert response.status_code == status
        assert sentence in response.json()["error"]["message"]
        assert "access-control-allow-origin" not in response.headers
        assert ask(server.http).status_code == 200


def test_headers_without_end_are_cut_off(serving: Callable) -> None:
    with serving() as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"y" * 60_000)
            assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
        assert ask(server.http).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(serving: Callable) -> None:
    with serving(bounds=Bounds(body_seconds=0.2)) as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port)) as connection:
            head = (
                f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                "Content-Length: 100\r\n\r\n{"
            )
            connection.sendall(head.encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
        assert server.comes_to_rest()


def test_bodies_that_are_read_share_a_memory(serving: Callable) -> None:
    with serving(bounds=Bounds(held_bytes=1_000)) as server:
        assert (
            ask(server.http, messages=[{"role": "user", "content": "a" * 2_000}]).status_code == 429
        )
        assert ask(server.http).status_code == 200


def test_a_key_is_asked_for_everywhere_but_at_the_door(serving: Callable) -> None:
    with serving(access=Access(api_key="right")) as server:
        for path in ("/v1/models", "/v1/models/tiny", "/metrics"):
            assert server.http.get(path).status_code == 401
            assert (
                server.http.get(path, headers={"authorization": "Bearer right"}).status_code == 200
            )
        refused = server.http.post(CHAT, content=b"{", headers={"authorization": "Bearer wrong"})
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert server.http.get("/health").status_code == server.http.get("/").status_code == 200
        with (
            pytest.raises(openai.AuthenticationError, match="missing or wrong"),
            client(server.url) as asked,
        ):
            asked.models.list()
        with client(server.url, "right") as asked:
            assert [model.id for model in asked.models.list()] == ["tiny"]


def test_a_foreign_name_is_not_answered(serving: Callable) -> None:
    """A web page whose name was made to point to this machine sends that name."""
    with serving(access=Access(hosts=LOCAL)) as server:
        port = urlsplit(server.url).port
        for host, status in {
            f"localhost:{port}": 200,
            f"[::1]:{port}": 200,
            "LOCALHOST": 200,
            "evil.example": 421,
            "": 421,
        }.items():
            for path in ("/", "/v1/models", "/metrics"):
                assert server.http.get(path, headers={"host": host}).status_code == status, (
                    host,
                    path,
                )


def test_the_page_is_served_with_its_headers(serving: Callable) -> None:
    with serving() as server:
        response = server.http.get("/")
        assert response.status_code == 200 and response.headers["content-type"].startswith(
            "text/html"
        )
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers.get_list("x-content-type-options") == ["nosniff"]
