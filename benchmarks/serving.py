"""`mipha serve` under load: answers a second, their latency, and lost or wrong answers and memory.

    python benchmarks/serving.py RUN [--gguf FILE_OR_FOLDER] [--vllm] [--clients 1,4,16,64] \\
        [--seconds 120] [--attacked] [--out benchmarks/results]

The server is a process at a free port of 127.0.0.1. Every client has its own image and question of
easy-VQA's test split, and asks again as soon as it has its answer. The largest number of clients
asks for the given seconds, the others for a quarter of them. An answer is right if it is the text
that this repository's own call of the model gives. With `--gguf`, llama.cpp then serves that file
under the same load. With `--vllm`, vLLM serves the run, and its answers must be this repository's.
With `--attacked`, the largest number of clients asks once more while others send half headers,
images of 196 KB that are 75 MB decoded, and questions whose streams they leave. The clients share
the machine with the server, which costs the server speed.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
from harness import Row, report
from inference import easy_questions
from PIL import Image

from mipha.deploy.serve.engine import choose_engine, find_source
from mipha.files import write_whole
from mipha.run import available_cores

MAX_TOKENS = 16
"""Greatest number of tokens of an answer; easy-VQA's are one word."""

REQUEST_SECONDS = 310.0
"""Limit of an answer's seconds, above the server's own; after it the answer is lost."""

WINDOWS = 6
"""Number of parts of the time; the slowest and the fastest rate are those of a part."""

_BUSY_SECONDS = 0.2

_JSON = {"Content-Type": "application/json"}


@dataclass
class Load:
    """Results of one number of clients.

    Args:
        clients: Number of clients at a time.
        seconds: Seconds for which new questions were asked.
        seconds_each: Seconds of each right answer, from the first request to its arrival.
        finished: Arrival of each right answer, seconds from the start.
        wrong: Sentence for each answer that differs from the model's own.
        lost: Sentence for each request that ended in neither an answer nor "come again".
        busy: Number of times that the server told a client to come again.
        memory: Pairs of seconds from the start, and GiB of the server and its children.
        attacks: Number of each attack meanwhile.
    """

    clients: int
    seconds: float
    seconds_each: list[float] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    busy: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)
    attacks: dict[str, int] = field(default_factory=dict)

    def rates(self) -> list[float]:
        """Return the right answers a second in each part of the time."""
        width = self.seconds / WINDOWS
        return [
            sum(at // width == place for at in self.finished) / width for place in range(WINDOWS)
        ]


@contextmanager
def serving(
    source: Path, engine: str, options: Sequence[str] = ()
) -> Iterator[tuple[str, psutil.Process]]:
    """Run `mipha serve` within the context.

    Returns:
        Address and process of the server.

    Raises:
        SystemExit: The server did not start; the message ends with the server's output.
    """
    with tempfile.TemporaryFile("w+") as output:
        command = [
            sys.executable,
            "-m",
            "mipha",
            "serve",
            str(source),
            "--engine",
            engine,
            "--port",
            "0",
            *options,
        ]
        environment = {key: value for key, value in os.environ.items() if key != "MIPHA_API_KEY"}

        server = subprocess.Popen(command, stderr=output, stdin=subprocess.DEVNULL, env=environment)
        try:
            yield _address(server, output), psutil.Process(server.pid)
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _address(server: subprocess.Popen, output: Any, most_seconds: float = 300.0) -> str:
    """Wait until the server listens, and return its address."""
    started = time.monotonic()
    while time.monotonic() - started < most_seconds:
        output.seek(0)
        text = output.read()
        if found := re.search(r"serving .* at (http://127\.0\.0\.1:\d+) ", text):
            return found[1]
        if server.poll() is not None:
            raise SystemExit(f"mipha serve ended with status {server.returncode}:\n{text[-2000:]}")
        time.sleep(0.1)
    raise SystemExit(f"mipha serve was not ready within {most_seconds:g} s:\n{text[-2000:]}")


async def put_load(
    address: str,
    process: psutil.Process,
    questions: Sequence[tuple[str, str]],
    expected: Sequence[str],
    clients: int,
    seconds: float,
) -> Load:
    """Ask with many clients for some seconds, and wait for the last answers.

    Args:
        address: Address of the server.
        process: Process of the server.
        questions: Image and text of each question, at least one for each client.
        expected: Right answer to each question.
        clients: Number of clients.
        seconds: Seconds for which clients ask.
    """
    load = Load(clients, seconds)
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(
        base_url=address, timeout=REQUEST_SECONDS, limits=limits, trust_env=False
    ) as http:
        model = (await http.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        bodies = [_body(model, *question) for question in questions[:clients]]
        started = time.monotonic()

        async def client(place: int) -> None:
            while time.monotonic() - started < seconds:
                asked = time.monotonic()
                text = await _answer(http, bodies[place], load)
                if text is not None and text == expected[place]:
                    load.seconds_each.append(time.monotonic() - asked)
                    load.finished.append(time.monotonic() - started)
                elif text is not None:
                    load.wrong.append(
                        f"{questions[place][1]!r}: {text!r}, alone {expected[place]!r}"
                    )

        watching = asyncio.create_task(_watch(process, load, started))
        try:
            await asyncio.gather(*(client(place) for place in range(clients)))
        finally:
            watching.cancel()
    load.memory.append((time.monotonic() - started, memory_gib(process)))
    return load


async def _answer(http: httpx.AsyncClient, body: bytes, load: Load) -> str | None:
    """Return the text of an answer; None if it is lost."""
    until = time.monotonic() + REQUEST_SECONDS
    while time.monotonic() < until:
        try:
            response = await http.post("/v1/chat/completions", content=body, headers=_JSON)
        except httpx.HTTPError as error:
            load.lost.append(f"{type(error).__name__}: {error}")
            return None

        if response.status_code == 200:
            return response.json()["choices"][0]["message"]["content"].strip()
        if response.status_code != 429:
            load.lost.append(f"status {response.status_code}: {response.text[:200]}")
            return None

        load.busy += 1
        await asyncio.sleep(float(response.headers.get("retry-after", _BUSY_SECONDS)))

    load.lost.append(f"still told to come again after {REQUEST_SECONDS:g} s")
    return None


async def _watch(process: psutil.Process, load: Load, started: float) -> None:
    while True:
        load.memory.append((time.monotonic() - started, memory_gib(process)))
        await asyncio.sleep(0.25)


def memory_gib(process: psutil.Process) -> float:
    """Return the GiB of a process and its children."""
    held = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            held += one.memory_info().rss
        except psutil.NoSuchProcess:  # the child has just ended
            continue
    return held / 2**30


def _body(model: str, image: str, question: str) -> bytes:
    url = f"data:image/png;base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": MAX_TOKENS,
        }
    ).encode()


