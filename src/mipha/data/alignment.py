"""Instructions and preferences, which alignment learns from: read, checked, held out and encoded.

    Instruction      alpaca_data.json  [{"instruction", "input", "output"}, ...]
    Preference       train.jsonl[.xz]  {"prompt", "response_0", "is_response_0_safe", ...}
    ImagePreference  pairs.jsonl       {"image", "prompt", "chosen", "rejected"}

Each layout may come as JSON, JSON lines or parquet. A prompt and its response become token ids:

    prompt ids    everything up to where the assistant begins to speak
    response ids  the assistant's words and the token that ends its turn

Training, scoring and sampling use this same sequence. What a chat template writes after the end of
the turn is left out: no policy ever writes it, so no score may depend on it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import lzma
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mipha.data.dataset import LoadedData
from mipha.data.datasets._images import ImageFolders, image_folders, path_inside, short
from mipha.data.datasets._keys import Keys
from mipha.data.datasets._records import LINE_SUFFIXES, JsonRecords, put_images_first
from mipha.data.faults import RecordError
from mipha.data.images import why_missing
from mipha.data.sample import Message, Remark, Sample
from mipha.errors import import_optional
from mipha.files import parse_json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Instruction:
    """A task and its response.

    Args:
        id: File and row, for messages.
        prompt: Text of the task.
        response: Text that a model should answer with.
        remarks: Keys of the row that nothing reads.
    """

    id: str
    prompt: str
    response: str
    remarks: tuple[Remark, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt, with independent labels for helpfulness and harmlessness.

    Args:
        id: File and row, for messages.
        prompt: Text of the user.
        responses: Texts of both responses.
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
    """Two answers to one question about one image.

    Args:
        id: File and row, for messages.
        image: Path of the image.
        image_key: Hash of the image's bytes; a copy under another name has the same.
        prompt: Text of the question.
        chosen: Text of the preferred answer.
        rejected: Text of the other answer.
        remarks: Keys of the row that nothing reads.
    """

    id: str
    image: Path
    image_key: str
    prompt: str
    chosen: str
    rejected: str
    remarks: tuple[Remark, ...] = field(default=(), repr=False, compare=False)

    @property
    def samples(self) -> tuple[Sample, Sample]:
        """The chosen and the rejected answer, each as a conversation about the image."""
        (question,) = put_images_first([Message("user", self.prompt)], 1)
        chosen, rejected = (
            Sample(self.id, (question, Message("assistant", answer)), (self.image,), self.remarks)
            for answer in (self.chosen, self.rejected)
        )
        return chosen, rejected


AnyRow = TypeVar("AnyRow", Instruction, Preference, ImagePreference)

Exchange = tuple[list[int], list[int]]
"""Token ids of a prompt and of its response."""


# Reading -----------------------------------------------------------------------------------------


def load_instructions(path: Path, skipped: list[str] | None = None) -> list[Instruction]:
    """Read instructions in Alpaca's layout.

    The prompt is the instruction and, on the next line, its input where there is one.

    Args:
        path: File: .json, .jsonl, .jsonl.xz or .parquet.
        skipped: List that receives why a row with an empty prompt or response was left out; None:
            such a row is an error.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file has another format, or a row is wrong; names the file and the row.

    Source: the published alpaca_data.json; Stanford Alpaca trains on other words around the same
    fields.
    """
    rows = []
    for where, record in read_records(path):
        instruction, given, output = (
            _text(record, key, where, optional=key == "input")
            for key in ("instruction", "input", "output")
        )
        if not _is_skipped(_empty(where, {"prompt": instruction, "response": output}), skipped):
            prompt = f"{instruction}\n{given}" if given.strip() else instruction
            keys = Keys(record, image_folders(path), where)
            keys.read.update(("instruction", "input", "output"))
            remarks = keys.remarks([Message("user", f"{prompt}\n{output}")], [])
            rows.append(Instruction(where, prompt, output, remarks))
    return rows


def load_preferences(path: Path, skipped: list[str] | None = None) -> list[Preference]:
    """Read pairs of responses in the layout of PKU-SafeRLHF-10K.

    Args:
        path: File: .jsonl.xz as published, or .jsonl, .json, .parquet.
        skipped: List that receives why a row with an empty text, or the same response twice, was
            left out; None: such a row is an error.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file has another format, or a row is wrong; names the file and the row. A
            row without a label always is.

    Source: the fields of https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF-10K
    """
    rows = []
    for where, record in read_records(path):
        prompt, first, second = (
            _text(record, key, where) for key in ("prompt", "response_0", "response_1")
        )
        better, safer = (
            _label(record, key, where, (0, 1))
            for key in ("better_response_id", "safer_response_id")
        )
        first_is_safe, second_is_safe = (
            bool(_label(record, f"is_response_{number}_safe", where, (False, True)))
            for number in (0, 1)
        )

        texts = {"prompt": prompt, "response_0": first, "response_1": second}
        fault = _empty(where, texts) or _same(where, first, second)
        if not _is_skipped(fault, skipped):
            safe = (first_is_safe, second_is_safe)
            rows.append(Preference(where, prompt, (first, second), better, safer, safe))
    return rows


def load_image_preferences(path: Path, skipped: list[str] | None = None) -> list[ImagePreference]:
    """Read pairs of answers about images: {"image", "prompt" or "question", "chosen", "rejected"}.

    Args:
        path: File as in `load_preferences`; the images' paths start at its folder.
        skipped: List as in `load_preferences`.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: As in `load_preferences`; also a row whose image does not exist.
    """
    rows = []
    for where, record in read_records(path):
        row, fault = _image_preference(image_folders(path), where, record)
        if not _is_skipped(fault, skipped):
            rows.append(row)
    return rows


def _image_preference(
    folders: ImageFolders, where: str, record: dict[str, Any]
) -> tuple[ImagePreference, RecordError | None]:
    """Read one pair of answers, and say why `skip_empty` would leave it out, if it would."""
    asked = "prompt" if "prompt" in record else "question"
    prompt, chosen, rejected = (_text(record, key, where) for key in (asked, "chosen", "rejected"))

    # Find the image.
    keys = Keys(record, folders, where)
    keys.read.update((asked, "chosen", "rejected"))
    keys.with_marks([])  # a pair has no turns of its own to mark
    images = keys.take_images()
    if len(images) != 1 or not isinstance(images[0], str):
        held = f"{len(images)} images" if len(images) != 1 else f"an image {short(images[0])}"
        raise RecordError(f"it has {held}", "wanted the path of one", where, "image-count")
    try:
        file = path_inside(folders, images[0], where)
    except RecordError as error:
        fix = f"put it into {folders.base}" if error.kind == "outside-path" else error.fix
        raise RecordError(error.what, fix, where, error.kind) from error
    if not file.is_file():
        fix = why_missing(file) or "put it there, or fix the row"
        raise RecordError(f"there is no image {file}", fix, where, "missing-image")

    texts = {asked: prompt, "chosen": chosen, "rejected": rejected}
    key = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
    remarks = keys.remarks([Message("user", f"{prompt}\n{chosen}\n{rejected}")], [file])
    row = ImagePreference(where, file, key, prompt, chosen, rejected, remarks)
    return row, _empty(where, texts) or _same(where, chosen, rejected)


@dataclass(frozen=True)
class PairRecord:
    """One row of a file of pairs, not judged yet.

    Args:
        where: File and row, for messages.
        content: Object of the row.
        folders: Where its image may be.
    """

    where: str
    content: dict[str, Any]
    folders: ImageFolders

    def read(self) -> ImagePreference:
        """Return the pair.

        Raises:
            RecordError: The row is at fault.
        """
        row, fault = _image_preference(self.folders, self.where, self.content)
        if fault is not None:
            raise fault
        return row

    def is_empty(self) -> bool:
        """Return whether `skip_empty` leaves the row out."""
        try:
            self.read()
        except RecordError as error:
            return error.kind in _SKIPPED
        return False

    def chosen(self) -> Sample:
        """Return the chosen answer; its remarks name the keys that nothing reads."""
        return self.read().samples[0]

    def rejected(self) -> Sample:
        """Return the rejected answer."""
        return self.read().samples[1]


def pairs_to_check(path: Path, skip_empty: bool = False) -> LoadedData:
    """Return pairs of answers about images as the data checks read them, row by row.

    Args:
        path: File as in `load_image_preferences`.
        skip_empty: Whether training leaves out rows with an empty text or the same answer twice.

    Raises:
        FileNotFoundError, ValueError: As `read_records`.
    """
    folders = image_folders(path)
    records = [PairRecord(where, row, folders) for where, row in read_records(path)]
    kept = [record for record in records if not (skip_empty and record.is_empty())]
    num_empty = len(records) - len(kept)
    return LoadedData(
        path.name,
        kept,
        PairRecord.chosen,
        folder=path.parent,
        format=f"{path} is read as pairs: a chosen and a rejected answer about an image",
        left_out=f"{num_empty} rows that skip_empty leaves out" if num_empty else None,
        rejected=PairRecord.rejected,
    )


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the objects of a published file.

    Yields:
        File and row, counted from 1, and the row's object.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file has another format, is broken or empty; names the line or the row.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no data file {path}: give the published .json, .jsonl, .jsonl.xz or .parquet"
        )

    number = 0
    for number, record in enumerate(_read_values(path), start=1):
        where = f"{path} row {number}"
        if not isinstance(record, dict):
            raise ValueError(
                f"{where} is not an object with named fields ({str(record)[:60]!r}): "
                "is this the layout that this step reads?"
            )
        yield where, record
    if not number:
        raise ValueError(f"{path} has no rows: give a file with some")


def _read_values(path: Path) -> Iterable[Any]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        parquet = import_optional("pyarrow.parquet", f"reading {path}", "align")
        return parquet.read_table(path).to_pylist()
    if suffix in LINE_SUFFIXES:
        records = JsonRecords(path)
        return (records.read(index) for index in range(len(records)))
    if suffix != ".xz":
        raise ValueError(f"{path} is no .json, .jsonl, .jsonl.xz or .parquet: give one of these")

    try:
        content = lzma.decompress(path.read_bytes())
    except lzma.LZMAError as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): download it again") from error

    content = content.removeprefix(codecs.BOM_UTF8)
    if not content.lstrip().startswith(b"["):
        return (value for _, value in parse_json_lines(content, path))
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(
            f"{path} is not whole JSON ({error}): download it again, or fix it"
        ) from error


_SKIPPED = ("empty-answer", "no-preference")
"""Kinds of faults of rows that `skip_empty` leaves out."""


def _is_skipped(fault: RecordError | None, skipped: list[str] | None) -> bool:
    if fault is not None and skipped is None:
        hint = "or set skip_empty=true to leave out, and count, all rows like it"
        raise RecordError(fault.what, f"{fault.fix}, {hint}", fault.where, fault.kind)
    if fault is not None:
        skipped.append(str(fault))
    return fault is not None


def _empty(where: str, texts: dict[str, str]) -> RecordError | None:
    empty = [name for name, text in texts.items() if not text.strip()]
    if not empty:
        return None
    fix = "write it, or remove the row"
    return RecordError(f"its {empty[0]} is empty", fix, where, "empty-answer")


def _same(where: str, one: str, other: str) -> RecordError | None:
    if one.strip() != other.strip():
        return None
    what = "both responses are the same, so neither can be preferred"
    return RecordError(what, "remove the row", where, "no-preference")


def _text(record: dict[str, Any], key: str, where: str, optional: bool = False) -> str:
    value = record.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise RecordError(
            f"{key!r} must be text, but is {repr(value)[:80]}",
            "is this the layout that this step reads?",
            where,
        )

    # A lone surrogate has no UTF-8, so no tokenizer reads it.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        what = f"{key!r} holds half of a character (a lone surrogate)"
        raise RecordError(what, "remove it", where, "lone-surrogate") from error
    return value


def _label(record: dict[str, Any], key: str, where: str, allowed: tuple[Any, Any]) -> int:
    value = record.get(key)
    if not isinstance(value, bool | int) or value not in allowed:
        raise ValueError(
            f"{where}: its label {key!r} is {value!r}, but must be {allowed[0]} or {allowed[1]}: "
            "label the row, or remove it"
        )
    return int(value)


# Holding out -------------------------------------------------------------------------------------


def split_by_prompt(
    rows: Sequence[AnyRow], held_out: float, seed: int
) -> tuple[list[AnyRow], list[AnyRow]]:
    """Split rows into a training and a held-out side, with no prompt on both sides.

    The side depends only on the seed and the prompt (case and white space aside). So the same
    prompt is on the same side in every file and in every step with the same seed and share: no
    policy is rewarded on prompts that the reward model was validated on. For questions about
    images, the image decides.

    Args:
        held_out: Share of the prompts that is held out; 0: none.
        seed: Seed of the split.

    Raises:
        ValueError: One side would be empty.
    """
    train, test = [], []
    for row in rows:
        text = f"{seed}\0{_split_key(row)}".encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(text, digest_size=8).digest()
        (test if int.from_bytes(digest, "big") / 2**64 < held_out else train).append(row)

    if not train or (held_out and not test):
        prompts = len({_split_key(row) for row in rows})
        side = "train on" if not train else "hold out"
        raise ValueError(
            f"held_out={held_out} of {prompts} different prompts leaves none to {side}: "
            "change held_out, or give more prompts"
        )
    return train, test


def check_leak(train: Iterable[AnyRow], test: Iterable[AnyRow]) -> None:
    """Reject prompts that are both trained on and held out, case and white space aside.

    Raises:
        ValueError: A prompt leaks; names the first such pair of rows and the number of held-out
            rows that leak.
    """
    seen = {_split_key(row): row for row in train}
    leaks = [row for row in test if _split_key(row) in seen]
    if leaks:
        what = "image" if isinstance(leaks[0], ImagePreference) else "prompt"
        raise ValueError(
            f"{leaks[0].id} is held out, but {seen[_split_key(leaks[0])].id} trains on the same "
            f"{what} ({len(leaks)} held-out rows leak so): remove them from one side"
        )


def _split_key(row: Instruction | Preference | ImagePreference) -> str:
    if isinstance(row, ImagePreference):
        return row.image_key
    return " ".join(row.prompt.split()).casefold()


# Encoding ----------------------------------------------------------------------------------------


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the ids of a user's words, up to where the assistant begins to speak.

    Args:
        tokenizer: Tokenizer with a chat template.
    """
    messages = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(encoded["input_ids"])


