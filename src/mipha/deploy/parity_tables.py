"""The report of `parity.py`: its rows and their bounds, printed and written as files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from mipha.files import write_whole
from mipha.terminal import Console

MIN_COSINE = 0.999
"""Cosine of each image token's embedding. f16 weights give 0.99999; a wrong activation, a shuffled
position or another resize give much less."""

MAX_LOGIT_ERROR = 0.2
"""Error of the likelier tokens in nats, for files that are not quantised: 0.01 to 0.04 in f16,
whole units for a missing bias. q8_0 may err by 0.9, because llama.cpp then rounds activations to 8
bits too; the answers tell whether that matters."""

MIN_AGREEMENT = {True: 0.95, False: 0.80}
"""Share of equal greedy answers, by whether the weights keep 8 bits. With 4 bits some answers
change; with a broken file hardly one is the same."""

NEAR_TIE = 0.1
"""Margin in nats: the runner-up was at least 0.9 times as likely, so rounding alone decides."""

NUM_SHOWN = 5
_FULL = {"f32", "f16", "bf16"}
_EIGHT_BITS = _FULL | {"q8_0"}


@dataclass(frozen=True)
class EmbeddingParity:
    """Image embeddings of llama.cpp against ours.

    Args:
        pixels: Who resized and padded the images: llama.cpp, or we.
        num_images: Number of images.
        cosine_min: Least cosine of all tokens of all images.
        cosine_mean: Mean cosine of all tokens of all images.
        scale: Ratio of theirs to ours: 1, except for Gemma, whose graph multiplies them by the root
            of the width later.
        max_error: Largest difference of a number after that scale is divided out.
        largest: Largest number in ours.
        verdict: `ok`, or the difference: pixels, if ours give no difference.
    """

    pixels: Literal["llama.cpp", "ours"]
    num_images: int
    cosine_min: float
    cosine_mean: float
    scale: float
    max_error: float
    largest: float
    verdict: str


@dataclass(frozen=True)
class Disagreement:
    """An answer that is not ours.

    Args:
        image: The image.
        question: The question.
        ours: Our answer.
        theirs: Their answer.
        margin: Margin of their token over the runner-up where the answers part, in nats; None where
            it is not known.
        because: `pixels` if the answer with our own pixels is ours, else `weights`.
    """

    image: str
    question: str
    ours: str
    theirs: str
    margin: float | None
    because: Literal["pixels", "weights"]


@dataclass(frozen=True)
class FileParity:
    """One GGUF file against the checkpoint.

    Args:
        file: Its name.
        quantization: Kind of its weights.
        num_questions: Number of questions.
        num_same_prompts: Number of prompts with as many tokens as ours.
        num_logits: Number of first tokens compared, with our own pixels.
        logit_error: Largest difference of a log-probability, for tokens that are not very unlikely.
        num_same_tops: Number of equal first tokens.
        num_same: Number of answers from the image file that equal ours letter by letter.
        low: Lower end of the 95 % interval of that share.
        high: Upper end.
        num_near_ties: Number of other answers that part at a near tie.
        disagreements: All other answers.
        seconds: Time of an answer; an image is encoded once for questions that follow each other.
    """

    file: str
    quantization: str
    num_questions: int
    num_same_prompts: int
    num_logits: int
    logit_error: float
    num_same_tops: int
    num_same: int
    low: float
    high: float
    num_near_ties: int
    disagreements: tuple[Disagreement, ...]
    seconds: float

    @property
    def agreement(self) -> float:
        """Share of answers that equal ours."""
        return self.num_same / self.num_questions

    @property
    def verdict(self) -> str:
        """`ok`, or the difference."""
        found = []
        if self.num_same_prompts < self.num_questions:
            found.append("prompts differ")
        if self.quantization in _FULL and self.logit_error > MAX_LOGIT_ERROR:
            found.append("weights differ")
        if self.agreement < MIN_AGREEMENT[self.quantization in _EIGHT_BITS]:
            pixels = sum(one.because == "pixels" for one in self.disagreements)
            found.append(f"answers differ, {pixels} of {len(self.disagreements)} for their pixels")
        return "; ".join(found) or "ok"


@dataclass(frozen=True)
class Parity:
    """The whole report.

    Args:
        checkpoint: Folder of the checkpoint.
        folder: Folder of the GGUF files.
        seconds: Time of an answer of ours, in float32.
        embeddings: Image embeddings with llama.cpp's pixels, and with ours.
        files: Files of the language model, the largest first.
    """

    checkpoint: str
    folder: str
    seconds: float
    embeddings: tuple[EmbeddingParity, ...]
    files: tuple[FileParity, ...]

    @property
    def passed(self) -> bool:
        """Whether tower, projector and every file of the language model are within the bounds.

        Images that llama.cpp resizes or pads otherwise are reported, and count by their effect on
        the answers.
        """
        rows = [row for row in self.embeddings if row.pixels == "ours"] + list(self.files)
        return all(row.verdict == "ok" for row in rows)

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        found = asdict(self) | {"passed": self.passed}
        for plain, row in zip(found["files"], self.files, strict=True):
            plain |= {"agreement": row.agreement, "verdict": row.verdict}
        return found


def print_parity(found: Parity) -> None:
    """Print the report."""
    console = Console()

    # Print the tables.
    for title, columns, rows in _tables(found):
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for number, column in enumerate(columns):
            table.add_column(
                column,
                overflow="fold",
                justify="left" if number in (0, len(columns) - 1) else "right",
            )
        for *cells, verdict in rows:
            table.add_row(
                *map(escape, cells), f"[{'green' if verdict == 'ok' else 'red'}]{verdict}[/]"
            )
        console.print(table, "")

    # Print answers that differ, and the verdict.
    for line in _examples(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    verdict = "within the bounds" if found.passed else "not within the bounds"
    console.print(
        f"{found.folder}: {verdict} of {found.checkpoint}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def parity_markdown(found: Parity) -> str:
    """Return the report as Markdown."""
    lines = [f"# {found.folder} against {found.checkpoint}", ""]
    for title, columns, rows in _tables(found):
        lines += [f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows
        ] + [""]
    if examples := list(_examples(found)):
        lines += ["## Answers that differ", "", *(f"- {line}" for line in examples), ""]
    return "\n".join(lines)


def write_parity(found: Parity, folder: Path) -> list[Path]:
    """Write parity.json and parity.md into a folder.

    Returns:
        Both files.
    """
    files = [folder / "parity.json", folder / "parity.md"]
    write_whole(files[0], json.dumps(found.as_json(), indent=2, ensure_ascii=False) + "\n")
    write_whole(files[1], parity_markdown(found))
    return files


def _tables(found: Parity) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    yield (
        "Image embeddings: tower and projector",
        ("pixels by", "images", "cosine, least", "mean", "scale", "error, most", "of", "verdict"),
        [
            (
                row.pixels,
                str(row.num_images),
                f"{row.cosine_min:.6f}",
                f"{row.cosine_mean:.6f}",
                f"{row.scale:.4f}",
                f"{row.max_error:.3g}",
                f"{row.largest:.3g}",
                row.verdict,
            )
            for row in found.embeddings
        ],
    )

    yield (
        f"Answers: language model (ours in float32: {found.seconds:.2f} s each)",
        (
            "weights",
            "first token",
            "error, nats",
            "same answers",
            "95 % interval",
            "near ties",
            "s each",
            "verdict",
        ),
        [
            (
                row.quantization,
                f"{row.num_same_tops} of {row.num_logits}",
                f"{row.logit_error:.3g}",
                f"{row.num_same} of {row.num_questions}",
                f"{100 * row.low:.1f} to {100 * row.high:.1f} %",
                f"{row.num_near_ties} of {len(row.disagreements)}",
                f"{row.seconds:.2f}",
                row.verdict,
            )
            for row in found.files
        ],
    )


def _examples(found: Parity) -> Iterator[str]:
    for row in found.files:
        for one in row.disagreements[:NUM_SHOWN]:
            margin = "" if one.margin is None else f", {one.margin:.2f} nats apart"
            yield (
                f"{row.quantization}, {one.image}: {one.question!r}: "
                f"ours {one.ours!r}, theirs {one.theirs!r} ({one.because}{margin})"
            )
