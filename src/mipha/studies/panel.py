"""The qualitative panel: a few images and questions, answered by every variant side by side.

python -m mipha.studies.panel RUN STUDY.yaml SCALE     writes RUN/panel.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mipha.evaluation.benchmark import Question, load_benchmark
from mipha.files import read_lines, write_whole
from mipha.processes import end_with_parent
from mipha.studies.study import Measured, PanelQuestion, load_study

MAX_NEW_TOKENS = 128


def asked_of(questions: Sequence[PanelQuestion], measured: Sequence[Measured]) -> list[Question]:
    """Return the panel's questions with their images.

    Raises:
        ValueError: A benchmark that the study does not measure, or a number past its last question.
        FileNotFoundError: An image is not there.
    """
    by_name = {wanted.benchmark: wanted for wanted in measured}
    loaded: dict[str, Sequence[Question]] = {}
    found = []
    for number, question in enumerate(questions):
        facts = {"kind": question.kind}

        # `benchmark:N` is the image of a benchmark's question.
        name, _, row = question.image.rpartition(":")
        if name in by_name and row.isdigit():
            if name not in loaded:
                benchmark = load_benchmark(name)
                loaded[name] = benchmark.questions(by_name[name].data_root, by_name[name].split)
            if int(row) >= len(loaded[name]):
                raise ValueError(
                    f"the panel wants question {row} of {name}, which has {len(loaded[name])}: "
                    "use a smaller number"
                )
            asked = loaded[name][int(row)]
            text = question.question or asked.text
            found.append(Question(str(number), text, asked.image, facts))
            continue

        # Anything else is a file.
        image = Path(question.image)
        if not image.is_file():
            raise FileNotFoundError(
                f"the panel's image {image} is not there, "
                f"and no benchmark of the study is called {name or image}"
            )
        if question.question is None:
            raise ValueError(f"the panel's image {image} has no question: give one")
        found.append(Question(str(number), question.question, image, facts))
    return found


def answer_panel(
    run: Path, questions: Sequence[PanelQuestion], measured: Sequence[Measured]
) -> None:
    """Write a run's answers to the panel, once."""
    from mipha.assistant import load

    asked = asked_of(questions, measured)
    answers = load(run).answer_many(
        [(question.image, question.text) for question in asked], max_new_tokens=MAX_NEW_TOKENS
    )
    rows = [
        {"question": question.text, "answer": answer.text}
        for question, answer in zip(asked, answers, strict=True)
    ]
    write_whole(
        run / "panel.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )


def panel_answers(run: Path) -> list[str]:
    """Return the answers of a run; an empty list where it was not asked."""
    return [row["answer"] for row in read_lines(run / "panel.jsonl")]


if __name__ == "__main__":
    end_with_parent()
    asked = load_study(sys.argv[2]).at(sys.argv[3]).asked
    answer_panel(Path(sys.argv[1]), asked.panel, asked.evaluate)