def encode_exchange(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, where: str
) -> Exchange:
    """Return the ids of a prompt, and those of its response with the end of its turn.

    Args:
        tokenizer: Tokenizer with a chat template that marks the assistant's words.
        response: Text; white space around it is dropped, because a tokenizer would join it to the
            end of the prompt.
        where: Name of the row, for messages.

    Raises:
        ValueError: Prompt and response encoded together differ from the prompt encoded alone, so no
            policy would ever continue such a prompt.
    """
    messages = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": response.strip()},
    ]
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )

    # The response must be one stretch of marked tokens.
    ids, spoken = np.asarray(encoded["input_ids"]), np.flatnonzero(encoded["assistant_masks"])
    start, end = (int(spoken[0]), int(spoken[-1]) + 1) if len(spoken) else (0, 0)
    if not len(spoken) or len(spoken) != end - start:
        raise ValueError(
            f"{where}: the chat template does not mark the response as one stretch of tokens: "
            "is its text part of a template?"
        )

    # The prompt must have the ids that a policy is asked with.
    prompt_ids, response_ids = ids[:start].tolist(), ids[start:end].tolist()
    if prompt_ids != encode_prompt(tokenizer, prompt):
        raise ValueError(
            f"{where}: the tokenizer joins prompt and response, so they cannot be told apart: "
            "use another chat_template"
        )
    return prompt_ids, response_ids


def check_lengths(
    rows: Iterable[tuple[str, Sequence[int], Sequence[int]]], max_tokens: int
) -> None:
    """Reject conversations that are too long: cut off, a response would lose its scored end.

    Args:
        rows: Name, prompt ids and response ids of each conversation.
        max_tokens: Largest number of tokens of prompt and response together.

    Raises:
        ValueError: A conversation is too long; names the longest one, its tokens and the number of
            rows that are too long.
    """
    over = [
        (len(prompt) + len(response), where)
        for where, prompt, response in rows
        if len(prompt) + len(response) > max_tokens
    ]
    if over:
        longest, where = max(over)
        raise ValueError(
            f"{where} takes {longest} tokens, more than max_tokens={max_tokens}, "
            f"so its response would be cut off ({len(over)} rows are too long, this one the "
            f"longest): set max_tokens={longest}, or remove them"
        )
