"""One answer at a time on a CPU: transformers against llama.cpp, next to what the machine's memory and arithmetic allow.

    python benchmarks/inference.py RUN [--threads 1] [--dtypes bfloat16,float32] [--kinds f16,q8_0,q4_k_m] [--repeats 3]
    python benchmarks/inference.py --size mipha-3b [--work FOLDER] [--keep] [--repeats 2]

RUN is a run or a model folder that GGUF can hold; with `--kinds ''` any. It is asked about easy-VQA's test pictures. `--size` takes the
paper's model with random weights instead (18 GB in FOLDER, removed afterwards), and says whether 4-bit decoding is at least 6 times
as fast as transformers in bfloat16, and reads its weights at 75 % of the memory's speed: without a picture, for behind one it also
reads the picture's keys and values.

Each engine, and the machine's limits, are measured in turn in every repeat, each in a fresh process. All write the same number of
tokens: ends of turns are suppressed. Beside the report, `inference-*-runs.json` holds what every process found.
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
"""Wanted of q4_k_m at full size: of the read bandwidth, and of the baseline's speed."""

_MARGIN = 192
"""Tokens of a context beside picture and answer: the question, the template, and what llama.cpp rounds to."""

Results = dict[str, list[dict[str, Any]]]
"""Way to what its process found in each repeat; `limits` among them."""


