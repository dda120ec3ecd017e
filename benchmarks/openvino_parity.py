"""Answers of an OpenVINO export to easy-VQA's test split, compared with the model's own.

    python benchmarks/openvino_parity.py RUN --python ENV/bin/python [--weights fp32,int8] \\
        [--questions 200]

optimum-intel exports the model, and the answers are greedy. ENV is another environment with
`optimum-intel[openvino]` and `openvino-genai`, because optimum-intel 2.2 needs an older
transformers than mipha. Three runtimes answer: OpenVINO GenAI on the export as it is; GenAI after
`preprocessor_config.json` is rewritten to the only preprocessing that it reads (shortest edge, then
a crop, which changes images that are not square); and optimum-intel.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from inference import easy_questions
from serving import MAX_TOKENS, answers_alone

from mipha.run import model_folder


def export(python: Path, checkpoint: Path, weights: str, out: Path) -> None:
    """Write a checkpoint for OpenVINO.

    Raises:
        SystemExit: optimum-cli is not beside the interpreter, or it failed.
    """
    program = python.parent / "optimum-cli"
    if not program.is_file():
        raise SystemExit(
            f"{program} is not there: pip install 'optimum-intel[openvino]' openvino-genai "
            "in that environment"
        )

    task = ["--task", "image-text-to-text", "--weight-format", weights]
    command = [program, "export", "openvino", "--model", checkpoint, *task, out]
    done = subprocess.run(
        command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"optimum-cli failed:\n{done.stderr[-2000:]}")


def crop_instead(folder: Path, out: Path) -> None:
    """Copy an export and rewrite its preprocessing to one that GenAI reads."""
    shutil.copytree(folder, out, copy_function=os.link)
    path = out / "preprocessor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"size": {"shortest_edge": settings["size"]["height"]}, "do_center_crop": True}
    path.unlink()  # a link to the original
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def ask(python: Path, kind: str, folder: Path, questions: Sequence[tuple[str, str]]) -> list[str]:
    """Answer questions in another interpreter.

    Raises:
        SystemExit: The interpreter failed.
    """
    lines = "".join(
        json.dumps({"image": image, "text": text, "max_tokens": MAX_TOKENS}) + "\n"
        for image, text in questions
    )

    worker = Path(__file__).with_name("openvino_worker.py")
    done = subprocess.run(
        [python, worker, kind, folder], input=lines, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{kind} failed on {folder}:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('"')]


def main() -> None:
    """Export, ask, and count equal answers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="RUN")
    parser.add_argument(
        "--python", type=Path, required=True, help="the interpreter of an environment with OpenVINO"
    )
    parser.add_argument("--weights", default="fp32,int8")
    parser.add_argument("--questions", type=int, default=200)
    options = parser.parse_args()

    questions = easy_questions(options.questions)
    expected = answers_alone(options.source, "transformers", questions)
    print(f"| weights | runtime | the same answer, of {len(questions)} |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for weights in options.weights.split(","):
            plain, cropped = Path(folder) / weights, Path(folder) / f"{weights}-cropped"
            export(options.python, model_folder(options.source), weights, plain)
            crop_instead(plain, cropped)

            for way, kind, exported in (
                ("GenAI, as exported", "genai", plain),
                ("GenAI, preprocessing rewritten", "genai", cropped),
                ("optimum-intel, float32", "optimum", plain),
            ):
                found = ask(options.python, kind, exported, questions)
                same = sum(text == wanted for text, wanted in zip(found, expected, strict=True))
                print(f"| {weights} | {way} | {same} |")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
