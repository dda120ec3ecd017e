"""One row of a data set by itself: what is wrong with it; and many rows, on all cores.

    record --to_sample--> Sample --texts, images, tokens--> RowFacts: findings, digests, counts

No images are kept.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import signal
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mipha.data.check.findings import Finding, Problem, quoted
from mipha.data.check.images import ImageFacts, image_reader
from mipha.data.check.text import CONTROL_TOKENS, special_tokens_of, text_problems
from mipha.data.dataset import LoadedData
from mipha.data.datasets.table import INSTRUCTION as CAPTION_REQUEST
from mipha.data.faults import RecordError
from mipha.data.image_keys import ImageKeys
from mipha.data.region_text import write_sample
from mipha.data.sample import IMAGE, REGION, Sample
from mipha.labels import IGNORE
from mipha.processes import end_with
from mipha.recipe import StageRecipe

if TYPE_CHECKING:
    from transformers import LlavaProcessor

CHUNK = 64
"""Rows handed to a process at a time."""

WORTH_A_POOL = 1_000
"""Rows: below, starting processes takes longer than it saves."""

_SHORT_ANSWER = 60
"""Characters: longer answers are not compared with one another, nor counted."""

_UNCUT = 10**9
"""Tokens: more than any sample has."""

_NO_TOKENIZER = frozenset({"lone-surrogate", "image-in-answer"})
"""Kinds of problems with which a sample cannot be encoded."""


@dataclass(frozen=True)
class CheckInputs:
    """What the processes need; tokens are counted where there is a processor.

    Images are hashed to be found again, after compressing or resizing, where `near` is true.
    """

    data: LoadedData
    processor: LlavaProcessor | None = None
    stage: StageRecipe | None = None
    near: bool = False


class TurnFacts(NamedTuple):
    """A question and its answer, to be found again.

    Args:
        line: Digest of the question's first line: benchmarks put instructions and options behind
            it.
        question: Digest of the whole question.
        answer: The answer if it is short, else empty.
        is_caption: Whether it asks for a caption, of which an image may have several.
    """

    line: bytes
    question: bytes
    answer: str
    is_caption: bool = False


class TokenFacts(NamedTuple):
    """One encoded sample, without its tokens.

    Args:
        num_tokens: Tokens after image expansion, cut to row_tokens.
        num_trained: Tokens of them that are trained on.
        num_uncut: Tokens before cutting.
        prefix: Leading tokens that another sample about the image may share.
        prefix_key: Checksum of those tokens.
    """

    num_tokens: int
    num_trained: int
    num_uncut: int
    prefix: int
    prefix_key: int


class RowFacts(NamedTuple):
    """What is kept of one row.

    Args:
        row: Place in the data set, from 0.
        where: The row as its file counts.
        findings: Everything that is wrong with the row by itself.
        content: Digest of its images and words; None where it is not a sample.
        images: What each image shows; no digest where it cannot be read.
        names: Names of the images, for messages; empty for one that is given by its bytes.
        turns: Its questions and answers.
        num_answer_words: Words of all its answers together.
        tokens: None where they were not counted.
        image_key: The same for samples that show the same images; 0 for text alone, and where
            tokens were not counted.
        unread: Keys that nothing read.
        file: The file that it lies in, without the data's folder; empty where unknown.
        num_turns: Its questions with an answer; a document is one.
    """

    row: int
    where: str
    findings: tuple[Finding, ...]
    content: bytes | None = None
    images: tuple[ImageFacts, ...] = ()
    names: tuple[str, ...] = ()
    turns: tuple[TurnFacts, ...] = ()
    num_answer_words: int = 0
    tokens: TokenFacts | None = None
    image_key: int = 0
    unread: tuple[str, ...] = ()
    file: str = ""
    num_turns: int = 0


# Many rows.


def check_rows(inputs: CheckInputs, rows: Sequence[int], workers: int) -> Iterator[list[RowFacts]]:
    """Check rows in their order, and yield their facts a chunk at a time.

    Args:
        inputs: The data set.
        rows: Places of the rows.
        workers: Number of processes; 1 works in this one. They are forked, so that the rows need
            not be read again; where the system cannot fork safely, this process works alone.

    Raises:
        OSError: A process was killed, by a decoder's crash or because memory ran out.
    """
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    if workers == 1 or len(rows) < WORTH_A_POOL or sys.platform != "linux":
        check = row_checker(inputs)
        yield from ([check(row) for row in chunk] for chunk in chunks)
        return

    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, fork, _begin_worker, (inputs,)) as pool:
        done = 0
        try:
            for facts in pool.map(_check_chunk, chunks):
                done += 1
                yield facts
        except BrokenProcessPool as error:
            last = chunks[min(done + workers, len(chunks)) - 1][-1]
            raise OSError(
                f"a process that checked rows {chunks[done][0]} to {last} of {inputs.data.name} "
                "was killed: look at the images of those rows, or free memory"
            ) from error


_check: Callable[[int], RowFacts]


def _begin_worker(inputs: CheckInputs) -> None:
    global _check
    # Ctrl-C is for the process that hands out the rows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(os.getppid())
    _check = row_checker(inputs)


def _check_chunk(rows: Sequence[int]) -> list[RowFacts]:
    return [_check(row) for row in rows]


# One row.


def row_checker(inputs: CheckInputs) -> Callable[[int], RowFacts]:
    """Return a function from a row's place to its facts; it remembers the images it has read."""
    data, processor, stage = inputs.data, inputs.processor, inputs.stage
    read_image = image_reader(near=inputs.near)
    keys = ImageKeys()
    special = (
        re.compile("|".join(map(re.escape, CONTROL_TOKENS)))
        if processor is None
        else special_tokens_of(processor)
    )

    def check(row: int) -> RowFacts:
        # Read the record, and make it a sample.
        record: Any = None
        try:
            record = data.records[row]
            given = data.to_sample(record)
            sample = write_sample(given, getattr(processor, "boxes", None))
            rejected = data.rejected(record) if data.rejected else None
        except (ValueError, OSError) as error:
            return RowFacts(row, *_fault(data, row, record, error), file=data.file_of(row))
        where = data.place(record)

        # Look at its turns, texts and images.
        names = [data.image_name(image) for image in sample.images]
        images = [read_image(*pair) for pair in zip(sample.images, names, strict=True)]
        problems = [*_turn_problems(sample, record), *_remarked(sample)]
        # The numbers of regions are no words: some forms are tags.
        plain = [replace(m, text=m.text.replace(REGION, "[]")) for m in given.messages]
        for message in plain if given.regions else given.messages:
            problems += text_problems(message, special)
        if rejected is not None:
            problems += text_problems(rejected.messages[-1], special)
        for image in images:
            problems += image.problems

        # Count its tokens, and name its images as training does to share them.
        tokens, image_key = None, 0
        encodable = not any(kind in _NO_TOKENIZER for kind, _ in problems)
        if processor is not None and stage is not None and encodable:
            if rejected is None:
                tokens, found = token_facts(sample, processor, stage)
            else:
                tokens, found = pair_facts((sample, rejected), processor, stage)
            problems += found
            image_key = keys.of(sample.images)

        # Keep the first problem of each kind: one is enough to send the reader to the row.
        first: dict[str, str] = {}
        for kind, what in problems:
            first.setdefault(kind, what)

        texts = "\0".join(
            f"{message.role}\0{message.text.strip()}" + ("" if message.learned else "\0unlearned")
            for message in (*sample.messages, *(rejected.messages if rejected else ()))
        )
        digests = [
            image.digest or _encoded(f"{row} {name}")
            for image, name in zip(images, names, strict=True)
        ]
        return RowFacts(
            row=row,
            where=where,
            findings=tuple(Finding(kind, row, where, what) for kind, what in first.items()),
            content=_digest(b"".join([*digests, _encoded(texts)])),
            images=tuple(images),
            names=tuple(
                "" if isinstance(image, bytes) else name
                for image, name in zip(sample.images, names, strict=True)
            ),
            turns=tuple(_turns(sample)),
            num_answer_words=sum(
                len(message.text.split())
                for message in sample.messages
                if message.role in ("assistant", "document")
            ),
            tokens=tokens,
            image_key=image_key,
            unread=tuple(remark.what for remark in sample.remarks if remark.kind == "unread-key"),
            file=data.file_of(row),
            num_turns=sum(m.role in ("assistant", "document") for m in sample.messages),
        )

    return check


