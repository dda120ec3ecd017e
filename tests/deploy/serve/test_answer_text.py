"""Pieces of an answer: never taken back, and together the whole text."""

from __future__ import annotations

import pytest

from mipha.deploy.serve.answer_text import AnswerText

END = 0


def decode(tokens: list[int]) -> str:
    """A token is one byte, as in the tokenizers that have bytes at their bottom."""
    return bytes(tokens).decode("utf-8", errors="replace")


def pieces(
    text: str | bytes, limit: int = 99, stop: tuple[str, ...] = ()
) -> tuple[list[str], AnswerText]:
    """What is sent for each token, until the answer ends."""
    answer = AnswerText(decode, {END}, limit, stop)
    sent = []
    for token in [*(text.encode() if isinstance(text, str) else text), END]:
        sent.append(answer.add(token))
        if answer.reason:
            break
    return sent, answer


@pytest.mark.parametrize(
    ("text", "limit", "stop", "sent", "reason"),
    [
        ("ab", 99, (), ["a", "b", ""], "stop"),
        ("ab", 2, (), ["a", "b"], "length"),
        ("abc", 2, (), ["a", "b"], "length"),
        (
            " a  b\n",
            99,
            (),
            ["", "a", "", "", "  b", "", ""],
            "stop",
        ),  # white space waits for what follows it
        ("é!", 99, (), ["", "é", "!", ""], "stop"),  # two bytes, one character
        ("€", 2, (), ["", "\ufffd"], "length"),  # cut in the middle of it
        (b"a\xff\xffb", 99, (), ["a", "", "", "\ufffd\ufffdb", ""], "stop"),  # no character at all
        (b"a\xff", 99, (), ["a", "", "\ufffd"], "stop"),
        ("axyb", 99, ("xy",), ["a", "", ""], "stop"),
        ("axzb", 99, ("xy",), ["a", "", "xz", "b", ""], "stop"),  # it only began like it
        ("ax", 99, ("xy",), ["a", "", "x"], "stop"),
        ("aax", 99, ("b", "ax"), ["", "a", ""], "stop"),
        ("\na", 99, ("\n",), [""], "stop"),
        ("a b", 3, ("b",), ["a", "", ""], "stop"),  # the stop counts for more than the limit
        ("xxy", 99, ("xy",), ["", "x", ""], "stop"),
    ],
)
def test_what_is_sent_for_each_token(
    text: str | bytes, limit: int, stop: tuple[str, ...], sent: list[str], reason: str
) -> None:
    got, answer = pieces(text, limit, stop)
    assert (got, answer.reason, answer.num_tokens) == (sent, reason, len(sent))
