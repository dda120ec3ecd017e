"""The price of an image: its tokens, and the time from it to the first token of an answer.

python -m mipha.studies.first_token RUN STUDY.yaml SCALE     writes RUN/first-token.json

One thread of the CPU, one question at a time: reading the image, the tower, the whole prompt. The
median over images that were not seen before, behind one that warms up. CPU time is counted, which
on an idle core is the time that passes, so that other work on the machine does not count.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mipha.evaluation.benchmark import Question, load_benchmark
from mipha.files import read_json, write_whole
from mipha.processes import end_with_parent
from mipha.studies.study import Measured, load_study

NUM_IMAGES = 20


@dataclass(frozen=True)
class FirstToken:
    """What an image costs before an answer begins.

    Args:
        image_tokens: Tokens that stand for the images of a question, marks left out; the mean.
        prompt_tokens: Tokens of the whole prompt; the mean.
        milliseconds: CPU time from an image and a question to the first token; the median.
    """

    image_tokens: float
    prompt_tokens: float
    milliseconds: float


def time_first_token(run: Path, measured: Sequence[Measured]) -> None:
    """Write what the images of a study's first benchmark cost a run."""
    import torch

    from mipha.assistant import load
    from mipha.data.sample import turns_of

    torch.set_num_threads(1)
    asked, assistant = _distinct_images(measured[0]), load(run, device="cpu")
    image_id = assistant.processor.image_token_id
    images, prompts, seconds = [], [], []
    for question in asked:
        turns = turns_of(question.asked, len(question.images))
        began = time.process_time()
        prompt = assistant.prompt(turns, question.images, max_new_tokens=1)
        assistant.generate([prompt])
        seconds.append(time.process_time() - began)
        images.append(prompt.ids.count(image_id))
        prompts.append(len(prompt.ids))

    found = FirstToken(
        statistics.mean(images), statistics.mean(prompts), 1000 * statistics.median(seconds[1:])
    )
    write_whole(run / "first-token.json", json.dumps(asdict(found)) + "\n")


def first_token_of(run: Path) -> FirstToken | None:
    """Return what was measured of a run; None where it was not."""
    path = run / "first-token.json"
    return FirstToken(**read_json(path)) if path.is_file() else None


def _distinct_images(wanted: Measured) -> list[Question]:
    """Return the first question of each of the first images of a benchmark."""
    found: dict[object, Question] = {}
    for question in load_benchmark(wanted.benchmark).questions(wanted.data_root, wanted.split):
        if question.image is not None:
            found.setdefault(question.image, question)
        if len(found) > NUM_IMAGES:
            break
    return list(found.values())


if __name__ == "__main__":
    end_with_parent()
    time_first_token(Path(sys.argv[1]), load_study(sys.argv[2]).at(sys.argv[3]).asked.evaluate)
