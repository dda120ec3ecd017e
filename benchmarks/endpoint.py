"""How much faster does an endpoint answer when it is asked many questions at a time?

    python benchmarks/endpoint.py [RUN] [--engine transformers --engine llama.cpp --engine vllm] \\
        [--wait 0.5] [--questions 32] [--parallel 16] [--repeats 3] [--out benchmarks/results]

The same questions of easy-VQA are asked one at a time and several at a time. Each engine serves the
run: transformers behind `mipha serve`, llama.cpp (which gets the run as GGUF in f16) and vLLM by
their own servers. With `--wait` a local server that computes nothing waits before each answer, as a
provider across a network does, so what the client itself can gain is measured. The case `processor`
says what this machine can gain at most by doing several computations at a time: matrix products,
one at a time on one thread, and as many at a time as there are cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from harness import Row, report, side_by_side
from serving import serving

from mipha.data.datasets import easy_vqa
from mipha.deploy.gguf.export import export_gguf
from mipha.deploy.serve.engine import find_source, launch
from mipha.evaluation.endpoint import EndpointModel
from mipha.run import available_cores

ENGINES = ("transformers", "llama.cpp", "vllm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", help="a run, a model folder, or GGUF files")
    parser.add_argument("--engine", choices=ENGINES, action="append", default=[])
    parser.add_argument("--wait", type=float, help="seconds that a server without a model waits")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--parallel", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if options.engine and options.model is None:
        parser.error("--engine needs a model")

    records = easy_vqa.load(None, "test")[: options.questions]
    pairs = [
        (easy_vqa.image_path(None, record.folder, record.image), record.question)
        for record in records
    ]
    title = "Questions a second of an endpoint, one and several at a time"
    rows = compare_computations(options.repeats)
    facts: dict[str, Any] = {
        "questions": len(pairs),
        "cores": available_cores(),
        "longest answer, tokens": options.max_new_tokens,
    }

    servers: dict[str, Callable[[int], AbstractContextManager]] = {}
    if options.wait is not None:
        servers[f"waits {options.wait:g} s"] = partial(wait_before_answers, options.wait)
    servers |= {engine: partial(serve, options.model, engine) for engine in options.engine}
    for name, start in servers.items():
        with start(options.parallel) as (url, model, key):
            ask = partial(answer_all, url, model, key, pairs, options.max_new_tokens)
            ways = {f"{number} at a time": partial(ask, number) for number in (1, options.parallel)}
            rows += side_by_side(name, "questions", len(pairs), ways, options.repeats)
            alone, together = (call() for call in ways.values())
        same = sum(one == other for one, other in zip(alone, together, strict=True))
        facts[f"{name}: answers that stay the same"] = f"{same} of {len(pairs)}"
        report("endpoint", title, rows, options.out, facts)


def answer_all(
    url: str,
    model: str,
    key: str | None,
    pairs: list[tuple[Path, str]],
    max_new_tokens: int,
    parallel: int,
) -> list[str]:
    """Return the endpoint's answer to each image and question."""
    asker = EndpointModel(url, model, api_key=key, parallel=parallel)
    return [answer.text for answer in asker.answer_many(pairs, max_new_tokens=max_new_tokens)]


@contextmanager
def serve(model: Path, engine: str, parallel: int) -> Iterator[tuple[str, str, str | None]]:
    """Serve a model within the context; yield URL, name and key."""
    if engine == "transformers":
        with serving(model, engine, ("--batch-size", str(parallel))) as (address, _):
            yield f"{address}/v1", find_source(model).name, None
        return

    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        if engine == "llama.cpp" and not any(model.glob("*.gguf")):
            export_gguf(model, Path(folder) / "gguf")
            model = Path(folder) / "gguf"
        source = find_source(model)
        slots = parallel if engine == "llama.cpp" else None
        child = launch(source, engine, slots)  # type: ignore[arg-type]  # one of ENGINES
        runner.run(child.start())
        try:
            yield child.url, source.name, child.key
        finally:
            runner.run(child.close())


@contextmanager
def wait_before_answers(seconds: float, parallel: int) -> Iterator[tuple[str, str, None]]:
    """Answer "yes" to every request after some seconds; yield URL, name and no key."""
    message = {"role": "assistant", "content": "yes"}
    answer = {"model": "waiting", "choices": [{"message": message, "finish_reason": "stop"}]}
    content = json.dumps(answer).encode()

    class Waiting(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(seconds)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 2 * parallel

    with Server(("127.0.0.1", 0), Waiting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", "waiting", None
        finally:
            server.shutdown()


def compare_computations(repeats: int, num: int = 32, size: int = 1_024) -> list[Row]:
    """Time matrix products of one thread each, one at a time and one for each core."""
    torch.set_num_threads(1)
    factors = [torch.randn(size, size) for _ in range(num)]

    def compute(workers: int) -> None:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(lambda factor: factor @ factor, factors))

    ways = {f"{workers} at a time": partial(compute, workers) for workers in (1, available_cores())}
    return side_by_side("processor", "products", num, ways, repeats)


if __name__ == "__main__":
    main()
