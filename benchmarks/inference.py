"""One answer at a time on a CPU: transformers and llama.cpp, beside the limits of the machine.

    python benchmarks/inference.py RUN [--threads 1] [--dtypes bfloat16,float32] \\
        [--kinds f16,q8_0,q4_k_m] [--repeats 3]
    python benchmarks/inference.py --size mipha-3b [--work FOLDER] [--keep] [--repeats 2]

RUN is a run or a model folder; GGUF must be able to hold it, except with `--kinds ''`. The
questions are about test images of easy-VQA. `--size` takes the paper's model with random weights
instead (18 GB in FOLDER, removed afterwards). The report then says whether 4-bit decoding
is at least 6 times as fast as transformers in bfloat16, and whether it reads its weights at 75 % of
the memory's speed. The second figure is measured without an image, because decoding after an image
also reads the image's keys and values.

Every repeat measures the limits of the machine and each engine in turn, each in a fresh process.
All write the same number of tokens, because the ends of turns are suppressed. The figures of every
process are in `inference-*-runs.json` beside the report.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from harness import Row, report
from PIL import Image

from mipha.files import write_whole
from mipha.run import model_folder

WORKER = Path(__file__).with_name("inference_worker.py")
BUILDER = Path(__file__).with_name("full_size_inference.py")

BASELINE = "transformers bfloat16"
SHARE, TIMES = 0.75, 6.0
"""Targets of q4_k_m at full size: share of the read bandwidth, and speed over the baseline's."""

_MARGIN = 192
"""Tokens of a context for the question, the template, and the rounding of llama.cpp."""

Results = dict[str, list[dict[str, Any]]]
"""Figures of each repeat by name of the way; `limits` is one of them."""


