"""Scores of boxes and points: goldens of overlap, and each odd answer counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mipha.data.regions import Numbers
from mipha.evaluation.boxes import detection_f1, giou, iou, score_boxes, score_points

FIELD = Path(__file__).parents[1] / "data/field"
GOLDEN = json.loads((FIELD / "geometry.json").read_text())["iou"]
SIZE = (640, 480)


@pytest.mark.parametrize(("first", "second", "overlap", "generalised"), GOLDEN)
def test_goldens(
    first: list[float], second: list[float], overlap: float, generalised: float
) -> None:
    assert iou(tuple(first), tuple(second)) == pytest.approx(overlap)
    assert iou(tuple(second), tuple(first)) == pytest.approx(overlap)
    assert giou(tuple(first), tuple(second)) == pytest.approx(generalised)


def test_odd_answers_are_counted() -> None:
    truth: Numbers = (0.1, 0.2, 0.5, 0.6)
    answers = [
        "At [100, 200, 500, 600].",
        "At [100, 200, 500, 400].",  # half of it: exactly the threshold
        "[500, 600, 100, 200]",
        "[100, 200, 500, 600] or [0, 0, 1, 1]",
        "I do not know.",
        "<loc0204><loc0102><loc0614><loc0512>",
        "[0, 0, 0, 0]",
    ]
    number = len(answers)
    scores = score_boxes(answers, [truth] * number, [SIZE] * number, "thousand")
    assert scores.ious == pytest.approx((1, 0.5, 1, 1, 0, 0, 0))
    assert scores.accuracy == pytest.approx(4 / 7)
    assert scores.mean_iou == pytest.approx(3.5 / 7)
    assert (scores.num_unparsed, scores.num_several, scores.num_reversed) == (2, 1, 1)
    lenient = score_boxes(answers, [truth] * number, [SIZE] * number, "thousand", lenient=True)
    assert (lenient.num_unparsed, lenient.num_lenient) == (1, 1) and lenient.ious[5] > 0.98


def test_points() -> None:
    truths: list[list[Numbers]] = [[(0.5, 0.5), (0.1, 0.1)], []]
    answers = ["[510, 500] [500, 510] [900, 900]", "There are none."]
    assert score_points(answers, truths, [SIZE] * 2, "thousand", 10) == pytest.approx(2 / 5)
    assert score_points(["none"], [[]], [SIZE], "thousand", 10) == 1


@pytest.mark.parametrize(
    ("said", "right", "worth"),
    [
        ([], [], 1),
        ([(0, 0, 1, 1)], [], 0),
        ([], [(0, 0, 1, 1)], 0),
        ([(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)], [(0.5, 0.5, 1, 1), (0, 0, 0.5, 0.5)], 1),
        ([(0.5, 0.5, 0, 0)], [(0, 0, 0.5, 0.5)], 1),  # corners in the wrong order
        ([(0, 0, 0.5, 0.5)] * 2, [(0, 0, 0.5, 0.5)], 2 / 3),  # said twice: one is wrong
        ([(0, 0, 0.5, 0.5), (0, 0, 0.1, 0.1)], [(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)], 0.5),
    ],
)
def test_boxes_are_matched_one_to_one(
    said: list[Numbers], right: list[Numbers], worth: float
) -> None:
    assert detection_f1(said, right) == pytest.approx(worth)
