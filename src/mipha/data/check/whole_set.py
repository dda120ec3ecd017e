"""The whole set: rows that repeat or contradict one another, leakage, spread of answers."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mipha.data.check.findings import Finding, Problem, quoted
from mipha.data.check.near_images import NearHash, NearImages
from mipha.data.check.rows import RowFacts

MAX_CLOSED_WORDS = 5
"""Words: two longer answers to one question may both be right."""

MIN_ANSWERS = 100
"""Short answers below which their balance is not judged."""

LARGEST_SHARE = 0.8
"""Share of one answer, of all short ones or of yes and no, above which a set is unbalanced."""

MIN_ASKED = 5
"""Times that a question is asked before its most frequent answer counts as a blind guess."""

_MOST_KEYS = 20
"""Keys that one finding names."""

_MOST_ANSWERS = 100_000
"""Distinct short answers counted; beyond, new ones are not, so that memory stays bounded."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation set asks, by digest.

    Args:
        name: Name for messages.
        questions_of: Digests of the first lines of the questions, by image digest.
        texts: Digests of whole questions that come without an image.
        num_unread: Rows that could not be read, so were not compared.
        near: Its images by how they look.
        names: Names of those images, and the rows that show them.
    """

    name: str
    questions_of: dict[bytes, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    texts: set[bytes] = field(default_factory=set)
    num_unread: int = 0
    near: NearImages = field(default_factory=lambda: NearImages(()))
    names: tuple[tuple[str, int], ...] = ()


def gather_evaluation(name: str, facts: Iterable[RowFacts]) -> Evaluation:
    """Collect the questions of an evaluation set."""
    questions_of: dict[bytes, set[bytes]] = defaultdict(set)
    texts: set[bytes] = set()
    num_unread = 0
    looks: dict[bytes, tuple[tuple[NearHash, ...], str, int]] = {}
    for row in facts:
        num_unread += row.content is None or any(image.digest is None for image in row.images)
        for image, of_image in zip(row.images, row.names, strict=True):
            if image.digest:
                looks.setdefault(image.digest, (image.near, of_image, row.row))
                questions_of[image.digest].update(turn.line for turn in row.turns)
        if not row.images:
            texts.update(turn.question for turn in row.turns)
    near = NearImages([hashes for hashes, *_ in looks.values()])
    names = tuple((of_image, row) for _, of_image, row in looks.values())
    return Evaluation(name, questions_of, texts, num_unread, near, names)


@dataclass
class Seen:
    """The rows so far, by digest, some 500 bytes a row; add them in order."""

    evaluation: Evaluation | None = None
    contents: dict[bytes, int] = field(default_factory=dict)
    answers_of: dict[bytes, tuple[int, str]] = field(default_factory=dict)
    names_of: dict[bytes, tuple[int, str]] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    answers: Counter[str] = field(default_factory=Counter)
    guesses: dict[bytes, Counter[int]] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)
    first_unread: Finding | None = None

    def add(self, facts: RowFacts) -> list[Finding]:
        """Find what is wrong with a row, given those before it and the evaluation set."""
        if facts.content is None:
            return []
        self.unread.update(facts.unread)
        if facts.unread and self.first_unread is None:
            self.first_unread = Finding("unread-key", facts.row, facts.where, "")
        found = dict(reversed([*self._repeats(facts), *self._leaks(facts)]))
        self._count(facts)
        return [Finding(kind, facts.row, facts.where, what) for kind, what in found.items()]

    def _repeats(self, facts: RowFacts) -> Iterator[Problem]:
        earlier = self.contents.setdefault(facts.content or b"", facts.row)
        if earlier != facts.row:
            yield "duplicate", f"images and words are those of row {earlier}"
            return

        # The same question about the same image, answered in another way.
        first = facts.turns[0] if facts.turns and not facts.turns[0].is_caption else None
        if first and 1 <= len(first.answer.split()) <= MAX_CLOSED_WORDS:
            asked = hashlib.blake2b(first.question, digest_size=16)
            for image in facts.images:
                asked.update(image.digest or b"?")
            row, answer = self.answers_of.setdefault(asked.digest(), (facts.row, first.answer))
            if answer.casefold() != first.answer.casefold():
                yield (
                    "conflicting-answer",
                    f"it answers {quoted(first.answer)} where row {row}, "
                    f"of the same image and question, says {quoted(answer)}",
                )

        # The same image under another name.
        for image, name in zip(facts.images, facts.names, strict=True):
            if image.digest is None or not name:
                continue
            row, other = self.names_of.setdefault(image.digest, (facts.row, name))
            if other != name and name not in self.told:
                self.told.add(name)
                yield (
                    "repeated-image",
                    f"{quoted(name)} shows the same image as {quoted(other)} of row {row}",
                )

    def _leaks(self, facts: RowFacts) -> Iterator[Problem]:
        if self.evaluation is None:
            return
        name = self.evaluation.name
        shown = [
            self.evaluation.questions_of[image.digest]
            for image in facts.images
            if image.digest in self.evaluation.questions_of
        ]
        if any(turn.line in questions for questions in shown for turn in facts.turns):
            yield "leak", f"{name} asks the same question about the same image"
        elif shown:
            yield "leaked-image", f"{name} asks other questions about the same image"
        elif not facts.images and any(
            turn.question in self.evaluation.texts for turn in facts.turns
        ):
            yield "leak", f"{name} asks the same question"
        if shown:
            return

        # The same image, compressed or resized.
        for image in facts.images:
            found = self.evaluation.near.nearest(image.near)
            if found is not None:
                number, first, second = found
                other, row = self.evaluation.names[number]
                named = f"image {quoted(other, 120)} of row {row}" if other else f"row {row}"
                yield (
                    "near-image",
                    f"an image looks like {named} of {name} "
                    f"({first} bits of dHash and {second} of pHash differ, of 64 each)",
                )

    def _count(self, facts: RowFacts) -> None:
        for turn in facts.turns:
            if not turn.answer:
                continue
            answer = turn.answer.casefold().rstrip(".")
            if answer in self.answers or len(self.answers) < _MOST_ANSWERS:
                self.answers[answer] += 1
            if facts.images and (
                turn.question in self.guesses or len(self.guesses) < _MOST_ANSWERS
            ):
                self.guesses.setdefault(turn.question, Counter())[hash(answer)] += 1

    def unread_keys(self) -> list[Finding]:
        """Name all keys that nothing reads, in one finding at the first row that has one."""
        if self.first_unread is None:
            return []
        listed = [
            f"{key} ({number:,} row{'s' if number > 1 else ''})"
            for key, number in self.unread.most_common(_MOST_KEYS)
        ]
        more = len(self.unread) - len(listed)
        what = "nothing reads " + ", ".join(listed) + (f" and {more} more keys" if more else "")
        return [self.first_unread._replace(what=what)]

    def balance(self) -> list[Finding]:
        """Find one answer that is nearly all of them."""
        groups = {
            "short answers": self.answers,
            "yes/no answers": Counter(
                {word: self.answers[word] for word in ("yes", "no") if self.answers[word]}
            ),
        }
        for group, answers in groups.items():
            total = answers.total()
            if total >= MIN_ANSWERS:
                answer, number = answers.most_common(1)[0]
                if number > LARGEST_SHARE * total:
                    what = (
                        f"{quoted(answer)} is {100 * number / total:.0f} % of {total:,} {group}, "
                        "so a model that always says it scores that"
                    )
                    return [Finding("unbalanced-answers", None, "", what)]
        return []

    def blind_guess(self) -> tuple[int, int]:
        """Count the answers that a model guesses without the image.

        Returns:
            Answers that are the most frequent one of their question; and how many were looked at.
        """
        often = [answers for answers in self.guesses.values() if answers.total() >= MIN_ASKED]
        return sum(max(answers.values()) for answers in often), sum(
            answers.total() for answers in often
        )
