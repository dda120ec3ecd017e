"""Text forms of boxes and points: goldens, and back again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipha.data.faults import RecordError
from mipha.data.region_text import (
    FORMS,
    parse_leniently,
    parse_regions,
    write_regions,
    write_sample,
)
from mipha.data.regions import Region, as_region
from mipha.data.sample import Message, Sample

SIZE = (640, 428)
BOX = as_region((146, 137, 615, 415), SIZE, 0, "cat", "")
CENTRE = as_region((380.5, 276, 380.5, 276)[:2], SIZE, 0, "cat", "")


@pytest.mark.parametrize(
    ("region", "form", "text"),
    [
        (BOX, "thousand", "[228, 320, 961, 970]"),
        (BOX, "unit3", "[0.228, 0.320, 0.961, 0.970]"),
        (BOX, "square2", "[0.23, 0.38, 0.96, 0.81]"),
        (BOX, "bbox_2d", '[{"bbox_2d": [228, 320, 961, 970], "label": "cat"}]'),
        (BOX, "loc", "<loc0327><loc0233><loc0992><loc0984> cat"),
        (CENTRE, "thousand", "[595, 645]"),
        (CENTRE, "bbox_2d", '[{"point_2d": [595, 645], "label": "cat"}]'),
        (CENTRE, "molmo", '<point x="59.5" y="64.5" alt="cat">cat</point>'),
        (CENTRE, "molmo2", '<points coords="1 1 595 645">cat</points>'),
    ],
)
def test_goldens(region: Region, form: str, text: str) -> None:
    assert write_regions([region], form) == text
    ((found),) = parse_regions(text, form, SIZE)
    step = {"square2": 0.01, "unit3": 0.001, "molmo": 0.001}.get(form, 0.001)
    assert found == pytest.approx(region.numbers, abs=step)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ('{"bbox_2d": [228, 320, 961, 970]}', 1),
        ('In [1]: ```json\n[{"bbox_2d": [228, 320, 961, 970]}]\n```', 1),
        ('[{"bbox_2d": [228, 320, 961, 970]}, {"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [22', 2),
        ('{"objects": [{"bbox_2d": [228, 320, 961, 970]}]}', 1),
        ('{"bbox_2d": [228, 320, 961]}', 0),
        ('{"bbox_2d": [NaN, 320, 961, 970]}', 0),
        (f'{{"bbox_2d": [{"9" * 400}, 320, 961, 970]}}', 0),
        ('{"a":' * 5000, 0),
    ],
)
def test_json_is_read_around_words_and_up_to_where_it_is_cut(text: str, number: int) -> None:
    found = parse_regions(text, "bbox_2d", SIZE)
    assert len(found) == number
    assert not found or found[0] == pytest.approx((0.228, 0.32, 0.961, 0.97))


def test_several_points_are_one_tag() -> None:
    points = [
        Region(0, (0.5, 0.25), (9, 9), "dots"),
        Region(1, (0.3, 0.2), (9, 9), "dots"),
        Region(0, (0.1, 0.9), (9, 9), "dots"),
    ]
    assert write_regions(points[::2], "molmo2") == (
        '<points coords="1 1 100 900 2 500 250">dots</points>'
    )
    whole = write_regions(points, "molmo2")
    assert whole == '<points coords="1 1 100 900 2 500 250;2 3 300 200">dots</points>'
    assert parse_regions(whole, "molmo2", SIZE) == [(0.1, 0.9), (0.5, 0.25), (0.3, 0.2)]
    text = write_regions(points[::2], "molmo")
    assert text == '<points x1="50.0" y1="25.0" x2="10.0" y2="90.0" alt="dots">dots</points>'
    assert parse_regions(text, "molmo", SIZE) == [(0.5, 0.25), (0.1, 0.9)]


@given(
    numbers=st.tuples(*[st.floats(0, 1)] * 4),
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    form=st.sampled_from([form for form in FORMS if not form.startswith("molmo")]),
)
def test_a_box_comes_back_as_written(
    numbers: tuple[float, ...], size: tuple[int, int], form: str
) -> None:
    written = write_regions([Region(0, numbers, size)] * 2, form)
    found = parse_regions(written, form, size)
    assert len(found) == 2 and found[0] == found[1]
    side = max(size) / min(size)  # a hundredth of the square is more of the shorter side
    step = {"square2": 0.0051 * side, "loc": 0.001}.get(form, 0.00051)
    assert found[0] == pytest.approx(numbers, abs=step + 1 / min(size) * (form == "square2"))


def test_a_model_is_read_in_its_own_form_alone() -> None:
    text = write_regions([BOX], "loc")
    assert parse_regions(text, "thousand", SIZE) == []
    found, form = parse_leniently(text, "thousand", SIZE)
    assert (len(found), form) == (1, "loc")
    assert parse_leniently("nothing", "thousand", SIZE) == ([], "thousand")
    for form in FORMS:
        assert parse_regions("[1] [a, b] <point x='1'> <loc12> [{}]", form, SIZE) == []
        endless = "9" * 5000  # as a model writes them that repeats itself
        parse_regions(f'[{endless}, 1, 2, 3] <points coords="1 1 {endless} 5">', form, SIZE)


def _sample(*texts: str, regions: tuple[Region, ...]) -> Sample:
    roles = ("user", "assistant")
    messages = tuple(Message(role, text) for role, text in zip(roles, texts, strict=True))
    return Sample("s", messages, (Path("a"),), regions=regions)


def test_markers_become_numbers() -> None:
    sample = _sample("<image>At <region>?", "<region><region>, yes", regions=(BOX, CENTRE, BOX))
    written = write_sample(sample, None)
    assert [message.text for message in written.messages] == [
        "<image>At [228, 320, 961, 970]?",
        "[595, 645], [228, 320, 961, 970], yes",
    ]
    literal = _sample("<image>What is <region>?", "A tag.", regions=())
    assert write_sample(literal, None) is literal


def test_regions_without_places_and_boxes_in_a_form_of_points_are_named() -> None:
    with pytest.raises(RecordError, match="1 <region> markers for 2 regions"):
        _sample("<image>?", "<region>", regions=(BOX, BOX))
    with pytest.raises(RecordError, match="it has a box, and the form molmo writes points only"):
        write_sample(_sample("<image>?", "<region>", regions=(BOX,)), "molmo")
