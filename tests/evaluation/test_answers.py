"""The three official normalisers: each quirk with the value that the written rules give."""

from __future__ import annotations

import pytest

from mipha.evaluation.answers import (
    CONTRACTIONS,
    CURLY_CONTRACTIONS,
    agreement,
    human_answers,
    m4c,
    mixed_up_annotators,
    plain,
    vizwiz_api,
    vqa_official,
)


@pytest.mark.parametrize(
    ("text", "of_m4c", "of_vqa"),
    [
        ("  Yes  ", "yes", "yes"),
        ("", "", ""),
        # Only m4c deletes commas and question marks first, and cuts off 's.
        ("man's", "man 's", "man's"),
        ("let's", "let 's", "let's"),
        ("red,blue", "redblue", "red blue"),
        ("red, blue", "red blue", "red blue"),
        ("who?me", "whome", "who me"),
        # A comma between digits makes the VQA scorer delete every mark and leave no space; m4c
        # never sees one.
        ("1,000", "1000", "1000"),
        ("1,000-2,000", "1000 2000", "10002000"),
        ("1,000 t-shirt", "1000 t shirt", "1000 tshirt"),
        # A mark becomes a space, unless it stands next to a space somewhere: then it is deleted
        # everywhere.
        ("t-shirt", "t shirt", "t shirt"),
        ("red - blue-green", "red bluegreen", "red bluegreen"),
        ("yes!", "yes", "yes"),
        ("1/2", "1 2", "1 2"),
        ('say "stop"', "say stop", "say stop"),
        (r";/[]\"{}()=+\_-><@`!x", "x", "x"),
        # The decision looks at the text as it came in, not at what other marks have become.
        ("x->y>z", "x y z", "x y z"),
        # Newlines and tabs become spaces before the marks are looked at, so they count as spaces
        # next to a mark.
        ("on-\nthe-go", "on thego", "on thego"),
        ("yes\tno\nso", "yes no so", "yes no so"),
        # Periods go unless a digit follows; the look-behind of the official pattern does nothing.
        ("5.", "5", "5"),
        (".5", ".5", ".5"),
        ("3.5.", "3.5", "3.5"),
        ("Dr. Pepper", "dr pepper", "dr pepper"),
        ("u.s.a.", "usa", "usa"),
        ("x" + 40 * ".", "x" + 8 * ".", "x" + 8 * "."),
        ("5:30 $4 50% r&b #1 o'neil", "5:30 $4 50% r&b #1 o'neil", "5:30 $4 50% r&b #1 o'neil"),
        # Number words, then articles, then contractions; each on whole words.
        ("None", "0", "0"),
        ("zero One two three four five six", "0 1 2 3 4 5 6", "0 1 2 3 4 5 6"),
        ("seven eight nine TEN eleven", "7 8 9 10 eleven", "7 8 9 10 eleven"),
        ("A", "", ""),
        ("The man on an ant", "man on ant", "man on ant"),
        ("dont", "don't", "don't"),
        ("couldn'tve oclock", "couldn't've o'clock", "couldn't've o'clock"),
        ("Im Ive lets", "im ive lets", "im ive lets"),
        ("somebody'd", "somebodyd", "somebodyd"),
        ("The MAN'S hat", "man 's hat", "man's hat"),
    ],
)
def test_m4c_and_the_vqa_scorer(text: str, of_m4c: str, of_vqa: str) -> None:
    assert (m4c(text), vqa_official(text)) == (of_m4c, of_vqa)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("dont", "don’t"),
        ("Cant", "can't"),
        ("weve", "we've"),
        ("couldn'tve", "couldn’t’ve"),
        ("couldnt've", "couldnt've"),  # the table's key has the curly apostrophe
        ("couldnt’ve", "couldn’t’ve"),
        ("The t-shirt.", "t shirt"),
        ("1,000-2,000", "10002000"),
        ("man's", "man's"),
        ("two\nten", "2 10"),
    ],
)
def test_the_vizwiz_api_has_curly_contractions(text: str, normalised: str) -> None:
    assert vizwiz_api(text) == normalised


def test_contraction_tables() -> None:
    assert len(CONTRACTIONS) == len(CURLY_CONTRACTIONS) == 120
    assert not any("’" in part for pair in CONTRACTIONS.items() for part in pair)
    assert {key for key in CONTRACTIONS if key != key.lower()} == {"Id've", "I'dve", "Im", "Ive"}
    straight = {key: value for key, value in CURLY_CONTRACTIONS.items() if "'" in key + value}
    assert straight == {
        "aint": "ain't",
        "arent": "aren't",
        "cant": "can't",
        "couldve": "could've",
        "couldnt": "couldn't",
        "couldn'tve": "couldn’t’ve",
        "hadn'tve": "hadn’t’ve",
        "weve": "we've",
        "wheres": "where's",
        "whove": "who've",
    }
    assert CURLY_CONTRACTIONS["’ow’sat"] == "’ow’s’at"


def test_plain() -> None:
    assert plain("\n a\tb\nc \t") == "a b c"


@pytest.mark.parametrize(
    ("equal", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)]
)
def test_agreement_leaves_each_person_out_in_turn(equal: int, accuracy: float) -> None:
    assert agreement("x", ["x"] * equal + ["y"] * (10 - equal)) == pytest.approx(
        accuracy, abs=1e-12
    )


def test_people_without_ids_of_their_own_leave_one_another_out() -> None:
    nine_to_one = [{"answer": "x"}] * 9 + [{"answer": "y"}]
    alike = mixed_up_annotators(nine_to_one)
    # Without any x all nine are left out; without the y nine are left to match: (9 * 0 + 1) / 10.
    assert agreement("x", ["x"] * 9 + ["y"], alike) == pytest.approx(0.1)
    by_confidence = mixed_up_annotators(
        [{"answer": "x", "answer_confidence": c} for c in ("yes", "yes", "no")]
    )
    # Each "yes" leaves out both, so one matches; "no" leaves out itself, so two match:
    # (1/3 + 1/3 + 2/3) / 3.
    assert agreement("x", ["x"] * 3, by_confidence) == pytest.approx(4 / 9)
    assert mixed_up_annotators([{"answer": "x", "answer_id": n} for n in range(1, 11)]) is None
    assert mixed_up_annotators([{"answer": "x", "answer_id": n} for n in (7, 3)]) is None


def test_human_answers() -> None:
    assert human_answers([{"answer": "a b"}, {"answer": "\n"}], "here") == ("a b", "\n")
    for answers in ("yes", ["yes"], [{"text": "yes"}], [{"answer": 2}], 3):
        with pytest.raises(ValueError, match="file 7: its answers are not a list"):
            human_answers(answers, "file 7")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="file 7 has no human answer"):
        human_answers([], "file 7")
