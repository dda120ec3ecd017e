"""The report of `parity.py`: its rows and what is expected of them, on the terminal, as Markdown and as plain values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mipha.files import write_whole

MIN_COSINE = 0.999
"""Of each image token's embedding. f16 weights give 0.99999; a wrong activation, a shuffled position or another resize much less."""

MAX_LOGIT_ERROR = 0.2
"""In nats, of the likelier tokens, for files that are not quantised: f16 errs by 0.01 to 0.04, a bias left away by whole units. q8_0 may
err by 0.9, for llama.cpp then rounds activations to 8 bits too; whether that matters, the answers say."""

MIN_AGREEMENT = {True: 0.95, False: 0.80}
"""Of greedy answers, by whether the weights keep 8 bits. Where a file is broken hardly one is the same; with 4 bits some change."""

NEAR_TIE = 0.1
"""In nats: the token that was not taken was at least 0.9 times as likely, so rounding alone decides."""

NUM_SHOWN = 5
_FULL = {"f32", "f16", "bf16"}
_EIGHT_BITS = _FULL | {"q8_0"}


@dataclass(frozen=True)
class EmbeddingParity:
    """Image embeddings of llama.cpp against ours.

    Args:
        pixels: Who resized and padded the pictures: llama.cpp, or we.
        num_images: Compared.
        cosine_min: Of all tokens of all images.
        cosine_mean: Of all tokens of all images.
        scale: How much larger theirs are on the whole: 1, but for Gemma, whose graph multiplies them by the root of the width later on.
        max_error: Largest difference of a number, that scale taken out.
        largest: Largest number in ours.
        verdict: Ok, or what differs: pixels, if with ours all is well.
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
        margin: By how much their token was likelier than the next, in nats, where the answers part; None: not known.
        because: With our own pixels it is ours after all, or it is not.
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
        quantization: What it says of its weights.
        num_questions: Asked.
        num_same_prompts: Prompts with as many tokens as ours.
        num_logits: First tokens compared, with our own pixels.
        logit_error: Largest difference of a log-probability, for tokens that are not very unlikely.
        num_same_tops: First tokens that are the same.
        num_same: Answers that are the same, letter by letter, from the picture's file.
        low: Lower end of the 95 % interval of that share.
        high: Upper end.
        num_near_ties: Other answers that part at a near tie.
        disagreements: All other answers.
        seconds: An answer, the image encoded once where questions about it follow each other.
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
        """Share of answers that are the same."""
        return self.num_same / self.num_questions

    @property
    def verdict(self) -> str:
        """Ok, or what differs."""
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
        checkpoint: Its folder.
        folder: Of the GGUF files.
        seconds: An answer of ours, in float32.
        embeddings: With llama.cpp's pixels, with ours.
        files: The language model's, the largest first.
    """

    checkpoint: str
    folder: str
    seconds: float
    embeddings: tuple[EmbeddingParity, ...]
    files: tuple[FileParity, ...]

    @property
    def passed(self) -> bool:
        """Tower, projector and every file of the language model are within the bounds.

        Pictures that llama.cpp resizes or pads otherwise are said, and count by what they do to the answers.
        """
        rows = [row for row in self.embeddings if row.pixels == "ours"] + list(self.files)
        return all(row.verdict == "ok" for row in rows)

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        found = asdict(self) | {"passed": self.passed}
        for plain, row in zip(found["files"], self.files, strict=True):
            plain |= {"agreement": row.agreement, "verdict": row.verdict}
        return found


def print_parity(found: Parity) -> None:
    """The report on the terminal."""
    console = Console()
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
    for line in _examples(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    said = "within the bounds" if found.passed else "not within the bounds"
    console.print(
        f"{found.folder}: {said} of {found.checkpoint}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def parity_markdown(found: Parity) -> str:
    """The report as Markdown."""
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
            yield f"{row.quantization}, {one.image}: {one.question!r}: ours {one.ours!r}, theirs {one.theirs!r} ({one.because}{margin})"
