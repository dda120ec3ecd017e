"""Processes of this program: one holds a folder at a time, and a child ends with its parent."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mipha.terminal import echo

try:
    import fcntl
except ModuleNotFoundError:  # Windows; there is no lock then, which `hold_folder` says
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""File in a folder that is locked while a process works in it. It names that process."""

PATIENCE = 3.0
"""Seconds to wait for a lock: a process that is ending holds it a little longer."""

GRACE = 60.0
"""Seconds that an orphan has to finish its step and save it."""

_PARENT = "MIPHA_PARENT"
_LOOK_EVERY = 0.5

_held: set[int] = set()
"""Open lock files. A forked child closes them: a lock is to end with the process that took it."""


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep a folder to this process for as long as the context lasts.

    The system drops the lock when the process ends, however it ends.

    Raises:
        ValueError: Another process works in the folder; names it.
    """
    path, owner, is_new = folder / LOCK, os.getpid(), not folder.exists()
    file = _lock(path)
    try:
        yield
    finally:
        if file is not None and os.getpid() == owner:
            path.unlink(missing_ok=True)
            _held.discard(file)
            os.close(file)
            if is_new:
                with suppress(OSError):  # it holds more than the lock
                    folder.rmdir()


def _lock(path: Path) -> int | None:
    """Lock a file, made where it is missing; None where system or file system has no locks."""
    if fcntl is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _say_unlocked(path.parent, "this system has no flock")
        return None

    deadline = time.monotonic() + PATIENCE
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_lock(path)

        # Take the lock, or wait a little for the process that has it.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _describe(os.pread(file, 4096, 0))
            os.close(file)
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{path.parent} is in use by another process ({holder}): wait until it has "
                    "ended, stop it, or choose another -o"
                ) from None
            time.sleep(0.1)
            continue
        except OSError as error:
            os.close(file)
            _say_unlocked(path.parent, error.strerror)
            return None

        # The process before removed its file: the lock must be on the one that is there now.
        with suppress(FileNotFoundError):
            if os.fstat(file).st_ino == path.stat().st_ino:
                _held.add(file)
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(_this_process()).encode() + b"\n", 0)
                return file
        os.close(file)


def _open_lock(path: Path) -> int:
    """Open a lock file, made where it is missing; in a stranger's folder it may be a link."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    else:
        if stat.S_ISREG(os.fstat(file).st_mode):
            return file
        os.close(file)
    raise ValueError(f"{path} is no plain file, which the lock of the folder must be: remove it")


def _say_unlocked(folder: Path, reason: str) -> None:
    echo(f"mipha: {folder} cannot be locked ({reason}): start no second process in it", err=True)


def _this_process() -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _describe(content: bytes) -> str:
    """Return who wrote a lock file, as a clause."""
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "it has only just begun"


def _close_held() -> None:
    """Close the lock files in a forked child; the parent keeps its locks."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held)


def child_environment() -> dict[str, str]:
    """Return the variables with which a child of ours ends when this process does."""
    return {_PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Let this process end with the one that started it, where that asked for it.

    An orphan is told to stop as by SIGTERM, so a training saves its state first.
    """
    if parent := os.environ.pop(_PARENT, None):
        end_with(int(parent))


def end_with(parent: int) -> None:
    """Let this process end, as `end_with_parent`, when that one is no longer its parent."""
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
