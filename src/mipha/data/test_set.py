"""Test sets: questions with any number of right answers, in every format that training reads.

    record --completed--> a record with one answer --to_sample--> Sample --> GoldQuestion

Training wants one answer to every question. Here a row of a table may give several (`answers`, or
a list as its `answer`), or none; so may the last turn of a conversation. Every answer of a
conversation is one question, asked with the turns before it as they stand in the data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mipha.data.dataset import LoadedData, load_data
from mipha.data.datasets._choices import option_columns
from mipha.data.datasets._keys import parse_list
from mipha.data.datasets._records import Row
from mipha.data.datasets.grounding import is_grounding
from mipha.data.datasets.table import ANSWERS, QUESTIONS, by_name
from mipha.data.faults import RecordError
from mipha.data.images import ImageSource, why_missing
from mipha.data.region_text import write_messages
from mipha.data.regions import Region
from mipha.data.sample import IMAGE, REGION, Message, Sample
from mipha.recipe import DataRecipe

_UNANSWERED = "\ue000"
"""Stands in a record where an answer is missing; a private character that no language has."""

_LISTS = ("messages", "conversations", "texts")
_HUMAN = {"human": "gpt", "user": "assistant"}
"""Who asks in a conversation, and who answers."""


@dataclass(frozen=True)
class GoldQuestion:
    """One question of a test set.

    Args:
        id: Unique in the set: the record's own where all are different, else its place.
        where: File and line, for messages.
        before: System turn and earlier turns.
        text: The question, without markers where its images stand in front and nothing before.
        images: Images of all turns, in order.
        answers: Right answers; none where the data give none.
        regions: Boxes and points, one for each `REGION` marker in the turns before, the question
            and the right answer, in order; without any, such a marker is plain text.
    """

    id: str
    where: str
    before: tuple[Message, ...]
    text: str
    images: tuple[ImageSource, ...]
    answers: tuple[str, ...]
    regions: tuple[Region, ...] = ()

    @property
    def right_regions(self) -> tuple[Region, ...]:
        """The boxes and points of its right answer."""
        number = sum(answer.count(REGION) for answer in self.answers) if self.regions else 0
        return self.regions[len(self.regions) - number :]

    def written(self, form: str | None) -> GoldQuestion:
        """Return it with its boxes and points as text, in a form of `region_text.FORMS`."""
        right = [Message("assistant", answer) for answer in self.answers]
        turns = [*self.before, Message("user", self.text), *right]
        turns = list(write_messages(turns, self.regions, form, self.id))
        number = len(self.before)
        return replace(
            self,
            before=tuple(turns[:number]),
            text=turns[number].text,
            answers=tuple(turn.text for turn in turns[number + 1 :]),
        )


@dataclass(frozen=True)
class GoldSet:
    """The questions of a test set.

    Args:
        name: Name of the data.
        questions: In the order of the data.
        notes: How the format was detected, and what of the data nothing reads.
        about_ids: Why the records' own ids are not used; empty where there are none, or they are.
    """

    name: str
    questions: tuple[GoldQuestion, ...]
    notes: tuple[str, ...]
    about_ids: str = ""


class _Completed(NamedTuple):
    """A record as training reads it, and all of its right answers where a row gives several."""

    content: Any
    answers: tuple[str, ...] | None


def load_test_set(recipe: DataRecipe) -> GoldSet:
    """Read all questions of a split.

    Args:
        recipe: Place and format of the data.

    Raises:
        FileNotFoundError: There are no such data, or an image is missing.
        RecordError: A record is broken; names file and line.
        ValueError: The format is not known, there is no such split, or no question.
        MissingPackage: The format needs a package that is not installed.
    """
    data = load_data(recipe, lambda content: _complete(content).content)
    samples = [(record, *_read(data, record)) for record in _records(data)]
    ids, twice = _ids([(record, sample) for record, sample, _ in samples])

    questions = []
    for (record, sample, answers), name in zip(samples, ids, strict=True):
        where = getattr(record, "where", sample.id)
        if sample.is_document:
            raise RecordError("it is a document, which asks nothing", "remove it", where)
        for image in sample.images:
            if isinstance(image, Path) and not image.is_file():
                reason = why_missing(image) or "check the data's root"
                raise FileNotFoundError(f"{where}: no image file {image}: {reason}")
        questions += _questions_of(sample, name, where, answers)
    if not questions:
        raise ValueError(f"{recipe.root or recipe.dataset} has no question: give other data")

    # What nobody reads is said, with the number of records.
    about = Counter(remark.about for _, sample, _ in samples for remark in sample.remarks)
    notes = [note for note in (data.format, data.left_out) if note]
    notes += [f"{num:,} of {len(samples):,} records: {what}" for what, num in about.items()]
    about_ids = (
        f"its ids are places, such as {ids[0]}, because several records have the id {twice}"
        if twice is not None
        else ""
    )
    return GoldSet(data.name, tuple(questions), tuple(notes), about_ids)


def _records(data: LoadedData) -> Iterator[Any]:
    for index in range(len(data)):
        yield data.records[index]


def _read(data: LoadedData, record: Any) -> tuple[Sample, tuple[str, ...] | None]:
    """Return a record's sample, and its answers where it gives several or none."""
    if not isinstance(record, Row):
        return data.to_sample(record), None
    completed = _complete(record.content, record)
    return data.to_sample(record._replace(content=completed.content)), completed.answers


