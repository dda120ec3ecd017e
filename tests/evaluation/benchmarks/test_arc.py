"""ARC: questions without an image whose likeliest option counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mipha.comparison.statistics import tally, values
from mipha.evaluation.benchmarks import arc
from tests.evaluation.official import BrokenLabel, Official, write_parquet

FILE = "ARC-Challenge/test-00000-of-00001.parquet"


def record(number: int, answer: str, texts: tuple[str, ...], **changes: Any) -> dict[str, Any]:
    choices = {"text": list(texts), "label": list("ABCDE"[: len(texts)])}
    named = {"id": f"Mercury_{number}", "question": "Which is a metal?", "choices": choices}
    return named | {"answerKey": answer} | changes


RECORDS = [
    record(1, "A", ("iron", "a long piece of wood")),
    record(2, "C", ("wood", "glass", "gold")),
    record(3, "B", ("wood", "gold")) | {"question": "Which shines?"},
]
GOLD = {
    "Mercury_1": "[[-4, 1], [-30, 5]]",
    "Mercury_2": "[[-9, 1], [-9, 1], [-2, 1]]",
    "Mercury_3": "[[-9, 1], [-2, 1]]",
}


def write_official(folder: Path) -> None:
    write_parquet(folder / FILE, RECORDS)


def test_prompts_and_continuations(tmp_path: Path) -> None:
    write_official(tmp_path)
    first, *_ = arc.BENCHMARK.questions(tmp_path)
    assert first.text == "Question: Which is a metal?\nAnswer:" and first.image is None
    assert first.facts["continuations"] == (" iron", " a long piece of wood")


def test_a_long_option_is_not_at_a_loss(tmp_path: Path) -> None:
    write_official(tmp_path)
    labelled = arc.read_labels(tmp_path)
    # The long option of the first is likelier by character, not as a whole.
    judgement = arc.score(labelled, GOLD | {"Mercury_1": "[[-4, 1], [-10, 5]]"})
    assert judgement.per_question == {"Mercury_1": 0, "Mercury_2": 1, "Mercury_3": 1}
    assert judgement.parsed == {"Mercury_1": "B", "Mercury_2": "C", "Mercury_3": "B"}
    found = values(tally(judgement.contributions), arc.measure)
    assert found == pytest.approx({"acc_norm": 200 / 3, "acc": 100})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"answerKey": "3"}, "answerKey '3' should be one of A, B, C, the labels of its 3 options"),
        ({"id": "Mercury_1"}, "row 1 has the id Mercury_1 of .* row 0"),
        ({"choices": {"text": ["a"], "label": ["A"]}}, "choices.text .* at least 2"),
    ],
)
def test_a_malformed_row_is_named(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / FILE, [RECORDS[0], RECORDS[1] | change])
    with pytest.raises(ValueError, match=sentence):
        arc.read_labels(tmp_path)


# Official files in small, for the tests of the command line and of the evaluation.

OFFICIAL = Official(
    write=write_official,
    gold=GOLD,
    size="1,172",
    readings=("parsed",),
    broken_label=BrokenLabel(
        FILE, "\x01\x00\x00\x00C", "\x01\x00\x00\x00Z", ("answerKey 'C' should be one of A, B, Z",)
    ),
    metric="acc_norm",
    by_likelihood=True,
    without_file="ARC-Challenge/test-*.parquet",
    prompts=("    Question: Which is a metal?\n    Answer: iron\n",),
)
