"""Answers that are boxes or points, scored: overlap with the true box, and what could not be read.

    score_boxes(["at [228, 320, 961, 970]"], [true box], [(640, 428)], "thousand")
    judge_boxes(questions whose facts hold `boxes`, id -> text, "thousand") -> Judgement

An answer without a box is a miss that is counted apart; of two boxes the first counts; corners in
the wrong order are put in order. All three are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from mipha.comparison.statistics import Totals
from mipha.data.region_text import parse_leniently, parse_regions
from mipha.data.regions import Numbers, Size, area
from mipha.evaluation.benchmark import Judgement, Metric, Question

THRESHOLD = 0.5
"""Lowest IoU that counts as right. Source: RefCOCO's accuracy; some programs ask for more."""

METRICS = (
    Metric("accuracy", "%", f"answers whose box has an IoU of {THRESHOLD} or more with the right"),
    Metric("mean_iou", "%", "mean IoU of the box and the right one, 0 without a box"),
)
"""Metrics of questions that are answered by one box."""


class BoxScores(NamedTuple):
    """How well boxes were found.

    Args:
        accuracy: Share of answers whose IoU with the true box is at least the threshold; RefCOCO's
            Acc@0.5. Some programs ask for more than 0.5.
        mean_iou: Mean IoU, 0 for an answer without a box.
        mean_giou: Mean generalised IoU, -1 for an answer without a box.
        num_unparsed: Answers without a box.
        num_several: Answers with more than one box, of which the first counts.
        num_reversed: Boxes whose corners were in the wrong order.
        num_lenient: Boxes read in another form than the model's.
        ious: IoU of each answer, for intervals that are clustered by image.
        boxes: The box of each answer, its corners in order; None where there is none.
    """

    accuracy: float
    mean_iou: float
    mean_giou: float
    num_unparsed: int
    num_several: int
    num_reversed: int
    num_lenient: int
    ious: tuple[float, ...]
    boxes: tuple[Numbers | None, ...]


def score_boxes(
    answers: Sequence[str],
    truths: Sequence[Numbers],
    sizes: Sequence[Size],
    form: str,
    threshold: float = THRESHOLD,
    lenient: bool = False,
) -> BoxScores:
    """Score answers that are to hold one box each.

    Args:
        answers: What the model said.
        truths: True boxes: x1, y1, x2, y2 as fractions of the upright image.
        sizes: Width and height of the upright images, in pixels.
        form: Form that the model was trained in, of `region_text.FORMS`.
        threshold: Lowest IoU that counts as right.
        lenient: Whether other forms are looked for where the model's own finds nothing.
    """
    ious, gious = [], []
    read: list[Numbers | None] = []
    unparsed = several = reversed_ = lenient_ = 0
    for answer, truth, size in zip(answers, truths, sizes, strict=True):
        found, read_as = parse_regions(answer, form, size), form
        if lenient:
            found, read_as = parse_leniently(answer, form, size)
        boxes = [numbers for numbers in found if len(numbers) == 4]
        if not boxes:
            unparsed += 1
            read.append(None)
            ious.append(0.0)
            gious.append(-1.0)
            continue
        several += len(boxes) > 1
        lenient_ += read_as != form
        box = in_order(boxes[0])
        reversed_ += box != boxes[0]
        read.append(box)

        # Fractions of both sides stretch all areas alike, so IoU needs no pixels.
        ious.append(iou(box, truth))
        gious.append(giou(box, truth))
    number = max(len(ious), 1)
    return BoxScores(
        accuracy=sum(value >= threshold for value in ious) / number,
        mean_iou=sum(ious) / number,
        mean_giou=sum(gious) / number,
        num_unparsed=unparsed,
        num_several=several,
        num_reversed=reversed_,
        num_lenient=lenient_,
        ious=tuple(ious),
        boxes=tuple(read),
    )


