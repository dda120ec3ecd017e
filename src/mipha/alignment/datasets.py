"""Instructions and preferences as they are published, read and checked row by row; which prompts are held out.

alpaca_data.json       [{"instruction", "input", "output"}, ...]                          -> Instruction
train.jsonl[.xz]       {"prompt", "response_0", "response_1", "is_response_0_safe", ...}  -> Preference

Also as JSON, JSON lines or parquet, whichever of the two it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mipha.alignment.records import records


@dataclass(frozen=True)
class Instruction:
    """What to do, and how it was done.

    Args:
        id: File and row, for messages.
    """

    id: str
    prompt: str
    response: str


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt, compared twice: helpfulness and harmlessness are labelled independently.

    Args:
        id: File and row, for messages.
        better: Index of the more helpful response.
        safer: Index of the less harmful response.
        safe: Whether each response is safe by itself.
    """

    id: str
    prompt: str
    responses: tuple[str, str]
    better: int
    safer: int
    safe: tuple[bool, bool]


@dataclass(frozen=True)
class ImagePreference:
    """Two answers to one question about one picture.

    Args:
        id: File and row, for messages.
        image_key: Of the picture's bytes: the same for a copy under another name.
    """

    id: str
    image: Path
    image_key: str
    prompt: str
    chosen: str
    rejected: str


Row = TypeVar("Row", Instruction, Preference, ImagePreference)


def load_instructions(path: Path, skipped: list[str] | None = None) -> list[Instruction]:
    """Read instructions in Alpaca's layout; the prompt is the instruction, and on the next line its input where there is one.

    Args:
        path: .json, .jsonl, .jsonl.xz or .parquet.
        skipped: Where to put why a row with an empty prompt or response is left out; null: such a row is an error.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is none of these, or a row is at fault; the message names file and row.

    Source: the published alpaca_data.json; Stanford Alpaca trains on other words around the same fields.
    """
    rows = []
    for where, record in records(path):
        instruction, given, output = (
            _text(record, key, where, optional=key == "input")
            for key in ("instruction", "input", "output")
        )
        prompt = f"{instruction}\n{given}" if given.strip() else instruction
        if not _refused(_empty(where, {"prompt": instruction, "response": output}), skipped):
            rows.append(Instruction(where, prompt, output))
    return rows


def load_preferences(path: Path, skipped: list[str] | None = None) -> list[Preference]:
    """Read pairs of responses in the layout of PKU-SafeRLHF-10K.

    Args:
        path: .jsonl.xz as published, or .jsonl, .json, .parquet.
        skipped: Where to put why a row with an empty text, or the same response twice, is left out; null: such a row is an error.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is none of these, or a row is at fault; the message names file and row. A row without a label always is.

    Source: the fields of https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF-10K
    """
    rows = []
    for where, record in records(path):
        prompt, *responses = (
            _text(record, key, where) for key in ("prompt", "response_0", "response_1")
        )
        better, safer = (
            _label(record, key, where, (0, 1))
            for key in ("better_response_id", "safer_response_id")
        )
        safe = [
            bool(_label(record, f"is_response_{number}_safe", where, (False, True)))
            for number in (0, 1)
        ]
        fault = _empty(
            where, {"prompt": prompt, "response_0": responses[0], "response_1": responses[1]}
        )
        if fault is None and responses[0].strip() == responses[1].strip():
            fault = (
                f"{where}: both responses are the same, so neither can be preferred: remove the row"
            )
        if not _refused(fault, skipped):
            rows.append(
                Preference(
                    where, prompt, (responses[0], responses[1]), better, safer, (safe[0], safe[1])
                )
            )
    return rows


