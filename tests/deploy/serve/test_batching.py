"""The transformers engine itself: who shares a batch, and how it stops."""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Callable, Coroutine
from dataclasses import replace
from threading import Event
from typing import Any

import pytest
import torch
from PIL import Image

from mipha.assistant import Assistant
from mipha.data.sample import IMAGE, Message
from mipha.deploy.serve.batching import TransformersEngine
from mipha.deploy.serve.engine import Piece, ServiceError
from mipha.deploy.serve.metrics import Metrics
from mipha.deploy.serve.requests import ChatRequest, RequestError, Turn

SEED = 8
"""Seed of drawn answers; none of those below ends early with it."""


def request(question: str, image: Image.Image | None = None, **changes: Any) -> ChatRequest:
    fields = {
        "max_new_tokens": 6,
        "temperature": 0.0,
        "top_p": 1.0,
        "stop": (),
        "seed": None,
    } | changes
    return ChatRequest(
        (Turn("user", question, (image,) if image else ()),),
        **fields,
        stream=True,
        include_usage=False,
        model="tiny",
    )


async def read(engine: TransformersEngine, asked: ChatRequest) -> list[Piece]:
    return [piece async for piece in engine.submit(engine.prepare(asked))]


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_adapters_are_asked_for_by_name_and_never_share_a_batch(tiny_model: Callable) -> None:
    base = Assistant(*tiny_model("llama"))
    model, processor = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    other = Assistant(model, processor)
    image = Image.new("RGB", (30, 30), "red")
    names = ["tiny", "mine", "tiny", "mine"]

    async def use(engine: TransformersEngine) -> list[str]:
        asked = [replace(request("Which colour?", image), model=name) for name in names]
        pieces = await asyncio.gather(*(read(engine, one) for one in asked))
        return [text_of(one) for one in pieces]

    texts, _ = with_engine(base, use, adapters={"mine": other})
    expected = {
        name: one.answer(image, "Which colour?", max_new_tokens=6).text
        for name, one in (("tiny", base), ("mine", other))
    }
    assert expected["tiny"] != expected["mine"]
    assert [text.strip() for text in texts] == [expected[name] for name in names]


def with_engine(
    assistant: Assistant,
    use: Callable[[TransformersEngine], Coroutine[Any, Any, Any]],
    **options: Any,
) -> tuple[Any, Metrics]:
    metrics = Metrics()

    async def main() -> Any:
        engine = TransformersEngine(assistant, metrics, **options)
        await engine.start()
        try:
            return await use(engine)
        finally:
            await engine.close()
            assert not engine.is_alive()

    return asyncio.run(main()), metrics


def count(metrics: Metrics, name: str) -> int:
    return next(
        int(float(line.split()[1]))
        for line in metrics.text().splitlines()
        if line.startswith(f"mipha_{name} ")
    )


def batches(metrics: Metrics) -> int:
    return count(metrics, "batches_total")


def test_images_are_counted_by_whether_their_features_were_still_there(
    assistant: Assistant, make_image: Callable[[int], Image.Image]
) -> None:
    encoded, found = assistant.features.num_encoded, assistant.features.num_found

    async def use(engine: TransformersEngine) -> None:
        for _ in range(3):
            await read(engine, request("Which colour?", make_image(77)))

    _, metrics = with_engine(assistant, use)
    assert count(metrics, "images_encoded_total") == encoded + 1
    assert count(metrics, "images_found_total") == found + 2


@pytest.mark.parametrize(
    ("options", "num_batches"),
    [
        ({}, 1),
        ({"batch_size": 2}, 3),
        ({"batch_tokens": 2 * (22 + 6)}, 3),  # each has 22 tokens and may get 6
        ({"batch_tokens": 1}, 5),
    ],
)
def test_who_shares_a_batch(
    assistant: Assistant,
    gate: Event,
    make_image: Callable[[int], Image.Image],
    options: dict[str, int],
    num_batches: int,
) -> None:
    asked = [request("Which colour?", make_image(number)) for number in range(5)]
    assert len(assistant.prompt_ids([Message("user", f"{IMAGE}\nWhich colour?")])) == 22
    wanted = [
        assistant.answer(make_image(number), "Which colour?", max_new_tokens=6)
        for number in range(5)
    ]

    async def use(engine: TransformersEngine) -> list[list[Piece]]:
        gate.clear()
        before = asyncio.ensure_future(read(engine, request("yes or no")))
        while not engine._running:
            await asyncio.sleep(0.01)
        reading = [asyncio.ensure_future(read(engine, one)) for one in asked]
        while len(engine._waiting) < len(asked):
            await asyncio.sleep(0.01)
        gate.set()
        await before
        return await asyncio.gather(*reading)

    answers, metrics = with_engine(assistant, use, **options)
    assert [text_of(pieces) for pieces in answers] == [answer.text for answer in wanted]
    assert [pieces[-1].end.completion_tokens for pieces in answers] == [
        answer.num_tokens for answer in wanted
    ]
    assert batches(metrics) == 1 + num_batches


