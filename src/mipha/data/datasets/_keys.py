"""Every key of a record is accounted for: which were read, and what the others hold.

A reader takes the keys that it reads from `Keys`; `Row.sample` then says what is left:

    record --Keys.take--> turns, images, system, history, marks
           --Keys.remarks--> nothing reads "source" (a warning), "image2" (an image: an error)
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from mipha.data.datasets._images import (
    ImageFolders,
    choose_images,
    image_source,
    is_base64_image,
    is_list,
    short,
)
from mipha.data.faults import FaultKind, RecordError
from mipha.data.images import SUFFIXES, ImageSource, StoredImage
from mipha.data.sample import Message, Remark

SYSTEM = ("system", "system_prompt", "system_message", "systemPrompt", "systemprompt")
"""Names under which a record gives its system turn."""

DEEPEST = 100
"""Lists and objects inside one another that are read."""

TURNS = ("messages", "conversations", "texts")
"""Names of lists of turns, which a table's cell may hold as JSON."""

# Source: OpenAI (weight), ms-swift (loss, loss_scale), LLaMA-Factory (loss_mask, loss_weight),
# verl (trainable), axolotl (train, training)
MARKS = (
    "weight",
    "loss",
    "loss_mask",
    "loss_weight",
    "loss_scale",
    "trainable",
    "is_trainable",
    "train",
    "training",
    "learn",
    "learnable",
    "supervised",
)
"""Names of marks that say whether a turn is learned: true or 1, false or 0."""

_LIST_MARKS = (*MARKS, "loss_masks", "weights", "loss_weights", "train_mask", "turn_mask")

# Other names that may say the same, or the opposite: nobody can tell, so the row is refused.
_MARK_LIKE = re.compile(
    r"(?:.*_)?(?:loss|train|trainable|training|learn|supervised?|masks?|masked|ignored?)"
    r"(?:_(?:on|turns?|flag|this|weights?|masks?|scale))*"
)
_TRAIN_LIKE = re.compile(r".*(?:train|loss|learn).*")
_QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")
_MEDIA = re.compile(
    r"\.?(?:videos?|audios?|video_path|audio_path|mp4|webm|avi|mov|mkv|wav|mp3|flac)"
)
_IMAGE_FILES = re.compile(r"\.(?:svg|tga|psd|eps|dds|exr|hdr|pdf|raw|dng|cr2|nef)")
_HISTORY = re.compile(
    r"(?:.*_)?(?:history|histories|dialogue?s?|conversations?|messages|previous_turns|turns|rounds)"
)
_OPTIONS = re.compile(r"(?:.*_)?(?:options?|choices?|candidates?)(?:_?(?:[a-h]|\d))?")
_SYSTEM_LIKE = re.compile(r"system(?:_?(?:prompt|message|msg|text|instruction))?")
_IMAGE_LIKE = re.compile(r"(?:.*_)?(?:image|img|picture|photo)s?(?:_?(?:\d{1,2}|[a-h]|path|file))*")


