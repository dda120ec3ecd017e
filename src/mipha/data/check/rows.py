"""One row of a data set: everything that can be said about it by itself.

record --to_sample--> Sample --text, images, tokens--> RowFacts: findings, digests and counts; no images are kept
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mipha.data.check.findings import Finding, quoted
from mipha.data.check.images import ImageFacts, image_reader
from mipha.data.check.source import Source
from mipha.data.check.text import CONTROL_TOKENS, text_problems
from mipha.data.sample import IMAGE, Sample
from mipha.recipe import StageRecipe

if TYPE_CHECKING:
    from transformers import LlavaProcessor

    from mipha.data.check.tokens import TokenFacts

_SHORT_ANSWER = 60
"""Characters: longer answers are not compared with one another, nor counted."""

# The readers say what is wrong in a sentence; the first of these that it holds names the kind.
_SAID = (
    ("leads out of", "outside-path"),
    ("markers for", "image-count"),
    ("roles are", "role-order"),
    ("no human turn is answered", "role-order"),
    ("is an address", "missing-image"),
)

_MEND = re.compile(
    r"(?:; |: (?:add|check|embed|give|put|remove|rename|save|set|write)\b).*", re.DOTALL
)
_WHERE = re.compile(r"(?:(.*?, (?:line|row|sample) [^\s:,]+)[:,]? )?(.*)", re.DOTALL)


@dataclass(frozen=True)
class Job:
    """What the processes need; the tokens are counted where there is a processor."""

    source: Source
    processor: LlavaProcessor | None = None
    stage: StageRecipe | None = None


class Turn(NamedTuple):
    """A question and its answer, to be found again.

    Args:
        line: Digest of the question's first line: benchmarks put instructions and options behind it.
        question: Digest of the whole question.
        answer: The answer where it is short, else nothing.
    """

    line: bytes
    question: bytes
    answer: str


class RowFacts(NamedTuple):
    """What is kept of one row.

    Args:
        row: Place in the data set, from 0.
        where: The row as its file counts.
        findings: All that is wrong with the row by itself.
        content: Digest of its pictures and words; None where it is no sample.
        images: What each shows; no digest where it cannot be read.
        names: Of the images, for messages; empty for one that is given by its bytes.
        turns: Its questions and answers.
        num_answer_words: Of all its answers together.
        tokens: None where they were not counted.
        image_key: The same for samples that name the same images, 0 for text alone.
    """

    row: int
    where: str
    findings: tuple[Finding, ...]
    content: bytes | None = None
    images: tuple[ImageFacts, ...] = ()
    names: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()
    num_answer_words: int = 0
    tokens: TokenFacts | None = None
    image_key: int = 0


def row_checker(job: Job) -> Callable[[int], RowFacts]:
    """A function from a row's place to its facts; it remembers the images it has read."""
    read_image = image_reader()
    count_tokens: (
        Callable[[Sample], tuple[TokenFacts | None, tuple[tuple[str, str], ...]]] | None
    ) = None
    special = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))
    if job.processor is not None and job.stage is not None:
        from mipha.data.check.tokens import (
            special_tokens_of,
            token_facts,
        )  # brings transformers, which takes seconds

        processor, stage = job.processor, job.stage
        special = special_tokens_of(processor)
        count_tokens = lambda sample: token_facts(sample, processor, stage)  # noqa: E731

    def check(row: int) -> RowFacts:
        record: Any = None
        try:
            record = job.source.records[row]
            sample = job.source.to_sample(record)
        except (ValueError, OSError) as error:
            kind = next((kind for said, kind in _SAID if said in str(error)), "malformed")
            where, reason = _reason(job.source, error)
            return RowFacts(row, where, (Finding(kind, row, where, reason),))
        names = tuple(job.source.image_name(image) for image in sample.images)
        images = tuple(
            read_image(image, name) for image, name in zip(sample.images, names, strict=True)
        )
        problems = [*_turn_problems(sample, record)]
        problems += [
            problem for message in sample.messages for problem in text_problems(message, special)
        ]
        problems += [problem for image in images for problem in image.problems]
        tokens = None
        if count_tokens is not None and not {"lone-surrogate", "image-in-answer"} & {
            kind for kind, _ in problems
        }:
            tokens, found = count_tokens(sample)
            problems += found
        first = dict(
            reversed(problems)
        )  # one finding of a kind is enough to send the reader to the row
        texts = "\0".join(f"{message.role}\0{message.text.strip()}" for message in sample.messages)
        digests = [
            image.digest or _encoded(f"{row} {name}")
            for image, name in zip(images, names, strict=True)
        ]
        where = job.source.place(record)
        return RowFacts(
            row=row,
            where=where,
            findings=tuple(
                Finding(kind, row, where, first[kind])
                for kind in dict.fromkeys(kind for kind, _ in problems)
            ),
            content=_digest(b"".join([*digests, _encoded(texts)])),
            images=images,
            names=tuple(
                "" if isinstance(image, bytes) else name
                for image, name in zip(sample.images, names, strict=True)
            ),
            turns=tuple(_turns(sample)),
            num_answer_words=sum(
                len(message.text.split())
                for message in sample.messages
                if message.role == "assistant"
            ),
            tokens=tokens,
            image_key=_image_key(sample),
        )

    return check


