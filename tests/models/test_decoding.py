"""Rows of one batch draw and end each by its own rules; no piece of an answer is taken back."""

from __future__ import annotations

import pytest
import torch

from mipha.models.decoding import AnswerText, RowSampler, RowWatch, Sampling

SCORES = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()


def drawn(sampling: Sampling, times: int = 1000) -> list[float]:
    """Share of each token among many draws."""
    sampler = RowSampler([sampling])
    counts = torch.zeros(4)
    for _ in range(times):
        counts[sampler(torch.zeros(1, 1), SCORES[None].clone()).argmax()] += 1
    return (counts / times).tolist()


def close(shares: list[float], wanted: list[float]) -> bool:
    """Within four standard deviations of 1,000 draws."""
    return all(
        abs(share - want) <= 4 * (want * (1 - want) / 1000) ** 0.5
        for share, want in zip(shares, wanted, strict=True)
    )


def test_tokens_are_drawn_with_their_probability() -> None:
    assert close(drawn(Sampling(1.0, seed=1)), [0.5, 0.25, 0.15, 0.1])
    squares = [0.25, 0.0625, 0.0225, 0.01]  # half the temperature squares the probabilities
    assert close(drawn(Sampling(0.5, seed=2)), [square / sum(squares) for square in squares])
    # 0.5 is less than 0.6, so the second is needed too; together they are enough.
    assert close(drawn(Sampling(1.0, top_p=0.6, seed=3)), [2 / 3, 1 / 3, 0, 0])
    assert drawn(Sampling(1.0, top_p=0.5, seed=4), times=50) == [1, 0, 0, 0]
    assert drawn(Sampling(1.0, top_p=1e-9, seed=5), times=50) == [1, 0, 0, 0]


def test_a_row_draws_alone_and_greedy_rows_are_left_as_they_are() -> None:
    both = RowSampler([None, Sampling(1.0, seed=7)])
    alone = RowSampler([Sampling(1.0, seed=7)])
    for _ in range(20):
        scores = both(torch.zeros(2, 1), torch.stack([SCORES, SCORES]))
        assert torch.equal(scores[0], SCORES)
        assert torch.equal(scores[1], alone(torch.zeros(1, 1), SCORES[None].clone())[0])
        assert scores[1].isfinite().sum() == 1


def test_rows_end_at_their_limit_at_an_end_token_and_when_told() -> None:
    told: list[list[int | None]] = []

    def on_tokens(tokens: list[int | None]) -> list[int]:
        told.append(tokens)
        return [2] if len(told) == 2 else []

    watch = RowWatch([1, 9, 9, 3], ends={50}, on_tokens=on_tokens)
    steps = [[10, 11, 12, 13], [0, 21, 22, 23], [0, 50, 0, 33], [0, 0, 0, 0]]
    ended = [watch(torch.tensor(step)[:, None], torch.zeros(4, 1)).tolist() for step in steps]
    assert ended == [
        [True, False, False, False],
        [True, False, True, False],
        [True] * 4,
        [True] * 4,
    ]
    assert watch.tokens == [[10], [11, 21, 50], [12, 22], [13, 23, 33]]
    assert told == [[10, 11, 12, 13], [None, 21, 22, 23], [None, 50, None, 33]], (
        "nothing is told when all have ended"
    )


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


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_no_answer(wrong: float) -> None:
    scores = torch.stack([SCORES, SCORES])
    scores[1, 2] = wrong
    with pytest.raises(ValueError, match="no finite scores"):
        RowSampler([None, None])(torch.zeros(2, 1), scores)

    scores[1, 2] = -torch.inf  # a token that is suppressed
    assert torch.equal(RowSampler([None, None])(torch.zeros(2, 1), scores), scores)