def _complete(content: Any, row: Row | None = None) -> _Completed:
    """Return a record that gives one answer to each question, as training wants it.

    Args:
        content: The record.
        row: Its row, for errors; None where the record is only looked at.
    """
    if not isinstance(content, Mapping):
        return _Completed(content, None)
    if is_grounding(content):
        return _Completed(content, None)
    for name in _LISTS:
        if isinstance(turns := content.get(name), list) and turns:
            return _Completed({**content, name: _answered(name, turns)}, None)

    # A row of a table.
    named = by_name(content)
    asked = next((name for name in QUESTIONS if name in named), None)
    if asked is None:
        return _Completed(content, None)
    single = [name for name in ANSWERS if name != "answers"]
    answer = next((name for name in single if not _is_missing(named.get(name))), None)
    several = _texts(parse_list(named.get("answers")), row)
    if several is None and answer is not None and isinstance(named[answer], list | Mapping):
        several = _texts(named[answer], row)

    rest = {name: value for name, value in named.items() if name not in ("answers", answer)}
    if several:
        one = several[0] if answer is None or named[answer] is several else named[answer]
        one = one if isinstance(one, str | int | float) else several[0]
        return _Completed({**rest, answer or "answer": one}, several)
    if answer is None and not option_columns(named):
        return _Completed({**rest, "answer": _UNANSWERED}, ())
    return _Completed(content, None)


def _is_missing(value: Any) -> bool:
    """Return whether a cell is empty: pandas writes NaN for one in JSON and parquet."""
    return value in (None, "") or value != value


def _answered(name: str, turns: list[Any]) -> list[Any]:
    """Return the turns of a conversation, each question answered."""
    last = turns[-1]
    if name == "texts":
        return [
            {"assistant": _UNANSWERED, **turn} if isinstance(turn, Mapping) else turn
            for turn in turns
        ]
    role, content = ("role", "content") if name == "messages" else ("from", "value")
    who = last.get(role) if isinstance(last, Mapping) else None
    if who not in _HUMAN:
        return turns
    return [*turns, {role: _HUMAN[who], content: _UNANSWERED}]


def _texts(value: Any, row: Row | None) -> tuple[str, ...] | None:
    """Return several answers as texts; None where the value is none.

    Source: VQA's files ({"answer": ...} for each person), SQuAD's ({"text": [...]}).
    """
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        value = value["text"]
    if not isinstance(value, list | tuple) or not value:
        return None
    texts = [item.get("answer") if isinstance(item, Mapping) else item for item in value]
    if all(isinstance(text, str | int | float) for text in texts):
        return tuple(map(str, texts))
    if row is None:
        return None
    raise RecordError(
        f"its answers hold {str(value)[:80]}", "wanted a list of texts", row.where, "malformed"
    )


def _ids(samples: Sequence[tuple[Any, Sample]]) -> tuple[list[str], str | None]:
    """Return a name for each record: its own id where all are different, else its place.

    And the id that several have, where every record has one.
    """
    own = [_own_id(record) for record, _ in samples]
    twice = None
    if None not in own:
        twice = next((name for name, number in Counter(own).items() if number > 1), None)
        if twice is None:
            return [str(name) for name in own], None
    places = [
        record.id.partition("/")[2] if isinstance(record, Row) else sample.id
        for record, sample in samples
    ]
    unlike = len(set(places)) == len(places)
    return places if unlike else [str(n) for n in range(len(places))], twice


def _own_id(record: Any) -> str | None:
    content = getattr(record, "content", None)
    if not isinstance(content, Mapping):
        return None
    value = next((content[name] for name in ("question_id", "id") if name in content), None)
    return str(value) if isinstance(value, str | int) and str(value).strip() else None


def _questions_of(
    sample: Sample, name: str, where: str, answers: tuple[str, ...] | None
) -> Iterator[GoldQuestion]:
    """Yield a question for every answer of a sample that may be learned."""
    places = [place for place, turn in enumerate(sample.messages) if turn.role == "assistant"]
    for number, place in enumerate(places):
        said = sample.messages[place]
        if not said.learned:
            continue
        *before, asked = sample.messages[:place]
        text, shown = asked.text, sum(turn.text.count(IMAGE) for turn in sample.messages[:place])

        # Images in front of a single turn need no markers.
        markers = f"{IMAGE}\n" * shown
        if not before and text.startswith(markers) and IMAGE not in text[len(markers) :]:
            text = text[len(markers) :]
        right = () if said.text == _UNANSWERED else (said.text,)
        has_regions = bool(sample.regions) and REGION in said.text
        if answers is not None and place == places[-1] and not has_regions:
            right = answers
        elif has_regions and answers is not None and len(answers) > 1:
            raise RecordError(
                f"its {len(answers)} right answers hold boxes", "give one right answer", where
            )

        # Regions of the turns up to the answer.
        turns = sample.messages[: place + 1 if right else place]
        num_regions = sum(turn.text.count(REGION) for turn in turns)
        yield GoldQuestion(
            id=name if len(places) == 1 else f"{name}#{number}",
            where=where,
            before=tuple(before),
            text=text,
            images=sample.images[:shown],
            answers=right,
            regions=sample.regions[:num_regions],
        )
