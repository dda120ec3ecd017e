"""A cleaned copy of a data file: unusable rows left out, damaged text repaired.

Nothing is changed in place, and images are not copied: the copy names the same files.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mipha.data.check.findings import KINDS, Finding
from mipha.data.check.linter import CheckResult
from mipha.data.check.text import fix_text
from mipha.data.datasets._records import JsonRecords, Rows
from mipha.data.sample import IMAGE, Sample
from mipha.files import write_whole


class RowFix(NamedTuple):
    """What was done to one row.

    Args:
        row: Place in the data set, from 0.
        where: The row as its file counts.
        action: `left out` or `mended`.
        why: The finding, in a sentence.
    """

    row: int
    where: str
    action: str
    why: str


class Fixed(NamedTuple):
    """A cleaned copy.

    Args:
        file: The copy.
        list_file: What was changed, a line a row.
        num_kept: Rows in the copy.
        changes: Changes of rows that were left out or repaired, in their order.
        note: What to do so that the images are found; None where the copy lies beside the data.
    """

    file: Path
    list_file: Path
    num_kept: int
    changes: tuple[RowFix, ...]
    note: str | None


def write_fixed(result: CheckResult, out: Path) -> Fixed:
    """Write a cleaned copy, and `OUT.changes.txt` beside it.

    Rows with an error, rows that repeat an earlier one and rows that leak are left out;
    `findings.KINDS` says which. Texts are repaired: wrongly read encodings, half, control and
    invisible characters, and markers of images that have none. Rows with other findings stay as
    they are.

    Args:
        result: Result of checking one file of JSON lines, or of one JSON list.
        out: A new file of the same kind; overwritten, unless it is the data itself.

    Raises:
        ValueError: The data are of another kind or in several files, or `out` is the data, or has
            another suffix.
    """
    records = _json_file(result)
    if out.suffix.lower() != records.file.suffix.lower():
        raise ValueError(
            f"--fix {out}: a cleaned copy of {records.file.name} is of the same kind: "
            f"give a name that ends in {records.file.suffix}"
        )
    if out.exists() and out.samefile(records.file):
        raise ValueError(
            f"--fix {out} is the data itself, which is never changed: give another name"
        )

    # Choose the rows of the copy.
    changes: list[RowFix] = []
    kept = list(_kept(result, records, changes))
    content = (
        b"[\n" + b",\n".join(kept) + b"\n]\n"
        if records.is_list
        else b"".join(line + b"\n" for line in kept)
    )

    # Write the list of changes, then the copy.
    list_file = out.with_name(out.name + ".changes.txt")
    write_whole(
        list_file, "".join(f"{change.where}: {change.action}: {change.why}\n" for change in changes)
    )
    write_whole(out, content)

    folder = records.file.parent.resolve()
    note = None
    if out.resolve().parent != folder:
        note = (
            f"its images are looked for beside the data, so set the data's image_root to {folder}"
        )
    return Fixed(out, list_file, len(kept), tuple(changes), note)


def is_fixable(result: CheckResult) -> bool:
    """Return whether `write_fixed` can write a copy of the data: one JSON file."""
    try:
        _json_file(result)
    except ValueError:
        return False
    return True


def _json_file(result: CheckResult) -> JsonRecords:
    rows = result.data.records
    files = [part.file for part in rows.parts] if isinstance(rows, Rows) else []
    if len(files) > 1:
        raise ValueError(
            f"{result.data.name} is made of {len(files)} files: check and fix them one by one"
        )
    if not files or not isinstance(files[0], JsonRecords):
        raise ValueError(
            f"{result.data.name} cannot be fixed: only JSON and JSON lines are written; "
            "fix it by the list of findings"
        )
    return files[0]


def _kept(result: CheckResult, records: JsonRecords, changes: list[RowFix]) -> Iterator[bytes]:
    """Yield the rows of the copy; a line that does not change keeps its very bytes."""
    lines = (
        []
        if records.is_list
        else records.file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    )
    found: dict[int, list[Finding]] = defaultdict(list)
    for finding in result.findings:
        if finding.row is not None and KINDS[finding.kind].action != "keep":
            found[finding.row].append(finding)
    for row in range(len(result.data)):
        why = found.get(row, [])
        where = result.data.shorten(records.where(row))
        if drop := [finding for finding in why if KINDS[finding.kind].action == "drop"]:
            changes.append(RowFix(row, where, "left out", drop[0].sentence))
        elif why:
            record = result.data.records[row]
            sample = result.data.to_sample(record)
            content = _repaired(record.content, _image_texts(sample))
            if any(finding.kind == "added-marker" for finding in why):
                content = _marked(content, len(sample.images))
            changes += [RowFix(row, where, "mended", finding.what) for finding in why]
            yield _as_json(content)
        else:
            yield (
                _as_json(result.data.records[row].content)
                if records.is_list
                else lines[int(records.name(row)) - 1].rstrip(b"\r")
            )


def _repaired(value: Any, kept: frozenset[str]) -> Any:
    """Return a record whose texts are repaired, all but the paths of its images."""
    if isinstance(value, dict):
        return {key: _repaired(item, kept) for key, item in value.items()}
    if isinstance(value, list):
        return [_repaired(item, kept) for item in value]
    return (
        fix_text(value)
        if isinstance(value, str) and not any(path.endswith(value) for path in kept)
        else value
    )


def _marked(content: Any, num_images: int) -> Any:
    """Return LLaVA's record with the markers of its images in front of the first human turn."""
    turns = list(content["conversations"])
    first = next(number for number, turn in enumerate(turns) if turn["from"] == "human")
    turns[first] = turns[first] | {"value": f"{IMAGE}\n" * num_images + turns[first]["value"]}
    return content | {"conversations": turns}


def _image_texts(sample: Sample) -> frozenset[str]:
    return frozenset(str(image) for image in sample.images if not isinstance(image, bytes))


def _as_json(content: Any) -> bytes:
    try:
        return json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half characters in what is no text, such as a path
        return json.dumps(content).encode()
