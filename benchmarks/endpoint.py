"""How much faster does an endpoint answer when it is asked many questions at a time?

A model is exported as GGUF and served by llama.cpp's own server with as many slots as requests.
The same questions are asked one at a time and several at a time; both must give the same number of
answers. Prints a JSON line for each, with the seconds a question.

    python benchmarks/endpoint.py runs/mine --questions 32 --parallel 16
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

from mipha.data.datasets import easy_vqa
from mipha.deploy.gguf.export import export_gguf
from mipha.deploy.serve.child import ChildEngine
from mipha.deploy.serve.engine import find_source, launch
from mipha.evaluation.endpoint import EndpointModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="a run, a model folder, or a folder of GGUF files")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--parallel", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    options = parser.parse_args()

    records = easy_vqa.load(None, "test")[: options.questions]
    pairs = [
        (easy_vqa.image_path(None, record.folder, record.image), record.question)
        for record in records
    ]
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        if not any(options.model.glob("*.gguf")):
            export_gguf(options.model, Path(folder) / "gguf")
            options.model = Path(folder) / "gguf"
        source = find_source(options.model)
        child = launch(source, "llama.cpp", slots=options.parallel)
        runner.run(child.start())
        try:
            for parallel in (1, options.parallel):
                row = ask(child, source.name, pairs, parallel, options.max_new_tokens)
                print(json.dumps(row), flush=True)
        finally:
            runner.run(child.close())


def ask(
    child: ChildEngine,
    name: str,
    pairs: list[tuple[Path, str]],
    parallel: int,
    max_new_tokens: int,
) -> dict[str, float]:
    """Ask all questions, after one that warms the server up."""
    model = EndpointModel(child.url, name, api_key=child.key, parallel=parallel)
    model.answer_many(pairs[:1], max_new_tokens=max_new_tokens)
    start = time.perf_counter()
    answers = model.answer_many(pairs, max_new_tokens=max_new_tokens)
    seconds = time.perf_counter() - start
    return {
        "parallel": parallel,
        "questions": len(answers),
        "tokens": sum(answer.num_tokens or 0 for answer in answers),
        "seconds": round(seconds, 2),
        "questions_per_second": round(len(answers) / seconds, 2),
    }


if __name__ == "__main__":
    main()