def run_all(tasks: Mapping[str, dict[str, Any]], repeats: int, folder: Path) -> Results:
    """Every task in every repeat, in turn, each in a fresh process.

    Args:
        tasks: Way to what its process is told.
        folder: For what the processes are told and tell.
    """
    found: Results = {way: [] for way in tasks}
    for repeat in range(repeats):
        for way, task in tasks.items():
            told, tells = folder / "task.json", folder / "result.json"
            told.write_text(json.dumps(task))
            environment = os.environ | {
                "OMP_NUM_THREADS": str(task["threads"]),
                "TRANSFORMERS_VERBOSITY": "error",
            }
            done = subprocess.run(
                [sys.executable, WORKER, told, tells],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
            if done.returncode:
                raise SystemExit(
                    f"{way} failed with status {done.returncode}:\n{done.stderr[-2000:]}"
                )
            found[way].append(json.loads(tells.read_text()))
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
    """What each process is told; the baseline comes first.

    Args:
        gguf: Folder with model-KIND.gguf of every kind.
        questions: Picture and text; the pictures differ, for one that was seen is not encoded again.
        num_tokens: Written for each question while it is timed.
        answer_tokens: Longest answer of those that are compared; 0: what was timed is compared.
        limit_bytes: Size of the array that is read.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    longest = config["text_config"].get("max_position_embeddings") or 4096
    common = {
        "threads": threads,
        "questions": list(questions),
        "num_tokens": num_tokens,
        "answer_tokens": answer_tokens,
    }
    tasks: dict[str, dict[str, Any]] = {
        "limits": {"engine": "limits", "threads": threads, "limit_bytes": limit_bytes}
    }
    for dtype in dtypes:
        tasks[f"transformers {dtype}"] = common | {
            "engine": "transformers",
            "dtype": dtype,
            "checkpoint": str(checkpoint),
        }
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
    """Rows of reading and of writing, and for each engine the rest in a sentence."""
    ways = {way: found for way, found in results.items() if way != "limits"}
    limits = {key: [found[key] for found in results["limits"]] for key in results["limits"][0]}
    reading = {
        way: [one["prompt_tokens"] / statistics.median(one["first_token_seconds"]) for one in found]
        for way, found in ways.items()
    }
    writing = {
        way: [statistics.median(one["tokens_per_second"]) for one in found]
        for way, found in ways.items()
    }
    plain = {way: [one["plain_tokens_per_second"] for one in found] for way, found in ways.items()}
    rows = _rows("picture and question", "prompt tokens", reading) + _rows(
        "answer", "tokens", writing
    )
    rows += _rows("answer without a picture", "tokens", plain)
    facts: dict[str, Any] = {"read bandwidth": f"{_spread(limits['read'])} GB/s"}
    facts |= {
        f"products in {dtype}": f"{_spread(limits[dtype])} GFLOP/s"
        for dtype in ("float32", "bfloat16")
    }
    first = next(iter(ways.values()))
    if flop := first[0]["prompt_flop"]:
        at_best = flop / 1e9 / statistics.median(limits["bfloat16"])
        facts["prompt"] = (
            f"{first[0]['prompt_tokens']} tokens, {flop / 1e12:.3g} TFLOP without attention: {at_best:.3g} s at that limit; "
            f"its keys and values: {first[0]['prompt_cache_bytes'] / 1e9:.3g} GB in 16 bits, read for every token beside the weights"
        )
    exact = "transformers float32" if "transformers float32" in ways else next(iter(ways))
    for way, found in ways.items():
        seconds = [statistics.median(one["first_token_seconds"]) for one in found]
        facts[way] = (
            f"load {_spread([one['load_seconds'] for one in found])} s, first token {_spread(seconds)} s, "
            f"peak memory {_spread([one['peak_gib'] for one in found])} GiB, {found[0]['weight_bytes'] / 1e9:.3g} GB of weights a token: "
            f"{share_of_bandwidth(results, way):.0%} of the read bandwidth, {share_of_bandwidth(results, way, plain=True):.0%} "
            f"without a picture; text as of {exact}: {_sameness(ways[exact][0], found[0]):.0%}"
        )
    return rows, facts


def share_of_bandwidth(results: Results, way: str, plain: bool = False) -> float:
    """Weights read a second while an answer is written, of what the memory gives; median over the repeats.

    Args:
        plain: Of the answer without a picture, where weights are nearly all that is read.
    """
    return statistics.median(
        (one["plain_tokens_per_second"] if plain else statistics.median(one["tokens_per_second"]))
        * (one["weight_bytes"] / 1e9 / limit["read"])
        for one, limit in zip(results[way], results["limits"], strict=True)
    )


def verdict(results: Results, way: str = "llama.cpp q4_k_m") -> list[str]:
    """What is wanted of 4 bits at full size and was not reached: speed behind a picture, use of the memory without one."""
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
    """Pictures of noise, for a model that has learned nothing."""
    random = np.random.default_rng(0)
    found = []
    for place in range(number):
        path = folder / f"{place}.png"
        Image.fromarray(random.integers(0, 256, (384, 384, 3), dtype=np.uint8)).save(path)
        found.append((str(path), "What can be seen in this picture? Describe it in a sentence."))
    return found


def easy_questions(number: int) -> list[tuple[str, str]]:
    """Questions about different pictures of easy-VQA's test split, of all kinds."""
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
    """Median, least and most."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def _sameness(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """How much of the texts is the same from their beginnings on; 1 if all of all of them is."""
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
    return f"load {found['load_seconds']:.2f} s, first token {first:.3g} s, {rate:.3g} tokens/s, {found['peak_gib']:.2f} GiB"


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, nargs="?", metavar="RUN")
    parser.add_argument(
        "--size", choices=("mipha-3b", "mipha-1.6b"), help="random weights in place of RUN"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--dtypes", default="bfloat16,float32", help="of transformers; the first is the baseline"
    )
    parser.add_argument("--kinds", default="f16,q8_0,q4_k_m", help="of llama.cpp's weights")
    parser.add_argument("--questions", type=int, help="in each process; default: 8, with --size 1")
    parser.add_argument(
        "--num-tokens", type=int, help="written for each; default: 32, with --size 16"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, help="where files are made; default: a temporary folder"
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep those of --size in --work, and use them the next time",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if (options.source is None) == (options.size is None):
        parser.error("give either RUN or --size")
    if options.keep and not options.work:
        parser.error("--keep needs --work, the folder to keep them in")
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
    name = f"inference-{options.size or 'run'}"
    write_whole(options.out / f"{name}-runs.json", json.dumps(results, indent=1) + "\n")
    report(name, f"One answer at a time: {what}", rows, options.out, facts)


if __name__ == "__main__":
    main()