def normalised(question: str) -> str:
    """Return a question without markers, case and extra space, to compare it across data sets."""
    return " ".join(unicodedata.normalize("NFKC", question.replace(IMAGE, " ")).casefold().split())


def _fault(
    data: LoadedData, row: int, record: Any, error: Exception
) -> tuple[str, tuple[Finding, ...]]:
    """Return the place of a row that cannot be read, and what is wrong with it."""
    place = data.place(record)
    if isinstance(error, RecordError):
        where = data.shorten(error.where)
        finding = Finding(
            error.kind, row, place or where, data.shorten(error.what), data.shorten(error.fix)
        )
    else:
        finding = Finding("malformed", row, place, data.shorten(str(error)))
    return finding.where, (finding,)


def _turns(sample: Sample) -> Iterator[TurnFacts]:
    if sample.is_document:
        return
    talk = [message for message in sample.messages if message.role != "system"]
    for asked, said in zip(talk[::2], talk[1::2], strict=True):
        lines = [line for line in asked.text.replace(IMAGE, "").splitlines() if line.strip()]
        answer = " ".join(said.text.split())
        yield TurnFacts(
            line=_digest(_encoded(normalised(lines[0]) if lines else "")),
            question=_digest(_encoded(normalised(asked.text))),
            answer=answer if len(answer) <= _SHORT_ANSWER else "",
            is_caption=normalised(asked.text) == normalised(CAPTION_REQUEST),
        )


