"""A model learns to say where a shape is: the IoU of its boxes, and that of the mean box.

    python benchmarks/boxes.py --checkpoint runs/quickstart [--rows 5120] [--out benchmarks/results]

An image is one coloured shape at a random place, as large as it happens to be. The question names
it, and the answer is its box. A finished model learns it with the program's own commands, in one
pass over the rows, and answers about images that it has not seen. A model that saw nothing could
do no better than to name the same box every time; that of the least error is the mean of all.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw

from mipha.evaluation.boxes import THRESHOLD, iou
from mipha.files import read_json_object, read_lines, write_whole
from mipha.run import provenance

SIDE = 70
"""Pixels of an image, as the quickstart's tower reads it: five patches a side."""

SIDES = (20, 45)
"""Pixels of the shortest and the longest side of a box."""

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
    "black": (20, 20, 20),
    "purple": (140, 60, 170),
}
SHAPES = ("rectangle", "ellipse", "triangle")


def draw_rows(folder: Path, name: str, number: int, seed: int) -> Path:
    """Draw images, and write a question and a box for each, in a form that training reads."""
    draw, rows = random.Random(seed), []
    (folder / name).mkdir(parents=True)
    for place in range(number):
        width, height = draw.randint(*SIDES), draw.randint(*SIDES)
        left, top = draw.randint(0, SIDE - width), draw.randint(0, SIDE - height)
        colour, shape = draw.choice(sorted(COLOURS)), draw.choice(SHAPES)
        box = (left, top, left + width, top + height)

        image = Image.new("RGB", (SIDE, SIDE), (draw.randint(225, 255),) * 3)
        pen, inside = ImageDraw.Draw(image), (left, top, box[2] - 1, box[3] - 1)
        if shape == "triangle":
            corners = [(left, inside[3]), (inside[2], inside[3]), (left + width // 2, top)]
            pen.polygon(corners, COLOURS[colour])
        else:
            getattr(pen, shape)(inside, COLOURS[colour])

        image.save(folder / name / f"{place}.png")
        question = f"Where is the {colour} {shape}?"
        rows.append({"image": f"{name}/{place}.png", "captions": [question], "bbox": box})
    file = folder / f"{name}.jsonl"
    write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe(checkpoint: Path, rows: Path, seed: int) -> dict[str, Any]:
    """Return the recipe: the projector and the upper half of the language model train."""
    stage = {
        "data": [{"dataset": "grounding", "root": str(rows), "bbox_format": "xyxy"}],
        "tuning": {"vision_tower": "frozen", "projector": "full", "language_model": "last-16"},
        "learning_rate": 3e-4,
        "batch_size": 32,
        "batching": "packed",
        "row_tokens": 256,
        "micro_batch_rows": 8,
        "checkpoint_every": 32,
        "held_out": 0.0,
    }
    about = {"name": "boxes", "description": "where a shape is", "seed": seed}
    return about | {"model": {"checkpoint": str(checkpoint)}, "stages": {"finetune": stage}}


def score_mean_box(train: Path, test: Path) -> dict[str, float]:
    """Score the answer that is always the mean of the boxes that were trained on, in percent."""
    boxes = [json.loads(line)["bbox"] for line in train.read_text().splitlines()]
    truths = [json.loads(line)["bbox"] for line in test.read_text().splitlines()]
    mean = tuple(np.mean(boxes, axis=0).tolist())
    ious = np.array([iou(mean, tuple(truth)) for truth in truths])
    return {
        "accuracy": round(100 * float((ious >= THRESHOLD).mean()), 1),
        "mean_iou": round(100 * float(ious.mean()), 1),
    }


def ask(run: Path, test: Path, *more: str) -> dict[str, Any]:
    """Ask about all test images; return each score in percent, with its 95 % interval."""
    _mipha("evaluate", run, "--data", test, "--max-new-tokens", "32", *more, "bbox_format=xyxy")
    folders = [path.parent for path in (run / "evaluation").glob("*/scores.json")]
    (folder,) = [path for path in folders if path.name.endswith("-blind") == ("--blind" in more)]
    return {
        score["metric"]: [round(score[key], 1) for key in ("value", "low", "high")]
        for score in read_json_object(folder / "scores.json")["scores"]
    }


def _mipha(*arguments: Any) -> None:
    subprocess.run([sys.executable, "-m", "mipha", *map(str, arguments)], check=True)


def main() -> None:
    """Draw, train, ask, and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--rows", type=int, default=5_120, help="rows that are trained on")
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/boxes"), help="rows and run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()

    # A second start goes on with the rows and the run of the first.
    folder = options.folder.resolve()
    train, test, written = (folder / name for name in ("train.jsonl", "test.jsonl", "recipe.yaml"))
    if not written.is_file():
        draw_rows(folder, "train", options.rows, options.seed)
        draw_rows(folder, "test", options.test_rows, options.seed + 1)
        told = recipe(options.checkpoint.resolve(), train, options.seed)
        write_whole(written, yaml.safe_dump(told))

    _mipha("train", written, "-o", folder / "run")
    steps = list(read_lines(folder / "run" / "finetune" / "metrics.jsonl"))
    found: dict[str, Any] = {
        "about": provenance() | {"rows": len(train.read_text().splitlines())},
        "steps": len(steps),
        "training_seconds": round(sum(step["seconds"] for step in steps)),
        "last_loss": round(steps[-1]["loss"], 3),
        "model": ask(folder / "run", test),
        "the same model, blind": ask(folder / "run", test, "--blind"),
        "mean box": score_mean_box(train, test),
    }
    write_whole(options.out / "boxes.json", json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