def judge_boxes(
    questions: Sequence[Question], predictions: Mapping[str, str], form: str
) -> Judgement:
    """Judge answers that are to hold one box each; `METRICS` are made of the sums.

    Args:
        questions: Questions whose facts are `boxes`, one region, and `image`.
        predictions: Question id to text.
        form: Form in which the model writes boxes.
    """
    right = [one.facts["boxes"][0] for one in questions]
    found = score_boxes(
        [predictions[one.id] for one in questions],
        [region.numbers for region in right],
        [region.size for region in right],
        form,
    )
    said = {one.id: box for one, box in zip(questions, found.boxes, strict=True)}
    is_right = {
        one.id: float(iou >= THRESHOLD) for one, iou in zip(questions, found.ious, strict=True)
    }
    odd = (
        (found.num_unparsed, f"hold no box in the form {form}, and count as wrong"),
        (found.num_several, "hold several boxes, of which the first counts"),
        (found.num_reversed, "give the corners in the wrong order, and were put in order"),
    )
    return Judgement(
        per_question=is_right,
        contributions=[
            (one.facts["image"], {"accuracy": is_right[one.id], "mean_iou": iou})
            for one, iou in zip(questions, found.ious, strict=True)
        ],
        parsed={name: None if box is None else _as_text(box) for name, box in said.items()},
        boxes={name: (box,) for name, box in said.items() if box is not None},
        notes=tuple(f"{num:,} of {len(questions):,} answers {what}" for num, what in odd if num),
    )


def measure_boxes(totals: Totals) -> dict[str, np.ndarray]:
    """Return `METRICS` from the sums of `judge_boxes`."""
    return {metric.name: 100 * totals.mean(metric.name) for metric in METRICS}


def detection_f1(said: Sequence[Numbers], right: Sequence[Numbers]) -> float:
    """Return F1 of boxes that are matched one to one, each by an IoU of `THRESHOLD` or more.

    Nothing said where nothing is to be found is 1.
    """
    if not said or not right:
        return float(len(said) == len(right))
    overlaps = np.asarray([[iou(in_order(one), other) for other in right] for one in said])
    rows, columns = linear_sum_assignment(overlaps < THRESHOLD)
    num_matched = int((overlaps[rows, columns] >= THRESHOLD).sum())
    return 2 * num_matched / (len(said) + len(right))


def score_points(
    answers: Sequence[str],
    truths: Sequence[Sequence[Numbers]],
    sizes: Sequence[Size],
    form: str,
    radius: float,
) -> float:
    """Return F1 of points: an answer's points are matched one to one to true ones in reach.

    Args:
        answers: What the model said.
        truths: True points of each image, as fractions of it; none is an answer without a point.
        sizes: Width and height of the upright images, in pixels.
        form: Form that the model was trained in.
        radius: Pixels that a point may be away.
    """
    matched = said = true = 0
    for answer, points, size in zip(answers, truths, sizes, strict=True):
        found = [one for one in parse_regions(answer, form, size) if len(one) == 2]
        said, true = said + len(found), true + len(points)
        if not found or not points:
            continue
        offsets = (np.asarray(found)[:, None] - np.asarray(points)[None]) * size
        far = np.hypot(*np.moveaxis(offsets, -1, 0)) > radius  # (said, true)
        rows, columns = linear_sum_assignment(far)
        matched += int((~far[rows, columns]).sum())
    return 2 * matched / (said + true) if said + true else 1.0


def in_order(box: Numbers) -> Numbers:
    """Return a box with its upper left corner first."""
    x1, y1, x2, y2 = box
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def iou(first: Numbers, second: Numbers) -> float:
    """Return the area that two boxes share over the area that they cover together."""
    shared = _shared(first, second)
    together = area(first) + area(second) - shared
    return shared / together if together > 0 else 0.0


def giou(first: Numbers, second: Numbers) -> float:
    """Return generalised IoU: IoU less the share of the hull of both that neither covers.

    Source: Rezatofighi et al. 2019, equation of algorithm 1.
    """
    shared = _shared(first, second)
    together = area(first) + area(second) - shared
    hull = area(
        (
            min(first[0], second[0]),
            min(first[1], second[1]),
            max(first[2], second[2]),
            max(first[3], second[3]),
        )
    )
    return shared / together - (hull - together) / hull if together > 0 and hull > 0 else -1.0


def _as_text(box: Numbers) -> str:
    return ", ".join(f"{number:.3f}" for number in box)


def _shared(first: Numbers, second: Numbers) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0.0) * max(height, 0.0)