@asynccontextmanager
async def attack(address: str) -> AsyncIterator[Counter[str]]:
    """Attack a server of ours as long as the context lasts, with bounded numbers of connections.

    Yields:
        Number of each attack, and of the server's answers to it.
    """
    counts: Counter[str] = Counter()
    host, port = address.removeprefix("http://").split(":")

    async def half_header() -> None:
        while True:
            reader, writer = await asyncio.open_connection(host, int(port))
            counts["half headers"] += 1
            with suppress(OSError):
                writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
                await reader.read()
            writer.close()

    async def bomb(http: httpx.AsyncClient, body: bytes) -> None:
        while True:
            with suppress(httpx.HTTPError):
                answer = await http.post("/v1/chat/completions", content=body, headers=_JSON)
                counts[f"large images, status {answer.status_code}"] += 1
            await asyncio.sleep(0.05)

    async def leave(http: httpx.AsyncClient, body: bytes) -> None:
        while True:
            with suppress(httpx.HTTPError):
                request = http.stream("POST", "/v1/chat/completions", content=body, headers=_JSON)
                async with request as answer:
                    await anext(answer.aiter_lines(), None)
            counts["streams left"] += 1
            await asyncio.sleep(0.05)

    async with httpx.AsyncClient(base_url=address, timeout=60, trust_env=False) as http:
        model = (await http.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        with tempfile.TemporaryDirectory() as folder:
            large = Path(folder) / "large.png"
            Image.new("RGB", (5_000, 5_000)).save(large, compress_level=9)
            image_body = _body(model, str(large), "What is it?")
        turns = [{"role": "user", "content": "Tell me a long story."}]
        stream = {"model": model, "messages": turns, "max_tokens": 200, "stream": True}

        tasks = [asyncio.create_task(half_header()) for _ in range(300)]
        tasks += [asyncio.create_task(bomb(http, image_body)) for _ in range(8)]
        tasks += [asyncio.create_task(leave(http, json.dumps(stream).encode())) for _ in range(8)]
        try:
            yield counts
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def put_load_attacked(address: str, *load: Any) -> tuple[Load, Counter[str]]:
    """Put a load on a server that is attacked at the same time."""
    async with attack(address) as counts:
        return await put_load(address, *load), counts


def answers_alone(source: Path, engine: str, questions: Sequence[tuple[str, str]]) -> list[str]:
    """Return the model's own answer to each question, asked alone."""
    if engine != "llama.cpp":
        from mipha.assistant import load

        assistant = load(source)
        return [
            assistant.answer(*question, max_new_tokens=MAX_TOKENS).text for question in questions
        ]

    from mipha.deploy.llama_cpp import LlamaCpp

    found = find_source(source)
    assert found.gguf is not None
    with LlamaCpp(found.gguf, found.mmproj) as runtime:
        return [runtime.answer(*question, MAX_TOKENS) for question in questions]


def measure(
    source: Path,
    engine: str,
    questions: Sequence[tuple[str, str]],
    clients: Sequence[int],
    seconds: float,
    options: Sequence[str] = (),
    attacked: bool = False,
) -> list[Load]:
    """Put the load of each number of clients on one server, the smallest first.

    Args:
        source: Run, or file or folder of GGUF.
        engine: Name of the engine.
        questions: Image and text of each question.
        clients: Numbers of clients.
        seconds: Seconds at the largest number of clients; the others take a quarter.
        options: Other options of `mipha serve`.
        attacked: Put the largest load once more, on the server under attack.
    """
    expected = answers_alone(source, engine, questions)

    loads = []
    with serving(source, engine, options) as (address, process):
        # The first answer takes longer than others and does not count.
        asyncio.run(put_load(address, process, questions, expected, 1, 0.01))

        for number in sorted(clients):
            duration = seconds if number == max(clients) else seconds / 4
            loads.append(
                asyncio.run(put_load(address, process, questions, expected, number, duration))
            )
            print(f"{engine}, {number} clients: {sentence(loads[-1])}", file=sys.stderr, flush=True)

        if attacked:
            load, counts = asyncio.run(
                put_load_attacked(address, process, questions, expected, max(clients), seconds)
            )
            loads.append(replace(load, attacks=dict(counts)))
            print(f"attacked ({dict(counts)}): {sentence(load)}", file=sys.stderr, flush=True)
    return loads


def sentence(load: Load) -> str:
    """Return a sentence with the figures of a load beside its rate."""
    if not load.seconds_each:
        return (
            f"no right answer, {len(load.lost)} lost, {len(load.wrong)} wrong, "
            f"{load.busy} times told to come again"
        )

    percentiles = (
        statistics.quantiles(load.seconds_each, n=100, method="inclusive")
        if len(load.seconds_each) > 1
        else [0.0] * 99
    )
    at = ", ".join(f"p{rank} {percentiles[rank - 1]:.3g}" for rank in (50, 95, 99))
    memory = [held for _, held in load.memory]
    return (
        f"{len(load.seconds_each)} right answers in {max(load.finished):.3g} s, "
        f"seconds {at}, longest {max(load.seconds_each):.3g}; "
        f"{len(load.lost)} lost, {len(load.wrong)} wrong, "
        f"{load.busy} times told to come again; "
        f"server's memory {memory[0]:.2f} GiB at the start, {max(memory):.2f} at most, "
        f"{memory[-1]:.2f} at the end, "
        f"{growth_mib(load):+.0f} MiB from the middle third to the last"
    )


def growth_mib(load: Load) -> float:
    """Return the growth of the median memory from the middle third of the time to the last, MiB."""
    end = max(at for at, _ in load.memory)
    middle = [held for at, held in load.memory if end / 3 <= at < 2 * end / 3]
    last = [held for at, held in load.memory if at >= 2 * end / 3]
    return 1024 * (statistics.median(last) - statistics.median(middle)) if middle else 0.0


def rows_of(engine: str, loads: Sequence[Load]) -> list[Row]:
    """Return a row for each number of clients; the smallest is the baseline."""
    rows = []
    for load in loads:
        rates = load.rates()
        rate = len(load.finished) / max([load.seconds, *load.finished])
        ratio = rate / rows[0].rate if rows and rows[0].rate else 1.0
        rows.append(
            Row(
                engine,
                f"{load.clients} client{'s' * (load.clients > 1)}"
                + ", attacked" * bool(load.attacks),
                rate,
                min(rates),
                max(rates),
                ratio,
                "answers",
            )
        )
    return rows


def main() -> None:
    """Measure and report; fail if an answer was lost or wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="RUN")
    parser.add_argument(
        "--gguf",
        type=Path,
        help="GGUF of a language model with its mmproj beside it, or the folder of both",
    )
    parser.add_argument(
        "--vllm", action="store_true", help="measure vLLM too; the program must be on the PATH"
    )
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--attacked", action="store_true", help="once more, under attack")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()

    # Choose the engines; a wrong one fails before the first runs for minutes.
    clients = [int(number) for number in options.clients.split(",")]
    questions = easy_questions(max(clients))
    sources = {"transformers": options.source} | (
        {"llama.cpp": options.gguf} if options.gguf else {}
    )
    sources |= {"vllm": options.source} if options.vllm else {}
    for engine, source in sources.items():
        choose_engine(find_source(source), engine)

    # Measure.
    found = {
        engine: measure(
            source, engine, questions, clients, options.seconds, attacked=options.attacked
        )
        for engine, source in sources.items()
    }

    # Write the report.
    rows = [row for engine, loads in found.items() for row in rows_of(engine, loads)]
    facts: dict[str, Any] = {
        f"{engine}, {load.clients} clients" + ", attacked" * bool(load.attacks): sentence(load)
        for engine, loads in found.items()
        for load in loads
    }
    facts["slowest and fastest"] = f"of {WINDOWS} equal parts of the time"
    facts["cores"] = available_cores()
    runs = {engine: [asdict(load) for load in loads] for engine, loads in found.items()}
    write_whole(options.out / "serving-runs.json", json.dumps(runs) + "\n")
    report("serving", "`mipha serve` under load", rows, options.out, facts)

    if bad := Counter(
        text for loads in found.values() for load in loads for text in (*load.lost, *load.wrong)
    ):
        raise SystemExit(
            "lost or wrong:\n"
            + "\n".join(f"{number} times {text}" for text, number in bad.most_common(20))
        )


if __name__ == "__main__":
    main()
