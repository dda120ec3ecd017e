"""Clients at a real server with a tiny model, and the count of right, wrong and lost answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import serving
from inference import noise_questions

CLIENTS = 4


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mipha.models.build import save_checkpoint

    folder = tmp_path_factory.mktemp("serving") / "tiny"
    save_checkpoint(*tiny_model("llama"), folder)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    asked = noise_questions(tmp_path_factory.mktemp("images"), CLIENTS)
    return [(image, f"{text} Again, {place}.") for place, (image, text) in enumerate(asked)]


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A server that answers one request at a time and lets none wait."""
    with serving.serving(checkpoint, "transformers", ["--max-requests", "1"]) as started:
        yield started


def test_right_wrong_and_refused_are_counted(
    checkpoint: Path, server: tuple[str, psutil.Process], questions: list
) -> None:
    expected = serving.answers_alone(checkpoint, "transformers", questions)
    assert len(set(expected)) > 1  # else a wrong answer could pass for a right one
    load = asyncio.run(
        serving.put_load(*server, questions, [*expected[:-1], "something else"], CLIENTS, 1.0)
    )
    assert load.seconds_each and len(load.seconds_each) == len(load.finished)
    assert load.wrong and all(text.endswith("alone 'something else'") for text in load.wrong)
    assert not load.lost
    assert load.busy > 0  # 4 clients, and room for 1
    assert load.memory[0][0] < 0.5 and load.memory[-1][0] >= max(load.finished)
    assert all(held > 0 for _, held in load.memory)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(SystemExit, match=r"ended with status 2:(.|\n)*no run or model folder"),
        serving.serving(tmp_path / "gone", "transformers"),
    ):
        pass


def test_the_figures_of_a_load() -> None:
    # 12 answers in 12 seconds, which are 6 parts of 2 seconds. The first part has one answer, the
    # second none, the others ten, and one comes after the end.
    finished = [0.5, *(4 + 0.8 * number for number in range(10)), 12.5]
    memory = [(float(second), 1.0 if second < 8 else 1.5) for second in range(13)]
    load = serving.Load(4, 12.0, [0.1 * number for number in range(1, 13)], finished, memory=memory)
    assert load.rates()[:2] == [0.5, 0.0] and sum(load.rates()) * 2 == 11
    assert serving.growth_mib(load) == pytest.approx(512)

    said = serving.sentence(load)
    assert (
        "12 right answers in 12.5 s, seconds p50 0.65, " in said
        and "longest 1.2; 0 lost, 0 wrong, 0 times told" in said
    )
    assert "1.00 GiB at the start, 1.50 at most, 1.50 at the end, +512 MiB" in said
    assert "no right answer, 0 lost" in serving.sentence(serving.Load(1, 1.0))

    single = serving.Load(1, 12.0, [3.0] * 3, [3.0, 6.0, 9.0])
    rows = serving.rows_of("transformers", [single, load])
    assert [(row.way, row.rate, row.ratio) for row in rows] == [
        ("1 client", 0.25, 1.0),
        ("4 clients", 12 / 12.5, 12 / 12.5 / 0.25),
    ]


def test_honest_clients_are_answered_while_others_attack(checkpoint: Path, questions: list) -> None:
    """And the server is stopped then; what it does not answer any more is lost."""
    expected = serving.answers_alone(checkpoint, "transformers", questions)
    with serving.serving(checkpoint, "transformers") as (address, process):
        assert address.startswith("http://127.0.0.1:")
        load, attacks = asyncio.run(
            serving.put_load_attacked(address, process, questions, expected, CLIENTS, 3.0)
        )
    assert load.seconds_each and not load.lost and not load.wrong
    assert attacks["half headers"] >= 300 and attacks["streams left"]
    assert not process.is_running()

    async def ask() -> serving.Load:
        late = serving.Load(1, 1.0)
        async with httpx.AsyncClient(base_url=address, trust_env=False) as http:
            assert await serving._answer(http, b"{}", late) is None
        return late

    assert len(asyncio.run(ask()).lost) == 1
