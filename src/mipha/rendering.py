"""Write a conversation with a chat template, within bounds of time and memory.

A template is a stranger's program. jinja2's sandbox keeps it from everything but its input, and
`bounded` from computing for ever and from filling the memory.
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]

TEMPLATE_SECONDS = 10.0
"""Longest time to write a conversation; it takes milliseconds."""

TEMPLATE_GIB = 2.0
"""Most memory to write a conversation, in GiB; it takes kilobytes."""

MOST_CHARACTERS = 2**24
"""Longest conversation that is given to a tokenizer, in characters."""

_PARTS = re.compile(r"""\[\{['"]type['"]: """)

_LONGEST_SHOWN = 40
"""Characters of words that an error shows."""

FAILURES = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError)
FAILURES += (AttributeError, RuntimeError)
"""What a template that does not take a conversation raises."""


class ConversationRefused(ValueError):
    """A chat template fails on a conversation, or does not write it.

    Args:
        message: Sentence for who chooses the template.
        reason: What the template says, or leaves out.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class _TookTooLong(BaseException):
    """Raised in the thread that renders a template. Not an Exception, so nothing handles it."""


@contextmanager
def bounded(template: str, source: object) -> Iterator[None]:
    """Bound the time and the memory in which this thread renders a chat template.

    Args:
        template: The template.
        source: File or name of it, for messages.

    Raises:
        ValueError: It takes longer than `TEMPLATE_SECONDS` or more than `TEMPLATE_GIB`, or holds
            the power operator, whose huge numbers nothing can interrupt.
    """
    if _holds_power(template):
        raise ValueError(
            f"{source} holds the operator **, which may compute for ever: give a template without"
        )

    renderer, ended, lock = threading.get_ident(), False, threading.Lock()

    def stop() -> None:
        with lock:
            if not ended:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(renderer), ctypes.py_object(_TookTooLong)
                )

    timer = threading.Timer(TEMPLATE_SECONDS, stop)
    timer.daemon = True
    with _MEMORY.bounded():
        timer.start()
        try:
            yield
        except _TookTooLong:
            raise ValueError(
                f"{source} takes longer than {TEMPLATE_SECONDS:g} seconds to write a conversation: "
                "give a template that ends"
            ) from None
        except MemoryError:
            raise ValueError(
                f"{source} takes more than {TEMPLATE_GIB:g} GiB to write a conversation: "
                "give a template that writes less"
            ) from None
        finally:
            with lock:
                ended = True
            timer.cancel()


class _Memory:
    """The limit on the memory of this process while threads of it render templates.

    A limit on addresses is the only one that stops a single product such as `'a' * 10000000000`. It
    is one of the whole process, so it holds from the first thread that renders to the last, which
    is milliseconds. Only Linux tells what a process has; elsewhere there is no limit, nor where
    CUDA runs, whose driver takes addresses by the terabyte.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rendering = 0
        self._usual = (-1, -1)

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Let the process grow by `TEMPLATE_GIB` at most within the context."""
        if not _STATM.exists() or _uses_cuda():
            yield
            return

        with self._lock:
            self._rendering += 1
            if self._rendering == 1:
                self._usual = resource.getrlimit(resource.RLIMIT_AS)
                pages = int(_STATM.read_text(encoding="ascii").split()[0])
                most = pages * resource.getpagesize() + int(TEMPLATE_GIB * 2**30)
                set_before = [each for each in self._usual if each != resource.RLIM_INFINITY]
                resource.setrlimit(resource.RLIMIT_AS, (min([most, *set_before]), self._usual[1]))
        try:
            yield
        finally:
            with self._lock:
                self._rendering -= 1
                if self._rendering == 0:
                    resource.setrlimit(resource.RLIMIT_AS, self._usual)


def _uses_cuda() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


_STATM = Path("/proc/self/statm")
_MEMORY = _Memory()


def write_chat(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    template: str,
    source: object,
    prompt: bool = False,
) -> str:
    """Return what a chat template writes for a conversation.

    Args:
        tokenizer: Tokenizer whose special tokens the template may name.
        messages: Roles and contents.
        template: The template.
        source: File or name of it, for messages.
        prompt: Write how an answer begins, behind the last message.

    Raises:
        ConversationRefused: The template fails, or leaves words of the system or the user out.
        ValueError: It passes a bound of `bounded`, writes more than `MOST_CHARACTERS`, or a message
            holds half of a character.
    """
    with bounded(template, source):
        try:
            text = tokenizer.apply_chat_template(
                list(messages),
                chat_template=template,
                add_generation_prompt=prompt,
                tokenize=False,
            )
        except FAILURES as error:
            raise ConversationRefused(
                f"{source} cannot write a conversation: give a working template ({_reason(error)})",
                _reason(error),
            ) from error
    check_length(text, source)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a message holds half of a character ({text[error.start]!r}), as text that is not "
            "UTF-8 does: write it again"
        ) from error

    # Templates leave the thinking of earlier answers out, as they were trained.
    asked = [message for message in messages if message["role"] != "assistant"]
    if lost := lost_words(asked, text):
        raise ConversationRefused(
            f"{source} {lost}: give another template, or leave that out", lost
        )
    return text


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text that a chat template has written.

    Raises:
        ValueError: A pattern of the tokenizer gives up on the text.
    """
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ValueError(
            f"the tokenizer cannot split a text of {len(text):,} characters ({_reason(error)}): "
            "give a tokenizer.json with simpler patterns"
        ) from error
    return ids


def is_panic(error: BaseException) -> bool:
    """Return whether the Rust code of a package gave up; such an error is no Exception."""
    return type(error).__name__ == "PanicException"


def lost_words(messages: Sequence[dict[str, Any]], text: str) -> str | None:
    """Return what a text lacks of the conversation that it is made of; None if nothing.

    White space does not count, and the system's words may stand anywhere. Words inside a list of
    parts are lost too: a template that is made for text writes such lists.

    Args:
        messages: Roles and contents, each a text or a list of parts.
        text: What a chat template wrote.
    """
    has_parts = any(not isinstance(message["content"], str) for message in messages)
    if has_parts and _PARTS.search(text) and not _PARTS.search(str(_words(messages))):
        return "writes the parts of a message as a list, and not their words"
    return _lost(messages, text, str.strip) and _lost(messages, text, _without_spaces)


def _lost(messages: Sequence[dict[str, Any]], text: str, form: Callable[[str], str]) -> str | None:
    """Return the first words that are not in a text, both in a form; the users' stand in order."""
    written, place = form(text), 0
    for message in messages:
        for words in _words([message]):
            bare = form(words)
            found = written.find(bare, 0 if message["role"] == "system" else place)
            if found < 0:
                shown = words if len(words) <= _LONGEST_SHOWN else words[:_LONGEST_SHOWN] + " ..."
                return f"does not write {shown!r} of the {message['role']}"
            if message["role"] != "system":
                place = found + len(bare)
    return None


def _words(messages: Sequence[dict[str, Any]]) -> list[str]:
    contents = [message["content"] for message in messages]
    listed = [[{"text": one}] if isinstance(one, str) else one for one in contents]
    return [part["text"] for parts in listed for part in parts if part.get("text")]


def _without_spaces(text: str) -> str:
    return "".join(text.split())


def check_length(text: str, source: object) -> None:
    """Refuse a conversation that no tokenizer should be given.

    Raises:
        ValueError: It has more than `MOST_CHARACTERS`.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"{source} writes a conversation of {len(text):,} characters, and at most "
            f"{MOST_CHARACTERS:,} are read: give a template that writes less"
        )


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@lru_cache(8)
def _holds_power(template: str) -> bool:
    try:
        return any(
            (kind, value) == ("operator", "**") for _, kind, value in Environment().lex(template)
        )
    except TemplateError:  # rendering says what is wrong
        return False