def normalised(question: str) -> str:
    """A question without markers, case and extra space: what two data sets that share it have in common."""
    return " ".join(unicodedata.normalize("NFKC", question.replace(IMAGE, " ")).casefold().split())


def _turns(sample: Sample) -> Iterator[Turn]:
    talk = [message for message in sample.messages if message.role != "system"]
    for asked, said in zip(talk[::2], talk[1::2], strict=True):
        lines = [line for line in asked.text.replace(IMAGE, "").splitlines() if line.strip()]
        answer = " ".join(said.text.split())
        yield Turn(
            line=_digest(_encoded(normalised(lines[0]) if lines else "")),
            question=_digest(_encoded(normalised(asked.text))),
            answer=answer if len(answer) <= _SHORT_ANSWER else "",
        )


def _turn_problems(sample: Sample, record: Any) -> Iterator[tuple[str, str]]:
    """Markers in answers, answers that repeat the question, and what the reader of the format changed without a word."""
    asked = ""
    for message in sample.messages:
        if message.role == "assistant":
            if IMAGE in message.text:
                yield "image-in-answer", "an answer holds <image>, which no model can say"
            if (said := normalised(message.text)) and len(said) > 20 and said == asked:
                yield "echo", f"an answer is its question, {quoted(message.text)}"
        asked = normalised(message.text)
    content = getattr(record, "content", None)
    turns = content.get("conversations") if isinstance(content, dict) else None
    if not isinstance(turns, list):
        return
    if len(turns) > len(sample.messages):
        yield (
            "left-out-turn",
            f"{len(turns) - len(sample.messages)} of {len(turns)} turns are not between a question and its answer",
        )
    written = sum(str(turn.get("value")).count(IMAGE) for turn in turns if isinstance(turn, dict))
    if written > len(sample.images):
        yield "merged-marker", f"{written} <image> markers stand for {len(sample.images)} images"


def _reason(source: Source, error: Exception) -> tuple[str, str]:
    """Row, and what a reader says is wrong with it, without the advice that ends the sentence: a finding has its own."""
    where, reason = _WHERE.fullmatch(source.shortened(str(error))).groups()  # type: ignore[union-attr]
    return where or "", _MEND.sub(
        "", reason.partition(": ")[2] if reason.startswith("sample ") else reason
    )


def _image_key(sample: Sample) -> int:
    names = [image if isinstance(image, bytes) else _encoded(str(image)) for image in sample.images]
    return int.from_bytes(_digest(b"\0".join(names))[:8], "big") if names else 0


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
