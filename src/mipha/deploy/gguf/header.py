"""Fields at the beginning of a GGUF file, read without other packages and without its weights.

Source: the GGUF specification: a key and a string are a length of 8 bytes and the text, and between
them stands the type of the value in 4 bytes.
"""

from __future__ import annotations

from pathlib import Path

PROCESSOR = "mipha.processor_config"
"""Our own key in an mmproj: the checkpoint's processor_config.json, as JSON."""

_MAGIC = b"GGUF"
_HEAD_BYTES = 65_536
"""Beginning of a file; the keys that are read stand before the vocabulary, which is long."""


def architecture(file: Path) -> str | None:
    """Return the architecture of a GGUF file, "clip" for a tower with its projector; else None."""
    return _text(_after(file, "general.architecture"))


def context_length(file: Path) -> int | None:
    """Return how many tokens the model of a GGUF file reads; None if its beginning does not say."""
    value = _after(file, f"{architecture(file)}.context_length")
    return value and int.from_bytes(value[:4], "little")


def processor_config(file: Path) -> str | None:
    """Return the text of the processor_config.json that an mmproj of ours holds; else None."""
    return _text(_after(file, PROCESSOR))


def _text(value: bytes | None) -> str | None:
    return value and value[8 : 8 + int.from_bytes(value[:8], "little")].decode(
        "utf-8", errors="replace"
    )


def _after(file: Path, key: str) -> bytes | None:
    """Return the bytes after a key and its type at the beginning of a GGUF file, or None."""
    with file.open("rb") as opened:
        head = opened.read(_HEAD_BYTES)
    at = head.find(key.encode())
    return head[at + len(key) + 4 :] if head.startswith(_MAGIC) and at >= 0 else None