class Keys:
    """The keys of one record, and which of them were read.

    Args:
        content: The record.
        folders: Where its images may be.
        where: File and line, for messages.
    """

    def __init__(self, content: Mapping[str, Any], folders: ImageFolders, where: str) -> None:
        self.content, self.folders, self.where = content, folders, where
        self.read: set[str] = {"id"}
        self.parts: dict[str, Any] = {}
        """Keys of turns and parts that nothing reads, such as `messages[].name`, with a value."""
        self.said: list[Remark] = []

    def fault(self, what: str, fix: str, kind: FaultKind = "malformed") -> RecordError:
        """Return the error that says what is wrong with this record."""
        return RecordError(what, fix, self.where, kind)

    def take(self, *names: str) -> Any:
        """Return the value of the first key that is there and not None; it counts as read."""
        for name in names:
            if self.content.get(name) is not None:
                self.read.add(name)
                return self.content[name]
        return None

    def take_images(self) -> list[Any]:
        """Return what the record gives as its images, in order; empty for text alone.

        Raises:
            RecordError: `images` is not a list.
        """
        names = choose_images(self.content)
        self.read.update(names)
        values: list[Any] = []
        for name in names:
            value = self.content[name]
            if is_list(listed := parse_list(value)):  # a table's cell
                value = listed
            if name == "images" and not is_list(value):
                raise self.fault(f'"images" is {short(value)}', "wanted a list of paths")
            values += value if is_list(value) else [value]
        if None in values:
            raise self.fault(
                f"image {values.index(None)} of its {len(values)} images is null",
                "remove the null, or put the image there",
                "null-image",
            )
        return values

    def take_system(self) -> list[Message]:
        """Return the system turn that stands beside the conversation; empty where there is none.

        Raises:
            RecordError: It is not text.
        """
        text = self.take(*SYSTEM)
        if text is None or text == "":
            return []
        if not isinstance(text, str):
            raise self.fault(f"its system turn is {short(text)}", "wanted text")
        return [Message("system", text)]

    def take_history(self) -> list[Message]:
        """Return the turns that came before: pairs of a question and its answer, or turns.

        Raises:
            RecordError: They are something else.
        """
        value = parse_list(self.take("history"))
        if value is None or value == "" or value == []:
            return []
        messages: list[Message] = []
        for turn in value if is_list(value) else [value]:
            pair = self._as_pair(turn)
            if pair is None:
                raise self.fault(
                    f"its history holds {short(turn)}", "wanted pairs of a question and its answer"
                )
            messages += pair
        return messages

    def _as_pair(self, turn: Any) -> list[Message] | None:
        """Return a question and its answer of a history, or one turn of it."""
        if is_list(turn) and len(turn) == 2 and all(isinstance(text, str) for text in turn):
            return [Message("user", turn[0]), Message("assistant", turn[1])]
        if not isinstance(turn, Mapping):
            return None

        for ask, say in (("user", "assistant"), ("query", "response"), ("question", "answer")):
            if isinstance(turn.get(ask), str) and isinstance(turn.get(say), str):
                self.turn("history[]", turn, ask, say, *MARKS)
                learned = self.learned("a turn of its history", turn, "assistant")
                return [Message("user", turn[ask]), Message("assistant", turn[say], learned)]

        name = turn.get("from", turn.get("role"))
        role = {"human": "user", "gpt": "assistant"}.get(str(name), name)
        text = turn.get("value", turn.get("content"))
        if role not in ("system", "user", "assistant") or not isinstance(text, str):
            return None
        self.turn("history[]", turn, "from", "role", "value", "content", *MARKS)
        return [Message(role, text, self.learned("a turn of its history", turn, role))]

    def turn(self, path: str, turn: Mapping[str, Any], *read: str) -> None:
        """Note the keys of a turn or part that nothing reads.

        Args:
            path: Place of all such turns, such as `messages[]`.
            turn: Turn or part.
            read: Its keys that are read.
        """
        for name, value in turn.items():
            if name not in read and not _is_empty(value):
                self.parts.setdefault(f"{path}.{name}", value)

    def learned(self, name: str, turn: Mapping[str, Any], role: str) -> bool:
        """Return whether a turn may be learned, by the marks in it.

        Args:
            name: Name of the turn in messages, such as `message 1`.
            turn: Turn.
            role: Who speaks in it.

        Raises:
            RecordError: A mark is neither yes nor no, or nobody can tell what it means.
        """
        learned = True
        for key, value in turn.items():
            if value is None or not isinstance(key, str) or not _may_mark(key):
                continue
            if key in MARKS:
                if (mark := _as_mark(value)) is None:
                    raise self.fault(
                        f'the "{key}" of {name} is {short(value)}, which is neither yes nor no',
                        "write 1 or 0, or remove the turn",
                        "loss-mark",
                    )
                learned &= mark
            elif _is_mark_like(value):
                raise self.fault(
                    f'the "{key}" of {name} is {short(value)}, which may say whether it is learned',
                    'write "weight": 1 or "weight": 0 instead',
                    "loss-mark",
                )
        return learned or role != "assistant"

    def with_marks(self, messages: Sequence[Message]) -> list[Message]:
        """Return the turns, those not learned that the marks of the whole record name.

        Args:
            messages: One for each turn of the record.

        Raises:
            RecordError: The record says that nothing of it is learned, or its marks are not one
                for each turn or each answer.
        """
        learned = [message.learned for message in messages]
        answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
        for key, value in self.content.items():
            if not isinstance(key, str) or not _may_mark(key):
                continue
            if key.lower() not in _LIST_MARKS:
                if _is_mark_like(value):
                    raise self.fault(
                        f'its "{key}" is {short(value)}, which may say what is learned',
                        'write "loss_mask" with 1 or 0 for each turn, or remove the key',
                        "loss-mark",
                    )
                continue

            # One mark for the whole record.
            value = parse_list(value)
            if not is_list(value):
                if value is not None and (mark := _as_mark(value)) is not None:
                    self.read.add(key)
                    if not mark:
                        raise self.fault(
                            f'its "{key}" is {short(value)}, so nothing of it is to be learned',
                            "remove the row",
                            "loss-mark",
                        )
                continue

            # One mark for each turn, or for each answer.
            self.read.add(key)
            marks = [_as_mark(mark) for mark in value]
            places = range(len(messages)) if len(marks) == len(messages) else answers
            if None in marks or len(marks) != len(places):
                raise self.fault(
                    f'its "{key}" is {short(value)} for {len(messages)} turns',
                    "write 1 or 0 for each turn",
                    "loss-mark",
                )
            for place, mark in zip(places, marks, strict=True):
                learned[place] &= bool(mark)
        return [
            message if mark or message.role != "assistant" else replace(message, learned=False)
            for message, mark in zip(messages, learned, strict=True)
        ]

    def remark(self, kind: str, about: str, what: str = "") -> None:
        """Add something that people should hear of; see `Remark`."""
        self.said.append(Remark(kind, about, what or about))

    def remarks(
        self, messages: Sequence[Message], images: Sequence[ImageSource]
    ) -> tuple[Remark, ...]:
        """Return all remarks on the record: those made, and one for each key that nothing read.

        Args:
            messages: Turns that were made of the record.
            images: Images of the sample.
        """
        found = list(self.said)
        left = [(name, value) for name, value in self.content.items() if name not in self.read]
        for name, value in (*left, *self.parts.items()):
            if _is_empty(value):
                continue
            name = str(name)
            holds = self._holds(name.rpartition(".")[2] or name, value, messages, images)
            if holds:
                about = f'nothing reads the key "{name}", which holds {holds}'
                found.append(Remark("unread-content", about, f"{about}: {short(value)}"))
            else:
                about = f'nothing reads the key "{name}"'
                found.append(Remark("unread-key", about, name))
        return tuple(found)

    def _holds(
        self, name: str, value: Any, messages: Sequence[Message], images: Sequence[ImageSource]
    ) -> str | None:
        """Return what an unread value holds that changes the sample's meaning; None for nothing."""
        name = name.strip().lower().replace(" ", "_")
        if self._is_another_image(name, value, images):
            return "an image"
        if _MEDIA.fullmatch(name) or _IMAGE_FILES.fullmatch("." + name.removeprefix(".")):
            return "a file that the model does not see"

        if _TRAIN_LIKE.fullmatch(name) and isinstance(value, list | tuple | dict):
            return "marks on what is learned"

        # Words that stand in the sample anyway change nothing.
        text = "\n".join(message.text for message in messages)
        if all(word in text for word in _words(value)):
            return None
        for kind, pattern in (
            ("a system turn", _SYSTEM_LIKE),
            ("earlier turns", _HISTORY),
            ("options", _OPTIONS),
        ):
            if pattern.fullmatch(name):
                return kind
        return None

    def _is_another_image(self, name: str, value: Any, images: Sequence[ImageSource]) -> bool:
        """Return whether a value is an image, or images, that the sample does not show."""
        values = value if is_list(value) else [value]
        return any(self._is_new_image(name, item, images) for item in values)

    def _is_new_image(self, name: str, item: Any, images: Sequence[ImageSource]) -> bool:
        if isinstance(item, Mapping):
            given = next((item[key] for key in ("bytes", "path", "url") if item.get(key)), None)
            values = [value for value in item.values() if isinstance(value, str | bytes)]
            if given is None:
                return any(self._is_new_image(name, value, images) for value in values)
            item = given
        if isinstance(item, StoredImage) or (isinstance(item, bytes) and _is_image(item)):
            return item not in images
        if not isinstance(item, str) or not item.strip():
            return False
        if item.startswith("data:image/") or is_base64_image(item):
            return True

        # A path: of an image that is shown under another key, or of a further one.
        is_named_so = _IMAGE_LIKE.fullmatch(name) is not None
        has_suffix = os.path.splitext(item)[1].lower() in SUFFIXES
        if not is_named_so and not has_suffix:
            return False
        if os.path.basename(item) in {os.path.basename(str(image)) for image in images}:
            return False
        if is_named_so and has_suffix:
            return True
        try:
            return os.path.isfile(str(image_source(item, self.folders, self.where)))
        except (RecordError, ValueError, OSError):
            return False


