"""Answers that are boxes or points, scored: overlap with the true box, and what could not be read.

    score_boxes(["at [228, 320, 961, 970]"], [true box], [(640, 428)], "thousand")

An answer without a box is a miss that is counted apart; of two boxes the first counts; corners in
the wrong order are put in order. All three are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from mipha.data.region_text import parse_leniently, parse_regions
from mipha.data.regions import Numbers, Size, area


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
    """

    accuracy: float
    mean_iou: float
    mean_giou: float
    num_unparsed: int
    num_several: int
    num_reversed: int
    num_lenient: int
    ious: tuple[float, ...]


def score_boxes(
    answers: Sequence[str],
    truths: Sequence[Numbers],
    sizes: Sequence[Size],
    form: str,
    threshold: float = 0.5,
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
    unparsed = several = reversed_ = lenient_ = 0
    for answer, truth, size in zip(answers, truths, sizes, strict=True):
        found, read_as = parse_regions(answer, form, size), form
        if lenient:
            found, read_as = parse_leniently(answer, form, size)
        boxes = [numbers for numbers in found if len(numbers) == 4]
        if not boxes:
            unparsed += 1
            ious.append(0.0)
            gious.append(-1.0)
            continue
        several += len(boxes) > 1
        lenient_ += read_as != form
        box = in_order(boxes[0])
        reversed_ += box != boxes[0]

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
    )


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


def point_in_box(point: Numbers, box: Numbers) -> bool:
    """Return whether a point lies in a box; its edges belong to it."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def _shared(first: Numbers, second: Numbers) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0.0) * max(height, 0.0)
