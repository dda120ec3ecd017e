"""Your own data as LLaVA writes it: conversations between human and gpt about one image.

    {"image": path, "conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}

One JSON list, or JSON lines. LLaVA's rules: the image marker moves to the front of the turn that
holds `<image>`; a first turn that is not the human's is left out, and so is a last one that nobody
answers. Rows with other roles, a system turn or several images are read as `sharegpt`. Image paths
start from the folder of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mipha.data.dataset import DataSet
from mipha.data.datasets import sharegpt
from mipha.data.datasets._images import choose_images, image_folders
from mipha.data.datasets._keys import MARKS, SYSTEM, Keys
from mipha.data.datasets._records import (
    LINE_SUFFIXES,
    JsonRecords,
    Part,
    Row,
    Rows,
    check_split,
    put_images_first,
    record_rows,
)
from mipha.data.datasets._regions import READS
from mipha.data.sample import IMAGE, Message, Role, Sample

ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant"}


def load(root: Path | None, split: str, image_root: Sequence[Path] = ()) -> Rows:
    """Index the records of a split; arguments and errors as in `messages`."""
    return record_rows("llava", root, split, LINE_SUFFIXES, image_root)


def to_sample(row: Row) -> Sample:
    """Read one conversation by LLaVA's rules, or by ShareGPT's where it is not one of LLaVA's.

    The image marker moves to the front of the turn that holds it, followed by a new line; several
    in a turn become one. An image without a marker goes to the front of the first turn. A first
    turn that is not the human's is left out, and so is a last one that nobody answers.

    Raises:
        RecordError: The row is not a conversation.

    Source: `preprocess_multimodal` and `preprocess` of LLaVA 1.5, train.py.
    """
    content = row.content
    if not isinstance(content, Mapping) or not isinstance(content.get("conversations"), list):
        raise row.fault(
            'it has no list of "conversations"', 'wanted an object with a list of "conversations"'
        )
    if not is_llava(content):
        return sharegpt.to_sample(row)

    # Read the turns, and which of them are learned.
    keys = row.keys()
    keys.read.add("conversations")
    messages = [
        _read_turn(row, keys, number, turn) for number, turn in enumerate(content["conversations"])
    ]
    messages = keys.with_marks(messages)

    # Leave out turns at the ends.
    if messages and messages[0].role != "user":
        messages = messages[1:]
    if messages and messages[-1].role == "user":
        messages = messages[:-1]
    if not messages:
        raise row.fault(
            "no human turn is answered, so there is nothing to train on",
            "remove the row",
            "role-order",
        )

    # Put the image in front where no turn has a marker.
    images = keys.take_images()
    written = sum(str(turn.get("value")).count(IMAGE) for turn in content["conversations"])
    if images and not written:
        messages = list(put_images_first(messages, len(images)))
        keys.remark("added-marker", f"an image without an {IMAGE} marker goes to the first turn")
    return row.sample(messages, images, keys)


def is_llava(content: Mapping[str, Any]) -> bool:
    """Return whether a record with conversations is one of LLaVA's: human, gpt, at most one image.

    Args:
        content: The record.
    """
    if len(choose_images(content)) > 1 or content.get("images") is not None:
        return False
    if isinstance(content.get("image"), list) or content.get("history"):
        return False
    if any(content.get(name) for name in SYSTEM):
        return False
    return all(
        isinstance(turn, Mapping) and turn.get("from") in ROLES for turn in content["conversations"]
    )


def published(name: str, filename: str) -> DataSet:
    """Return a data set that LLaVA published as one JSON list, with its images beside it.

    Args:
        name: Name of the data set.
        filename: Name of the published file.
    """
    load = partial(_load_published, name, filename)
    return DataSet(name, load, to_sample, takes_image_root=True)


def _load_published(
    dataset: str, filename: str, root: Path | None, split: str, image_root: Sequence[Path] = ()
) -> Rows:
    """Index the rows of a published file.

    Args:
        dataset: Name for messages.
        filename: Name of the published file.
        root: The JSON file, or the folder that holds it. Images are in the folder's `images` if
            there is one (as LLaVA unpacks the first stage), else in the folder itself (as for the
            second).
        split: `train` is all there is.
        image_root: Folders that images may lie in; a relative path starts from the first.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another split, no root, or the file is not a JSON list.
    """
    check_split(dataset, split, ("train",))
    if root is None:
        raise ValueError(
            f"{dataset} has no packaged copy: set the data's root to {filename} "
            "or the folder that holds it"
        )
    file = root / filename if root.is_dir() else root
    if not file.is_file():
        raise FileNotFoundError(
            f"{dataset}: no file {file}; download {filename} or set the data's root to where it is"
        )

    records = JsonRecords(file)
    if not records.is_list:
        raise ValueError(
            f"{file} holds no JSON list; wanted a list of conversations "
            "(for JSON lines, set the data set to llava)"
        )
    images = file.parent / "images" if (file.parent / "images").is_dir() else file.parent
    return Rows([Part(dataset, records, image_folders(file, image_root, base=images))])


def _read_turn(row: Row, keys: Keys, number: int, turn: Mapping[str, Any]) -> Message:
    text, role = turn.get("value"), ROLES[turn["from"]]
    if not isinstance(text, str):
        raise row.fault(
            f'turn {number} is not {{"from": "human" or "gpt", "value": text}}: {str(turn)[:80]}',
            "write the turn so, or remove the row",
        )
    if IMAGE in text:
        text = f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()
    learned = keys.learned(f"turn {number}", turn, role)
    keys.turn("conversations[]", turn, "from", "value", *MARKS)
    return Message(role, text, learned)


DATASET = DataSet("llava", load, to_sample, takes_image_root=True, reads=READS)
