"""Seconds and peak memory of scoring 447,793 VQAv2 answers, as many as test2015 has.

    python benchmarks/scoring.py [--num-questions 447793] [--out benchmarks/results]

The files are generated in the official format.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from mipha.evaluation.benchmark import load_benchmark
from mipha.evaluation.score import score_file
from mipha.files import write_whole
from mipha.run import provenance

WORDS = (
    "yes",
    "no",
    "2",
    "two",
    "red",
    "a dog",
    "t-shirt",
    "man's hat",
    "1/2",
    "on the table",
    "Yes",
    "left.",
    "none",
    "dont know",
)
KINDS = (
    ("yes/no", "is the"),
    ("number", "how many"),
    ("other", "what color is the"),
    ("other", "where is the"),
)


def write_files(folder: Path, num_questions: int) -> None:
    """Write questions, annotations and predictions: five questions an image.

    Each annotator gives the likely answer about 7 times out of 10.
    """
    rng = random.Random(0)
    with (
        (folder / "questions.json").open("w") as questions,
        (folder / "annotations.json").open("w") as annotations,
    ):
        questions.write('{"questions": [')
        annotations.write('{"annotations": [')
        with (folder / "predictions.jsonl").open("w") as predictions:
            for number in range(num_questions):
                answer_type, question_type = rng.choice(KINDS)
                likely = rng.choice(WORDS)
                said = [likely if rng.random() < 0.7 else rng.choice(WORDS) for _ in range(10)]
                answers = [
                    {"answer": text, "answer_confidence": "yes", "answer_id": i + 1}
                    for i, text in enumerate(said)
                ]

                image_id = number // 5
                shared = {"image_id": image_id, "question_id": number}
                kinds = {
                    "question_type": question_type,
                    "answer_type": answer_type,
                    "multiple_choice_answer": likely,
                }
                comma = ", " if number else ""
                questions.write(
                    comma + json.dumps(shared | {"question": f"{question_type} thing {number}?"})
                )
                annotations.write(comma + json.dumps(shared | kinds | {"answers": answers}))
                predictions.write(
                    json.dumps(
                        {"question_id": number, "text": rng.choice((likely, rng.choice(WORDS)))}
                    )
                    + "\n"
                )
        questions.write("]}")
        annotations.write("]}")


def main() -> None:
    """Generate the files, score them, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-questions", type=int, default=447_793)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, options.num_questions)
        started, cpu = time.perf_counter(), time.process_time()
        content = score_file(load_benchmark("vqav2"), folder, folder / "predictions.jsonl")
        write_whole(folder / "scores.json", json.dumps(content))
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu

    found = {
        "questions": content["n"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    write_whole(
        options.out / "scoring.json", json.dumps(found | {"about": provenance()}, indent=2) + "\n"
    )
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