def test_a_short_answer_does_not_wait_for_a_long_one(assistant: Assistant, gate: Event) -> None:
    """Its end is reported in the step in which it ends, while its neighbour goes on."""

    async def use(engine: TransformersEngine) -> tuple[bool, list[Piece]]:
        gate.clear()
        before = asyncio.ensure_future(read(engine, request("left?")))
        while not engine._running:
            await asyncio.sleep(0.01)
        long = asyncio.ensure_future(
            read(engine, request("Which colour is it?", max_new_tokens=200))
        )
        short = asyncio.ensure_future(read(engine, request("yes or no", max_new_tokens=1)))
        while len(engine._waiting) < 2:
            await asyncio.sleep(0.01)
        gate.set()
        await before
        (*_, piece) = await short
        going_on = not long.done()
        assert piece.end is not None and piece.end.completion_tokens == 1
        return going_on, await long

    (going_on, pieces), metrics = with_engine(assistant, use)
    assert going_on and pieces[-1].end.completion_tokens > 100 and batches(metrics) == 2


def test_a_row_that_met_its_stop_text_computes_no_further(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[list[int | None]] = []
    generate = assistant.generate

    def watched(prompts: Any, on_tokens: Callable[[list[int | None]], Any]) -> Any:
        return generate(prompts, lambda tokens: steps.append(list(tokens)) or on_tokens(tokens))

    monkeypatch.setattr(assistant, "generate", watched)

    async def use(engine: TransformersEngine) -> None:
        pieces = await read(engine, request("left?", max_new_tokens=40))
        assert pieces[-1].end.completion_tokens > 4
        steps.clear()
        first = text_of(pieces)[0]
        stopped = request("left?", max_new_tokens=40, stop=(first,))
        await asyncio.gather(
            read(engine, stopped), read(engine, request("Which colour is it?", max_new_tokens=40))
        )

    with_engine(assistant, use)
    spoken = sorted(sum(token is not None for token in row) for row in zip(*steps, strict=True))
    assert spoken[0] <= 2 and spoken[1] > 4


def test_one_token_of_room_is_room(assistant: Assistant) -> None:
    async def use(engine: TransformersEngine) -> int:
        length = len(engine.prepare(request("left?")).prompt.ids)
        engine._context = length + 1
        (*_, piece) = await read(engine, request("left?"))
        assert piece.end.completion_tokens == 1
        engine._context = length
        with pytest.raises(RequestError, match="shorten it"):
            engine.prepare(request("left?"))
        return length

    assert with_engine(assistant, use)[0]


def test_stopping_fails_what_waits_and_what_runs(assistant: Assistant, gate: Event) -> None:
    async def use(engine: TransformersEngine) -> list[Any]:
        gate.clear()
        reading = [
            asyncio.ensure_future(read(engine, request("left?", max_new_tokens=300)))
            for _ in range(3)
        ]
        while not engine._running:
            await asyncio.sleep(0.01)
        engine.abort()
        ended = await asyncio.gather(
            *reading, read(engine, request("yes or no")), return_exceptions=True
        )
        gate.set()
        return ended

    ended, _ = with_engine(assistant, use, batch_size=2)
    assert [(type(error), error.status) for error in ended] == [(ServiceError, 503)] * 4


def test_a_conversation_longer_than_the_context_is_refused_and_an_answer_is_cut_to_it(
    assistant: Assistant,
) -> None:
    context = assistant.model.config.text_config.max_position_embeddings

    async def use(engine: TransformersEngine) -> list[Piece]:
        with pytest.raises(
            RequestError, match=rf"and the model reads {context}: shorten it"
        ) as refused:
            engine.prepare(request("no " * context))
        assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
        return await read(
            engine,
            request("no " * ((context - 80) // 2), max_new_tokens=10_000, stop=("never said",)),
        )

    pieces, _ = with_engine(assistant, use)
    end = pieces[-1].end
    assert end.reason == "stop" or end.prompt_tokens + end.completion_tokens == context


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("for message in messages", "for message in messages[1:]", "does not write 'Be brief.'"),
        ("message.role + ", "(raise_exception('no system') if loop.first else '') + ", "no system"),
    ],
)
def test_a_conversation_that_the_template_refuses_is_the_senders_fault(
    tiny_model: Callable, old: str, new: str, reason: str
) -> None:
    model, processor = tiny_model("llama")
    processor = copy.copy(processor)
    processor.chat_template = processor.chat_template.replace(old, new)
    asked = request("Which colour?")
    asked = replace(asked, turns=(Turn("system", "Be brief."), *asked.turns))

    async def use(engine: TransformersEngine) -> None:
        with pytest.raises(RequestError, match=re.escape(reason)) as refused:
            engine.prepare(asked)
        assert (refused.value.status, refused.value.param) == (400, "messages")

    with_engine(Assistant(model, processor), use)


def test_a_decoded_image_is_not_encoded_again(
    assistant: Assistant, make_image: Callable[[int], Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding and decoding twelve megapixels once more takes seconds."""
    image = make_image(1)
    wanted = assistant.pixels(image)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an image file is written or read")

    monkeypatch.setattr("PIL.Image.Image.save", refuse)
    monkeypatch.setattr("PIL.Image.open", refuse)
    row = TransformersEngine(assistant, Metrics()).prepare(request("Which colour?", image))
    assert len(row.prompt.images) == 1 and torch.equal(
        row.prompt.images[0].inputs["pixel_values"], wanted
    )


def failing(assistant: Assistant, poison: str, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every batch fail that holds a question, once it has made some tokens."""
    generate = Assistant.generate
    poisoned = assistant.prompt_ids([Message("user", poison)])

    def generating(self: Assistant, prompts: Any, on_tokens: Any = None, **more: Any) -> Any:
        steps = 0

        def told(tokens: list[int | None]) -> Any:
            nonlocal steps
            steps += 1
            if steps > after and poisoned in [prompt.ids for prompt in prompts]:
                raise RuntimeError("a poisoned batch")
            return on_tokens(tokens)

        return generate(self, prompts, told if on_tokens else None, **more)

    monkeypatch.setattr(Assistant, "generate", generating)


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_failed_request_fails_alone(
    assistant: Assistant,
    gate: Event,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    temperature: float,
) -> None:
    """Its neighbours get their answers, each piece once, whatever was sent before the failure."""
    questions = ["Which colour is it?", "poison?", "left or right, or neither?"]

    def asked(question: str, seed: int | None) -> ChatRequest:
        return request(question, max_new_tokens=9, temperature=temperature, seed=seed)

    async def alone(engine: TransformersEngine) -> list[list[Piece]]:
        return [await read(engine, asked(question, SEED)) for question in questions]

    async def together(engine: TransformersEngine) -> list[Any]:
        gate.clear()
        before = asyncio.ensure_future(read(engine, request("left?")))
        while not engine._running:
            await asyncio.sleep(0.01)
        reading = [
            asyncio.ensure_future(read(engine, asked(question, None))) for question in questions
        ]
        while len(engine._waiting) < len(questions):
            await asyncio.sleep(0.01)
        gate.set()
        await before
        return await asyncio.gather(*reading, return_exceptions=True)

    wanted, _ = with_engine(assistant, alone)
    # A drawn answer could end before it fails: the seed that the engine draws is held too.
    assert wanted[1][-1].end.completion_tokens == 9
    monkeypatch.setattr("mipha.deploy.serve.batching.secrets.randbits", lambda bits: SEED)

    failing(assistant, "poison?", after, monkeypatch)
    (first, failed, last), metrics = with_engine(assistant, together)
    assert isinstance(failed, ServiceError) and failed.status == 500
    assert batches(metrics) == 2
    for pieces, undisturbed in ((first, wanted[0]), (last, wanted[2])):
        assert sum(piece.end is not None for piece in pieces) == 1
        assert pieces[-1].end == undisturbed[-1].end
        assert text_of(pieces) == text_of(undisturbed)


def test_stopping_fails_those_too_who_are_to_be_answered_again(
    assistant: Assistant, gate: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(assistant, "poison?", 1, monkeypatch)

    async def use(engine: TransformersEngine) -> list[Any]:
        gate.clear()
        before = asyncio.ensure_future(read(engine, request("left?")))
        while not engine._running:
            await asyncio.sleep(0.01)
        reading = [
            asyncio.ensure_future(read(engine, request(text, max_new_tokens=300)))
            for text in ("poison?", "Which colour?", "left?")
        ]
        while len(engine._waiting) < 3:
            await asyncio.sleep(0.01)
        gate.set()
        await before

        # The batch of three fails at its second step; then each is answered alone.
        while len(engine._batch) != 3 or len(engine._running) != 1:
            await asyncio.sleep(0)
            assert not all(task.done() for task in reading)
        engine.abort()
        return await asyncio.gather(*reading, return_exceptions=True)

    ended, _ = with_engine(assistant, use)
    assert [type(error) for error in ended] == [ServiceError] * 3


def test_a_tiny_temperature_is_greedy(assistant: Assistant) -> None:
    async def use(engine: TransformersEngine) -> list[Any]:
        return await asyncio.gather(
            *(read(engine, request("left?", temperature=t)) for t in (0.0, 1e-320, 5e-324, 1e-9))
        )

    ended, _ = with_engine(assistant, use)
    texts = {text_of(pieces) for pieces in ended}
    assert texts == {assistant.answer(None, "left?", max_new_tokens=6).text}