@lru_cache(maxsize=4096)
def _may_mark(key: str) -> bool:
    """Return whether a key of this name may say what is learned."""
    return key.lower() in _LIST_MARKS or _MARK_LIKE.fullmatch(key.lower()) is not None


def parse_list(value: Any) -> Any:
    """Return a list or object that a table's cell writes as text; any other value as it is."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{", "("):
        return value
    text = value.strip()
    try:
        found = json.loads(text)
        return value if is_deep(text, found) else found
    except (ValueError, RecursionError):
        pass

    # numpy writes ['a' 'b'], which Python would read as one text.
    quoted = [one or other for one, other in _QUOTED.findall(text)]
    if len(quoted) > 1 and not set(_QUOTED.sub("", text)) - set("[] \n"):
        return quoted
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value
    return value if is_deep(text, found) else found


def is_deep(text: str, value: Any) -> bool:
    """Return whether a value is nested so deeply that functions which call themselves may fail.

    Args:
        text: What the value was read from; few brackets need no look at the value.
        value: Lists and objects.
    """
    if text.count("[") + text.count("{") + text.count("(") <= DEEPEST:
        return False
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list | tuple)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _as_mark(value: Any) -> bool | None:
    """Return what a mark says; None where it is neither yes nor no."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    words = {"true": True, "1": True, "1.0": True, "yes": True}
    words |= {"false": False, "0": False, "0.0": False, "no": False}
    return words.get(value.strip().lower()) if isinstance(value, str) else None


def _is_mark_like(value: Any) -> bool:
    """Return whether a value may mark what is learned: yes or no, or a list of those."""
    value = parse_list(value)
    if is_list(value):
        return bool(value) and all(_as_mark(mark) is not None for mark in value)
    return _as_mark(value) is not None


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | bytes | list | tuple | dict) and not value)


def _is_image(content: bytes) -> bool:
    return content.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*", b"MM"))


def _words(value: Any) -> Iterator[str]:
    """Yield the texts in a value, however deep."""
    if isinstance(value, str):
        parsed = parse_list(value)
        if parsed is value:
            yield value.strip()
        else:
            yield from _words(parsed)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _words(item)
    elif is_list(value):
        for item in value:
            yield from _words(item)
    elif isinstance(value, int | float):
        yield str(value)
