"""Files and folders that are written whole or not at all, checksums, and JSON read with its name.

A reader never sees a half-written file: the content goes into a hidden file beside the target, to
disk, and a rename puts it in place. `whole_folder` does the same for a folder.
"""

from __future__ import annotations

import csv
import gc
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _csv import Reader as _Reader

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file that appears whole or not at all, with a program that takes a path.

    Yields:
        A path beside the target. Its file takes the target's place when the block ends, and is
        removed where the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder that appears whole or not at all.

    Yields:
        An empty folder beside the target. It takes the target's place when the block ends, and is
        removed where the block raises.
    """
    partial = partial_name(folder)
    _refuse_held(partial)
    begin_folder(folder)
    held = _hold(partial)
    try:
        yield partial
        publish_folder(partial, folder)
    except BaseException:
        _remove(partial)
        raise
    finally:
        if held is not None:
            os.close(held)


def _hold(partial: Path) -> int | None:
    """Lock a folder for as long as the result stays open; None where there are no locks.

    Raises:
        BlockingIOError: Another process holds it.
    """
    if fcntl is None:
        return None
    held = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(held)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return held


def _refuse_held(partial: Path) -> None:
    """Refuse to empty a folder that another process fills: half of its files would be published."""
    if not partial.is_dir() or partial.is_symlink():
        return
    try:
        held = _hold(partial)
    except BlockingIOError:
        raise ValueError(
            f"{partial} is being filled by another process: wait until it has ended, or choose "
            "another -o"
        ) from None
    if held is not None:
        os.close(held)


def _remove(path: Path) -> None:
    """Remove a folder or file that may not be there; of a link, the link alone."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def begin_folder(folder: Path) -> Path:
    """Make an empty hidden folder beside the target; `publish_folder` takes it when it is full."""
    partial = partial_name(folder)
    _remove(partial)
    partial.mkdir(parents=True)
    return partial


def publish_folder(partial: Path, folder: Path) -> None:
    """Put a full folder in the target's place; a folder that was there is removed afterwards."""
    replaced = folder.with_name(f".{folder.name}.replaced")
    _remove(replaced)
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(partial, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def partial_name(folder: Path) -> Path:
    """Return where a folder is filled before it is published; a killed process leaves it behind."""
    return folder.with_name(f".{folder.name}.partial")


def describe_file(path: Path) -> dict[str, Any]:
    """Return size and checksum of a file: `bytes`, and `sha256` in hex digits."""
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def changed_files(folder: Path, recorded: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return the names of files that are missing or not what was recorded.

    Args:
        recorded: Name to the result of `describe_file`.
    """
    return [
        name
        for name, facts in recorded.items()
        if not (folder / name).is_file() or describe_file(folder / name) != facts
    ]


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line; cut off a torn last line that a killed process left.

    The line is handed to the operating system at once, so it survives the end of this process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if end := file.seek(0, os.SEEK_END):
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                lines = file.read()
                tail = lines[lines.rfind(b"\n") + 1 :]
                if _is_json(tail):
                    file.write(b"\n")
                else:
                    file.truncate(end - len(tail))
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read back what `append_line` wrote.

    A missing file has no lines, and a last line that was never finished is dropped.

    Raises:
        ValueError: Another line is no JSON object; names the file and the line.
    """
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            # Only what follows the last newline can be a line that was being written.
            if number == len(lines):
                return
            raise ValueError(_not_json_line(path, number, line)) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path} line {number} is not a JSON object ({line[:60]!r}): fix or delete that "
                "line"
            )
        yield row


def keep_lines(path: Path, last_step: int) -> None:
    """Drop the lines of steps after `last_step`: a resumed run does those steps again.

    Raises:
        ValueError: A line has no number of a step.
    """
    if path.is_file():
        kept = [row for row in read_lines(path) if step_of(row, path) <= last_step]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))


def step_of(row: dict[str, Any], path: Path) -> int:
    """Return the step of a row of metrics.

    Raises:
        ValueError: It has none.
    """
    step = row.get("step")
    if type(step) is not int:
        raise ValueError(f"{path} has a line whose step is {step!r}: fix or delete that line")
    return step


def table_reader(lines: Iterable[str], delimiter: str, strict: bool = False) -> _Reader:
    """Return a reader of separated values whose cells may be as long as a base64 image."""
    csv.field_size_limit(2**31 - 1)  # of the process; no thread may put it back while others read
    return csv.reader(lines, delimiter=delimiter, strict=strict)


def read_json(path: Path, fix: str = "copy it again") -> Any:
    """Return the content of a JSON file.

    Args:
        fix: Advice for a damaged file, for the error.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is not JSON, or not UTF-8; names the file and the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")

    # Millions of new objects, none of them garbage: the collector takes as long as the reading.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} line {error.lineno} is not valid JSON ({error.msg}): {fix}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {fix}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply: {fix}") from error
    except ValueError as error:
        raise ValueError(f"{path} holds a number of thousands of digits: {fix}") from error
    finally:
        if collecting:
            gc.enable()


def read_json_object(path: Path, fix: str = "copy it again") -> dict[str, Any]:
    """Return the content of a JSON file that holds an object.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is not JSON, or its content is not an object.
    """
    content = read_json(path, fix)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object: {fix}")
    return content


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSON-lines file with their line numbers from 1; skip empty lines.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A line is not a JSON object; names the file and the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")

    for number, row in parse_json_lines(path.read_bytes(), path):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path} line {number} is not a JSON object ({str(row)[:60]!r}): fix that line"
            )
        yield number, row


def parse_json_lines(content: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    """Parse JSON lines: each value with its line number from 1; skips empty lines.

    Args:
        content: Content of the file.
        path: Path of the file, for messages.

    Raises:
        ValueError: A line is not JSON; names the file and the line.
    """
    # Split at newlines only: a JSON string may hold other characters that end a line elsewhere.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(_not_json_line(path, number, line)) from error
        yield number, value


def _not_json_line(path: Path, number: int, line: bytes) -> str:
    return f"{path} line {number} is not valid JSON ({line[:60]!r}): fix or delete that line"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def cache_folder() -> Path:
    """Return the folder of what can be made or fetched again: `$MIPHA_CACHE`, ~/.cache/mipha."""
    return Path(os.environ.get("MIPHA_CACHE") or Path.home() / ".cache" / "mipha").expanduser()
