"""Who waits for whom: texts, images and addresses; and conversations that clients send back."""

from __future__ import annotations

import asyncio
import base64
import struct
import zlib
from collections.abc import Callable
from threading import Event
from typing import Any

import httpx
import openai
import pytest

import mipha.deploy.serve.chat as serve_chat
from mipha.deploy.serve.chat import Bounds
from mipha.deploy.serve.requests import Limits

CHAT = "/v1/chat/completions"


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def zeros_png(side: int, depth: int, colour: int, interlaced: int) -> bytes:
    """Return a small file that is large when it is decoded."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    size = side * side * channels * depth // 8 + 16 * side
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, interlaced)
    packed = zlib.compress(bytes(size), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    )


def asks(content: Any, **fields: Any) -> dict[str, Any]:
    turns = content if isinstance(content, list) else [{"role": "user", "content": content}]
    return {"model": "tiny", "messages": turns, "max_tokens": 2, **fields}


def about_file(data: bytes) -> dict[str, Any]:
    return about_url(f"data:image/png;base64,{base64.b64encode(data).decode()}")


def about_url(url: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    return asks([{"role": "user", "content": parts}])


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_file_that_is_large_when_decoded_is_refused(serving: Callable) -> None:
    bomb = zeros_png(5_000, 16, 6, interlaced=1)
    assert len(bomb) < 250_000 and Limits().max_pixels >= 5_000 * 5_000
    with serving() as server:
        refused = server.http.post(CHAT, json=about_file(bomb))
        assert refused.status_code == 400
        assert "400,000,000 bytes would be decoded" in refused.json()["error"]["message"]
        ordinary = zeros_png(300, 16, 6, interlaced=1)
        assert server.http.post(CHAT, json=about_file(ordinary)).status_code == 200


def test_images_share_the_bytes_of_their_request(serving: Callable) -> None:
    one = zeros_png(100, 8, 2, interlaced=0)  # 30,000 bytes decoded
    (turn,) = about_file(one)["messages"]
    twice = asks([turn, {"role": "assistant", "content": "A."}, turn])
    for limit, status in ((60_000, 200), (59_999, 400)):
        with serving(bounds=Bounds(limits=Limits(decoded_bytes=limit))) as server:
            assert server.http.post(CHAT, json=twice).status_code == status


def test_a_text_does_not_wait_for_images_and_too_many_images_are_told_so(
    serving: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_again, decode = Event(), serve_chat.decode_images

    def slow(parsed: Any, limits: Limits) -> Any:
        assert not parsed.images or open_again.wait(60)
        return decode(parsed, limits)

    monkeypatch.setattr(serve_chat, "decode_images", slow)
    one = zeros_png(100, 8, 2, interlaced=0)  # 30,000 bytes decoded

    async def crowd(server: Any) -> tuple[int, list[int], list[int]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as http:
            with_images = [
                asyncio.ensure_future(http.post(CHAT, json=about_file(one))) for _ in range(5)
            ]
            await wait_until(lambda: sum(task.done() for task in with_images) == 2)
            texts = [(await http.post(CHAT, json=asks("yes?"))).status_code for _ in range(3)]
            busy = [task.result().status_code for task in with_images if task.done()]
            open_again.set()
            done = await asyncio.gather(*with_images)
            later = (await http.post(CHAT, json=about_file(one))).status_code
            return later, texts, busy + [response.status_code for response in done]

    with serving(bounds=Bounds(image_bytes=90_000)) as server:
        later, texts, images = asyncio.run(crowd(server))
        assert server.comes_to_rest()
    assert texts == [200, 200, 200] and later == 200
    assert sorted(images) == [200, 200, 200, 429, 429, 429, 429]


def test_small_images_pass_large_ones_in_time_and_in_memory(
    serving: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_again, decode = Event(), serve_chat.decode_images

    def slow(parsed: Any, limits: Limits) -> Any:
        assert "large" not in parsed.drafts[0].text or open_again.wait(60)
        return decode(parsed, limits)

    monkeypatch.setattr(serve_chat, "decode_images", slow)
    monkeypatch.setattr(serve_chat, "_LARGE_BYTES", 100_000)
    small, large = (
        zeros_png(side, 8, 2, interlaced=0) for side in (100, 200)
    )  # 30,000 and 120,000
    asked = about_file(large)
    asked["messages"][0]["content"].append({"type": "text", "text": "A large one?"})

    async def crowd(server: Any) -> tuple[list[int], list[int]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as http:
            slow_ones = [asyncio.ensure_future(http.post(CHAT, json=asked)) for _ in range(5)]
            await wait_until(lambda: sum(task.done() for task in slow_ones) == 2)
            quick = [(await http.post(CHAT, json=about_file(small))).status_code for _ in range(3)]
            open_again.set()
            return quick, [each.status_code for each in await asyncio.gather(*slow_ones)]

    with serving(bounds=Bounds(image_bytes=4 * 120_000 + 1_000)) as server:
        quick, slow_ones = asyncio.run(crowd(server))
    assert quick == [200, 200, 200]
    assert sorted(slow_ones) == [200, 200, 200, 429, 429]


def test_an_address_that_does_not_answer_keeps_nobody_waiting(
    serving: Callable, monkeypatch: pytest.MonkeyPatch, make_image: Callable
) -> None:
    fetching: list[str] = []

    async def never(url: str, **_: Any) -> bytes:
        fetching.append(url)
        await asyncio.sleep(60)
        raise AssertionError("not awaited so long")

    async def fetch_never(parsed: Any, limits: Limits) -> Any:
        return await fetch(parsed, limits, never)

    fetch = serve_chat.fetch_images
    monkeypatch.setattr(serve_chat, "fetch_images", fetch_never)

    async def crowd(url: str) -> list[int]:
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
            remote = about_url("https://slow.test/a.png")
            slow = [asyncio.ensure_future(http.post(CHAT, json=remote)) for _ in range(6)]
            await wait_until(lambda: len(fetching) == 2)
            local = about_file(zeros_png(20, 8, 2, interlaced=0))
            others = [await http.post(CHAT, json=asked) for asked in (asks("yes?"), local)]
            assert not any(task.done() for task in slow) and len(fetching) == 2
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)
            return [response.status_code for response in others]

    limits = Limits(allow_remote=True)
    with serving(bounds=Bounds(limits=limits, fetches=2)) as server:
        assert asyncio.run(crowd(server.url)) == [200, 200]
        assert server.comes_to_rest()


def test_fetched_images_share_the_memory_for_bodies(
    serving: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def large(url: str, **_: Any) -> bytes:
        return bytes(10_000)

    fetch = serve_chat.fetch_images
    monkeypatch.setattr(
        serve_chat, "fetch_images", lambda parsed, limits: fetch(parsed, limits, large)
    )
    bounds = Bounds(limits=Limits(allow_remote=True), held_bytes=5_000)
    with serving(bounds=bounds) as server:
        refused = server.http.post(CHAT, json=about_url("https://large.test/a.png"))
        assert refused.status_code == 429
        assert server.http.post(CHAT, json=asks("yes?")).status_code == 200


# ---- What real clients send --------------------------------------------------------------------


def test_two_images_are_answered_in_one_turn_and_in_two(
    serving: Callable, assistant: Any, make_image: Callable, messages_about: Callable
) -> None:
    (first,), (second,) = (messages_about("Which?", make_image(number)) for number in (1, 2))
    together = [{"role": "user", "content": [first["content"][0], *second["content"]]}]
    apart = [first, {"role": "assistant", "content": "This."}, second]
    with serving() as server:
        answers = [
            server.http.post(CHAT, json=asks(turns, max_tokens=12)).json()["choices"][0]
            for turns in (together, apart, [second])
        ]
        refused = server.http.post(CHAT, json=asks([first, apart[1]] * 4 + [second]))
    texts = [answer["message"]["content"] for answer in answers]
    assert len(set(texts)) == 3, "the first image has its part in the answer"
    assert refused.status_code == 400 and "--max-images" in refused.json()["error"]["message"]


def test_the_body_of_an_evaluation_toolkit_is_answered(
    serving: Callable, make_image: Callable, messages_about: Callable
) -> None:
    """VLMEvalKit's wrapper always sends a detail, and asks for 2,048 tokens by default."""
    (turn,) = messages_about("what colour?", make_image(1))
    turn["content"][0]["image_url"]["detail"] = "low"
    with serving(bounds=Bounds(limits=Limits(max_new_tokens=5))) as server:
        asked = {"model": "tiny", "messages": [turn], "n": 1, "temperature": 0, "max_tokens": 2048}
        answer = server.http.post(CHAT, json=asked)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("answer", ["", None, "<|im_end|>", "a <image> b", "</s>", "\0"])
def test_an_answer_is_taken_back_as_history(
    serving: Callable, make_image: Callable, messages_about: Callable, answer: str | None
) -> None:
    first = messages_about("what colour?", make_image(1))
    with (
        serving() as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        turns = [*first, {"role": "assistant", "content": answer}]
        turns.append({"role": "user", "content": "and what shape?"})
        said = client.chat.completions.create(model="tiny", messages=turns, max_tokens=4)
        assert said.usage.completion_tokens


def test_an_answer_that_stops_at_once_can_be_gone_on_from(
    serving: Callable, assistant: Any
) -> None:
    question = {"role": "user", "content": "Which colour?"}
    whole = assistant.answer(None, "Which colour?", max_new_tokens=8).text
    with serving() as server:
        empty = server.http.post(CHAT, json=asks([question], max_tokens=8, stop=[whole[0]])).json()
        message = empty["choices"][0]["message"]
        assert message["content"] == ""
        turn = {name: message[name] for name in ("role", "content", "refusal")}
        again = server.http.post(CHAT, json=asks([question, turn, question]))
    assert again.status_code == 200, again.text