def _turn_problems(sample: Sample, record: Any) -> Iterator[Problem]:
    """Find markers in answers, answers that repeat the question, and what the format changed."""
    answers = [message for message in sample.messages if message.role == "assistant"]
    if not any(message.learned for message in answers) and not sample.is_document:
        yield "nothing-trained", "all its answers are marked as not to be learned"

    asked = ""
    for message in sample.messages:
        if message.role == "assistant":
            if IMAGE in message.text:
                yield "image-in-answer", "an answer holds <image>, which no model can say"
            if (said := normalised(message.text)) and len(said) > 20 and said == asked:
                yield "echo", f"an answer is its question, {quoted(message.text)}"
        asked = normalised(message.text)

    # LLaVA's rules leave turns out, and make one marker of several.
    content = getattr(record, "content", None)
    turns = content.get("conversations") if isinstance(content, dict) else None
    if not isinstance(turns, list):
        return
    num_left_out = len(turns) - len(sample.messages)
    if num_left_out > 0:
        yield (
            "left-out-turn",
            f"{num_left_out} of {len(turns)} turns are not between a question and its answer",
        )
    written = sum(str(turn.get("value")).count(IMAGE) for turn in turns if isinstance(turn, dict))
    if written > len(sample.images):
        yield "merged-marker", f"{written} <image> markers stand for {len(sample.images)} images"


def _remarked(sample: Sample) -> Iterator[Problem]:
    """Yield the remarks of the reader, those of one kind together."""
    by_kind: dict[str, list[str]] = {}
    for remark in sample.remarks:
        by_kind.setdefault(remark.kind, []).append(remark.what)
    for kind, said in by_kind.items():
        if kind != "unread-key":
            yield kind, "; ".join(said)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


# Its tokens.


def token_facts(
    sample: Sample, processor: LlavaProcessor, stage: StageRecipe
) -> tuple[TokenFacts | None, tuple[Problem, ...]]:
    """Encode a sample as training will.

    Returns:
        The facts, None where training could not encode it; and all that is wrong.
    """
    from mipha.data.encode import encode, encode_for  # brings transformers, which takes seconds

    try:
        whole = cut = encode(sample, processor, _UNCUT, stage.prompt)
        if len(whole) > stage.row_tokens:
            cut = encode_for(sample, processor, stage)
    except RecordError as error:
        return None, ((error.kind, error.what),)

    facts = TokenFacts(
        num_tokens=len(cut),
        num_trained=_num_trained(cut.labels),
        num_uncut=len(whole),
        prefix=cut.prefix,
        prefix_key=zlib.crc32(cut.input_ids[: cut.prefix].tobytes()) & 0x7FFFFFFF,
    )
    lost = _num_trained(whole.labels) - facts.num_trained
    if not lost:
        return facts, ()
    what = (
        f"the sample has {len(whole):,} tokens of row_tokens={stage.row_tokens:,}, "
        f"which cuts off {lost:,} trained ones"
    )
    return facts, (("truncated-answer", what),)


def pair_facts(
    pair: tuple[Sample, Sample], processor: LlavaProcessor, stage: StageRecipe
) -> tuple[TokenFacts | None, tuple[Problem, ...]]:
    """Encode both answers of a pair; arguments and results are those of `token_facts`.

    The length is that of the longer one, the tokens are those of both.
    """
    from mipha.data.encode import encode

    try:
        sides = [encode(sample, processor, _UNCUT) for sample in pair]
    except RecordError as error:
        return None, ((error.kind, error.what),)

    longest = max(map(len, sides))
    trained = sum(_num_trained(side.labels) for side in sides)
    facts = TokenFacts(sum(map(len, sides)), trained, longest, prefix=0, prefix_key=0)
    if longest <= stage.row_tokens:
        return facts, ()
    what = f"an answer and its question take {longest:,} tokens of max_tokens={stage.row_tokens:,}"
    return facts, (("long-pair", what),)


def _num_trained(labels: np.ndarray) -> int:
    """Count the trained tokens; the first token of a row is predicted by nothing."""
    return int((labels[1:] != IGNORE).sum())
