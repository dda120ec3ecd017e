"""Lettered options in a prompt, the option that an answer names, and the question to a judge."""

from __future__ import annotations

import hashlib

import pytest

from mipha.evaluation.multiple_choice import list_options, matching_prompt, read_option

FOUR = {"A": "a cat", "B": "two dogs", "C": "blue", "D": "nothing at all"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("[D]: ", "D"),
        ("#A#", "A"),
        ("A\n", "A"),
        ("B, B and B", "B"),  # one distinct letter
        ("A or B", None),  # two
        ("b", None),
        ("E", None),  # not an option
        ("", None),
        ("**B**", "B"),
        ("-B-", None),  # this mark is not one of those that give way to a space
        ("<B>", None),
        ("B。", None),
        ("（B）", None),
        ("答案是B", None),
        ("答案是 B", "B"),
        ("The option that fits best is B", "B"),
        # The letter must first occur among the last four words.
        ("B it is then", "B"),
        ("B it is then, yes", None),
        ("B is what I would say: B", None),
        # Then an "answer is" anywhere, in any case, with or without asterisks, and no word boundary
        # after the letter.
        ("The correct answer is B because nobody in here is wearing a red hat.", "B"),
        ("I think the ANSWER  IS **c** since there is no other that fits.", "C"),
        ("My answer is drawn from what is there.", "D"),
        ("The answer is: B, as anybody can see from here.", None),
        ("The answer is e, and then the answer is B of all four.", "B"),
        # Then option texts, in any case, if just one is contained and the answer is not too long
        # (2 x 31 characters).
        ("I see TWO DOGS", "B"),
        ("bluebird", "C"),
        ("two dogs and a cat", None),
        ("It is blue" + "!" * 52, "C"),
        ("It is blue" + "!" * 53, None),
        ("Cannot determine the answer, B", "Z"),
        ("I'm sorry, but without the image provided I guess B", "Z"),
        ("Z", "Z"),
        ("Z: none of them", "Z"),
        ("Z or B", "B"),  # a letter comes first
        ("Failed to obtain answer via API, B", None),
        ("Failed to obtain answer via API: blue", "C"),  # the text rule still looks
    ],
)
def test_reading_rules(answer: str, letter: str | None) -> None:
    assert sum(map(len, FOUR.values())) == 31
    assert read_option(answer, FOUR) == letter


@pytest.mark.parametrize(
    ("question", "answer", "sha256"),
    [
        (
            "What colour is it",
            "crimson",
            "a180ff0dfe8406a26b8835def2bd414b80c76234ebcd4ede6f646ab54998402f",
        ),
        ("是什么颜色", "深红", "1375fb6039930da0339a3b096ccc032859323935e9d957003fedb1bb951f29c2"),
    ],
)
def test_the_judges_prompt_is_the_official_one(question: str, answer: str, sha256: str) -> None:
    """Digests of what the official build_prompt and build_prompt_cn make of these."""
    prompt = matching_prompt(question, {"A": "red", "B": "blue"}, answer)
    assert hashlib.sha256(prompt.encode()).hexdigest() == sha256


def test_options_stand_one_a_line() -> None:
    assert list_options(["red", "blue"]) == "\nA. red\nB. blue"
    assert list_options([]) == ""