def run_all(tasks: Mapping[str, dict[str, Any]], repeats: int, folder: Path) -> Results:
    """Run every task in every repeat, in turn, each in a fresh process.

    Args:
        tasks: Task by name of the way.
        repeats: Number of rounds.
        folder: Folder of the task and result files.

    Returns:
        Figures of each repeat by name of the way.

    Raises:
        SystemExit: A process failed.
    """
    found: Results = {way: [] for way in tasks}
    for repeat in range(repeats):
        for way, task in tasks.items():
            task_file, result_file = folder / "task.json", folder / "result.json"
            task_file.write_text(json.dumps(task))
            environment = os.environ | {
                "OMP_NUM_THREADS": str(task["threads"]),
                "TRANSFORMERS_VERBOSITY": "error",
            }

            done = subprocess.run(
                [sys.executable, WORKER, task_file, result_file],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            if done.returncode:
                raise SystemExit(
                    f"{way} failed with status {done.returncode}:\n{done.stderr[-2000:]}"
                )

            found[way].append(json.loads(result_file.read_text()))
            print(
                f"repeat {repeat + 1} of {repeats}: {way}: {_short(found[way][-1])}",
                file=sys.stderr,
                flush=True,
            )
    return found


def make_tasks(
    checkpoint: Path,
    gguf: Path | None,
    dtypes: Sequence[str],
    kinds: Sequence[str],
    questions: Sequence[tuple[str, str]],
    *,
    threads: int = 1,
    num_tokens: int = 32,
    answer_tokens: int = 32,
    limit_bytes: int = 2**30,
) -> dict[str, dict[str, Any]]:
    """Make the task of each process; the baseline comes first of the engines.

    Args:
        checkpoint: Model folder.
        gguf: Folder with model-KIND.gguf of every kind.
        dtypes: Types of transformers.
        kinds: Kinds of llama.cpp's weights.
        questions: Image and text of each; the images differ, because engines do not encode an
            image again.
        threads: Number of threads of each process.
        num_tokens: Number of tokens that are written and timed for each question.
        answer_tokens: Greatest number of tokens of an answer that is compared; with 0, the timed
            texts are compared.
        limit_bytes: Size of the array that is read.

    Returns:
        Task by name of the way.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    longest = config["text_config"].get("max_position_embeddings") or 4096
    common = {
        "threads": threads,
        "questions": list(questions),
        "num_tokens": num_tokens,
        "answer_tokens": answer_tokens,
    }

    # Measure the limits, then transformers.
    tasks: dict[str, dict[str, Any]] = {
        "limits": {"engine": "limits", "threads": threads, "limit_bytes": limit_bytes}
    }
    for dtype in dtypes:
        tasks[f"transformers {dtype}"] = common | {
            "engine": "transformers",
            "dtype": dtype,
            "checkpoint": str(checkpoint),
        }

    # Measure llama.cpp.
    context = min(longest, config["image_seq_length"] + max(num_tokens, answer_tokens) + _MARGIN)
    for kind in kinds:
        assert gguf is not None
        files = {
            "model": str(gguf / f"model-{kind}.gguf"),
            "mmproj": str(next(gguf.glob("mmproj-*.gguf"))),
        }
        tasks[f"llama.cpp {kind}"] = common | {"engine": "llama.cpp", "context": context, **files}
    return tasks


def summarise(results: Results) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows of reading and of writing, and a sentence of other facts for each engine."""
    ways = {way: found for way, found in results.items() if way != "limits"}
    limits = {key: [found[key] for found in results["limits"]] for key in results["limits"][0]}

    # Rate the reading of a prompt, and the writing of an answer.
    reading = {
        way: [one["prompt_tokens"] / statistics.median(one["first_token_seconds"]) for one in found]
        for way, found in ways.items()
    }
    writing = {
        way: [statistics.median(one["tokens_per_second"]) for one in found]
        for way, found in ways.items()
    }
    plain = {way: [one["plain_tokens_per_second"] for one in found] for way, found in ways.items()}
    rows = _rows("image and question", "prompt tokens", reading) + _rows(
        "answer", "tokens", writing
    )
    rows += _rows("answer without an image", "tokens", plain)

    # State the limits, and the work of a prompt.
    facts: dict[str, Any] = {"read bandwidth": f"{_spread(limits['read'])} GB/s"}
    facts |= {
        f"products in {dtype}": f"{_spread(limits[dtype])} GFLOP/s"
        for dtype in ("float32", "bfloat16")
    }
    first = next(iter(ways.values()))
    if flop := first[0]["prompt_flop"]:
        at_best = flop / 1e9 / statistics.median(limits["bfloat16"])
        facts["prompt"] = (
            f"{first[0]['prompt_tokens']} tokens, {flop / 1e12:.3g} TFLOP without attention: "
            f"{at_best:.3g} s at that limit; "
            f"its keys and values: {first[0]['prompt_cache_bytes'] / 1e9:.3g} GB in 16 bits, "
            "read for every token beside the weights"
        )

    # State the rest about each engine.
    exact = "transformers float32" if "transformers float32" in ways else next(iter(ways))
    for way, found in ways.items():
        seconds = [statistics.median(one["first_token_seconds"]) for one in found]
        facts[way] = (
            f"load {_spread([one['load_seconds'] for one in found])} s, "
            f"first token {_spread(seconds)} s, "
            f"peak memory {_spread([one['peak_gib'] for one in found])} GiB, "
            f"{found[0]['weight_bytes'] / 1e9:.3g} GB of weights a token: "
            f"{share_of_bandwidth(results, way):.0%} of the read bandwidth, "
            f"{share_of_bandwidth(results, way, plain=True):.0%} without an image; "
            f"same text as {exact}: {_sameness(ways[exact][0], found[0]):.0%}"
        )
    return rows, facts


def share_of_bandwidth(results: Results, way: str, plain: bool = False) -> float:
    """Return the share of the read bandwidth that reading weights takes while an answer is written.

    Args:
        results: Figures of each repeat by name of the way.
        way: Name of the way.
        plain: Take the answer without an image, which reads hardly anything but weights.

    Returns:
        Median over the repeats, 0 to 1.
    """
    return statistics.median(
        (one["plain_tokens_per_second"] if plain else statistics.median(one["tokens_per_second"]))
        * (one["weight_bytes"] / 1e9 / limit["read"])
        for one, limit in zip(results[way], results["limits"], strict=True)
    )


def verdict(results: Results, way: str = "llama.cpp q4_k_m") -> list[str]:
    """Return the targets of 4 bits at full size that were missed.

    They are the speed after an image, and the share of the bandwidth without one.
    """
    missed = []
    times = statistics.median(
        statistics.median(one["tokens_per_second"]) / statistics.median(base["tokens_per_second"])
        for one, base in zip(results[way], results[BASELINE], strict=True)
    )
    if times < TIMES:
        missed.append(f"{way} writes {times:.2f} times as fast as {BASELINE}, wanted {TIMES:g}")
    if (share := share_of_bandwidth(results, way, plain=True)) < SHARE:
        missed.append(f"{way} reads at {share:.0%} of the bandwidth, wanted {SHARE:.0%}")
    return missed


def noise_questions(folder: Path, number: int) -> list[tuple[str, str]]:
    """Write images of noise and ask about each, for a model that has learned nothing."""
    random = np.random.default_rng(0)
    found = []
    for place in range(number):
        path = folder / f"{place}.png"
        Image.fromarray(random.integers(0, 256, (384, 384, 3), dtype=np.uint8)).save(path)
        found.append((str(path), "What can be seen in this picture? Describe it in a sentence."))
    return found


def easy_questions(number: int) -> list[tuple[str, str]]:
    """Return questions of all kinds about different images of easy-VQA's test split."""
    from mipha.evaluation.benchmark import load_benchmark

    by_image: dict[str, list[str]] = {}
    for question in load_benchmark("easy_vqa").questions(None, "test"):
        by_image.setdefault(str(question.image), []).append(question.text)
    return [
        (image, texts[place % len(texts)]) for place, (image, texts) in enumerate(by_image.items())
    ][:number]


def _rows(case: str, unit: str, rates: Mapping[str, Sequence[float]]) -> list[Row]:
    baseline = next(iter(rates.values()))
    ratios = {
        way: statistics.median(r / b for r, b in zip(found, baseline, strict=True))
        for way, found in rates.items()
    }
    return [
        Row(case, way, statistics.median(found), min(found), max(found), ratios[way], unit)
        for way, found in rates.items()
    ]


def _spread(values: Sequence[float]) -> str:
    """Return the median, the least and the greatest value as text."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def _sameness(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Return the mean share of the texts that agrees from their beginnings; 1 if all are equal."""
    texts = zip(one["answers"] or one["texts"], other["answers"] or other["texts"], strict=True)
    return statistics.mean(
        _length_in_common(a, b) / max(len(a), len(b)) if a != b else 1.0 for a, b in texts
    )


def _length_in_common(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _short(found: Mapping[str, Any]) -> str:
    if "read" in found:
        return ", ".join(f"{key} {value:.3g}" for key, value in found.items())
    first, rate = (
        statistics.median(found["first_token_seconds"]),
        statistics.median(found["tokens_per_second"]),
    )
    return (
        f"load {found['load_seconds']:.2f} s, first token {first:.3g} s, {rate:.3g} tokens/s, "
        f"{found['peak_gib']:.2f} GiB"
    )


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, nargs="?", metavar="RUN")
    parser.add_argument(
        "--size",
        choices=("mipha-3b", "mipha-1.6b"),
        help="size of a model with random weights, instead of RUN",
    )
    parser.add_argument(
        "--image-size", type=int, help="with --size: pixels of a side; 196 makes 196 tokens"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--dtypes",
        default="bfloat16,float32",
        help="types of transformers; the first is the baseline",
    )
    parser.add_argument("--kinds", default="f16,q8_0,q4_k_m", help="kinds of llama.cpp's weights")
    parser.add_argument(
        "--questions", type=int, help="questions of each process; default: 8, with --size 1"
    )
    parser.add_argument(
        "--num-tokens", type=int, help="tokens written for each; default: 32, with --size 16"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder of the files; default: a temporary one")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the files of --size in --work, and use them the next time",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()

    if (options.source is None) == (options.size is None):
        parser.error("give either RUN or --size")
    if options.keep and not options.work:
        parser.error("--keep needs --work, the folder to keep them in")

    # Make the model, ask every engine, and remove what is not kept.
    dtypes, kinds = _names(options.dtypes), _names(options.kinds)
    with tempfile.TemporaryDirectory(
        dir=options.work if options.work and options.work.is_dir() else None
    ) as name:
        scratch = Path(name)
        made = options.work / f"random-{options.size}" if options.size and options.work else scratch
        common = {
            "threads": options.threads,
            "num_tokens": options.num_tokens or (16 if options.size else 32),
        }
        try:
            if options.size:
                subprocess.run(
                    [
                        sys.executable,
                        BUILDER,
                        made,
                        "--size",
                        options.size,
                        "--kinds",
                        ",".join(kinds),
                        *(("--image-size", str(options.image_size)) if options.image_size else ()),
                    ],
                    check=True,
                )
                questions = noise_questions(scratch, options.questions or 1)
                tasks = make_tasks(
                    made / "model",
                    made / "gguf",
                    dtypes,
                    kinds,
                    questions,
                    answer_tokens=0,
                    **common,
                )
            else:
                if kinds:
                    from mipha.deploy.gguf.export import export_gguf

                    export_gguf(options.source, made / "gguf", kinds)
                questions = easy_questions(options.questions or 8)
                tasks = make_tasks(
                    model_folder(options.source), made / "gguf", dtypes, kinds, questions, **common
                )
            results = run_all(tasks, options.repeats, scratch)
        finally:
            if not options.keep and made != scratch:
                shutil.rmtree(made, ignore_errors=True)

    # Write the report.
    rows, facts = summarise(results)
    what = f"{options.size}, random weights" if options.size else str(options.source.name)
    facts |= {
        "repeats": options.repeats,
        "threads": options.threads,
        "tokens written": common["num_tokens"],
        "questions": len(questions),
    }
    if options.size and {BASELINE, "llama.cpp q4_k_m"} <= results.keys():
        facts["missed"] = (
            "; ".join(verdict(results))
            or f"nothing: 4 bits {TIMES:g} times the baseline, {SHARE:.0%} of the bandwidth"
        )
    name = f"inference-{options.size or 'run'}-threads{options.threads}"
    if options.image_size:
        name += f"-{options.image_size}px"
    write_whole(options.out / f"{name}-runs.json", json.dumps(results, indent=1) + "\n")
    report(name, f"One answer at a time: {what}", rows, options.out, facts)


if __name__ == "__main__":
    main()
