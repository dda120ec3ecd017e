"""Speed and accuracy of the linter of data sets.

    python benchmarks/check_data.py [--rows 20000] [--text-rows 100000] [--side 224] \\
        [--recipe quickstart] [--html page.html]

It checks 20,000 samples with every planted defect, their clean copy, and 100,000 rows of text, and
prints one JSON line for each. The exit code is 1 if it misses a defect or reports one that is not
there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from mipha.data.check.html import html_report
from mipha.data.check.linter import CheckResult, check_data
from mipha.data.dataset import data_recipe, load_data
from mipha.recipe import load_recipe
from tests.data.check.planted import DEFECTS, THINGS, plant


def main() -> None:
    """Make the data, check them and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--text-rows", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument(
        "--recipe", help="recipe whose processor checks tokens too, with row_tokens=2048"
    )
    parser.add_argument("--html", type=Path, help="file of the HTML page about the planted set")
    options = parser.parse_args()

    tokens = _tokens(options.recipe) if options.recipe else {}
    with tempfile.TemporaryDirectory() as folder:
        # Check the planted set, and compare the findings with the planted defects.
        corpus = plant(
            Path(folder), options.rows, copies=options.rows // (4 * len(DEFECTS)), side=options.side
        )
        against = load_data(data_recipe(str(corpus.evaluation)))
        planted, spent = _check(corpus.planted, against=against, **tokens)

        found = {(finding.row, finding.kind) for finding in planted.findings}
        expected = corpus.expected(with_tokens=bool(tokens), with_evaluation=True)
        missed, invented = sorted(expected - found), sorted(found - expected, key=str)
        _print(
            "planted",
            planted,
            spent,
            defects=len(DEFECTS),
            planted=len(corpus.where),
            missed=missed[:9],
            invented=invented[:9],
        )

        # Check the clean copy.
        clean, spent = _check(corpus.clean, against=against, **tokens)
        _print("clean", clean, spent, invented=[finding.sentence for finding in clean.findings[:9]])
        if options.html:
            options.html.write_text(html_report(planted), encoding="utf-8")

        # Check rows of text.
        text = Path(folder) / "text.jsonl"
        with text.open("w", encoding="utf-8") as lines:
            for number in range(options.text_rows):
                lines.write(json.dumps({"messages": _talk(number)}) + "\n")
        _print("text", *_check(text, **tokens))
    sys.exit(bool(missed or invented or clean.findings))


def _tokens(name: str) -> dict:
    from mipha.models.build import build

    recipe = load_recipe(name).override("stages.finetune.row_tokens=2048")
    return {
        "stage": recipe.stages["finetune"],
        "processor": build(recipe.model)[1],
        "seed": recipe.seed,
    }


def _talk(number: int) -> list[dict[str, str]]:
    """Return a conversation of about 60 words; no two are alike."""
    things = [THINGS[number // step % len(THINGS)] for step in (1, 7, 49, 343)]
    question = (
        f"In house number {number}, which of these came first, the {things[0]}, the {things[1]} "
        f"or the {things[2]}, and how do we know?"
    )
    answer = (
        f"The {things[3]} was bought in year {number % 997}, long before the {things[0]}; "
        f"a bill for {number * 7} crowns was found behind the {things[1]}. "
        f"Nobody remembers who carried the {things[2]} up the stairs, "
        f"but it took {number % 13 + 2} people an afternoon."
    )
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _check(file: Path, **options: Any) -> tuple[CheckResult, float]:
    """Return the findings about a file, and the CPU seconds of all cores.

    Other work on the machine changes wall-clock seconds more than CPU seconds.
    """
    begin = _cpu_seconds()
    result = check_data(load_data(data_recipe(str(file))), progress=True, **options)
    return result, _cpu_seconds() - begin


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and its workers so far."""
    times = [
        resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    return sum(time.ru_utime + time.ru_stime for time in times)


def _print(name: str, result: CheckResult, cpu_seconds: float, **more: object) -> None:
    line = {
        "set": name,
        "rows": result.num_rows,
        "images": result.num_images,
        "distinct_images": result.num_distinct,
        "cores": os.cpu_count(),
        "seconds": round(result.seconds, 2),
        "cpu_seconds": round(cpu_seconds, 1),
        "rows_per_second": round(result.num_rows / result.seconds),
        "distinct_images_per_second": round(result.num_distinct / result.seconds),
        "findings": len(result.findings),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "peak_memory_of_a_worker_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        // 1024,
    }
    print(json.dumps(line | more), flush=True)


if __name__ == "__main__":
    main()