def load_image_preferences(path: Path, skipped: list[str] | None = None) -> list[ImagePreference]:
    """Read pairs of answers about pictures: {"image", "prompt" or "question", "chosen", "rejected"}, paths from the file's folder.

    Args, Raises: As `load_preferences`; also a picture that is not there.
    """
    rows = []
    for where, record in records(path):
        asked = "prompt" if "prompt" in record else "question"
        image, prompt, chosen, rejected = (
            _text(record, key, where) for key in ("image", asked, "chosen", "rejected")
        )
        if not (path.parent / image).is_file():
            raise FileNotFoundError(
                f"{where}: there is no picture {path.parent / image}: put it there, or mend the row"
            )
        fault = _empty(where, {asked: prompt, "chosen": chosen, "rejected": rejected})
        if fault is None and chosen.strip() == rejected.strip():
            fault = (
                f"{where}: both responses are the same, so neither can be preferred: remove the row"
            )
        if not _refused(fault, skipped):
            key = hashlib.blake2b((path.parent / image).read_bytes(), digest_size=16).hexdigest()
            rows.append(ImagePreference(where, path.parent / image, key, prompt, chosen, rejected))
    return rows


def split_by_prompt(rows: Sequence[Row], held_out: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out, with no prompt on both sides.

    A prompt's side follows from the seed and the prompt alone (case and white space aside), so the same prompt is on the same side
    in every file and in every step that has the same seed and share: what a reward model never saw, no policy is rewarded on.
    Of questions about pictures, the picture decides.

    Args:
        held_out: Share of the prompts that is held out; 0: none.

    Raises:
        ValueError: One side would be empty.
    """
    train, test = [], []
    for row in rows:
        digest = hashlib.blake2b(
            f"{seed}\0{_key(row)}".encode("utf-8", "surrogatepass"), digest_size=8
        ).digest()
        (test if int.from_bytes(digest, "big") / 2**64 < held_out else train).append(row)
    if not train or (held_out and not test):
        prompts = len({_key(row) for row in rows})
        side = "train on" if not train else "hold out"
        raise ValueError(
            f"held_out={held_out} of {prompts} different prompts leaves none to {side}: change held_out, or give more prompts"
        )
    return train, test


def check_leak(train: Iterable[Row], test: Iterable[Row]) -> None:
    """Refuse prompts that are trained on and tested on, case and white space aside.

    Raises:
        ValueError: Names the first such pair of rows and how many held-out rows there are like it.
    """
    seen = {_key(row): row for row in train}
    leaks = [row for row in test if _key(row) in seen]
    if leaks:
        what = "picture" if isinstance(leaks[0], ImagePreference) else "prompt"
        raise ValueError(
            f"{leaks[0].id} is held out, but {seen[_key(leaks[0])].id} trains on the same {what} "
            f"({len(leaks)} held-out rows leak so): remove them from one side"
        )


def _key(row: Instruction | Preference | ImagePreference) -> str:
    return (
        row.image_key
        if isinstance(row, ImagePreference)
        else " ".join(row.prompt.split()).casefold()
    )


def _refused(fault: str | None, skipped: list[str] | None) -> bool:
    if fault is not None and skipped is None:
        raise ValueError(
            f"{fault}, or set skip_empty=true to leave out, and count, all rows like it"
        )
    if fault is not None:
        skipped.append(fault)
    return fault is not None


def _empty(where: str, texts: dict[str, str]) -> str | None:
    empty = [name for name, text in texts.items() if not text.strip()]
    return f"{where}: its {empty[0]} is empty: write it, or remove the row" if empty else None


def _text(record: dict[str, Any], key: str, where: str, optional: bool = False) -> str:
    value = record.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: {key!r} must be text, but is {value!r}: is this the layout that this step reads?"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {key!r} holds half of a character (a lone surrogate): remove it"
        ) from error
    return value


def _label(record: dict[str, Any], key: str, where: str, allowed: tuple[Any, Any]) -> int:
    value = record.get(key)
    if not isinstance(value, bool | int) or value not in allowed:
        raise ValueError(
            f"{where}: its label {key!r} is {value!r}, but must be {allowed[0]} or {allowed[1]}: label the row, or remove it"
        )
    return int(value)
