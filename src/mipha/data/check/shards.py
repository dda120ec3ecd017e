"""A check that is shared by many machines: each reads a part of the rows, one judges the whole.

    mipha check DATA --shard 3/8 --facts checked    the third eighth of the rows --> 3-of-8.jsonl
    mipha check DATA --facts checked                all facts, in order --> the report of one check

A file holds a line about the check, and a line of facts for each row.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mipha.data.check.findings import Finding
from mipha.data.check.images import ImageFacts
from mipha.data.check.near_images import NearHash
from mipha.data.check.rows import CheckInputs, RowFacts, TokenFacts, TurnFacts
from mipha.files import whole_file

_NAME = re.compile(r"(\d+)-of-(\d+)\.jsonl")


class Shard(NamedTuple):
    """One part of the rows.

    Args:
        number: From 1.
        of: Number of parts.
    """

    number: int
    of: int

    def rows(self, size: int) -> range:
        """Return the places of its rows in a data set of a size."""
        return range((self.number - 1) * size // self.of, self.number * size // self.of)

    def file(self, folder: Path) -> Path:
        """Return the file of its facts."""
        return folder / f"{self.number}-of-{self.of}.jsonl"


def parse_shard(text: str) -> Shard:
    """Read `3/8`, the third of eight parts.

    Raises:
        ValueError: It is not of this form, or there is no such part.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"--shard {text}: write the part and the number of parts, such as 3/8")
    return Shard(int(found[1]), int(found[2]))


def describe_check(inputs: CheckInputs) -> str:
    """Return a hash of what is checked and how, wherever the data lie."""
    recipe = inputs.data.recipe
    told = [
        inputs.data.name,
        len(inputs.data),
        recipe and recipe.model_dump(mode="json", exclude={"root", "image_root"}),
        inputs.stage and inputs.stage.model_dump(mode="json", exclude={"data"}),
        inputs.near,
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def write_facts(folder: Path, shard: Shard, check: str, facts: Iterable[RowFacts]) -> Path:
    """Write the facts of a part of the rows; the file appears when it is whole."""
    path = shard.file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial, partial.open("w", encoding="ascii") as stream:
        stream.write(json.dumps({"check": check}) + "\n")
        for row in facts:
            stream.write(json.dumps(row, default=_as_hex) + "\n")
    return path


def has_facts(folder: Path, shard: Shard, check: str) -> bool:
    """Return whether the facts of a part are there already, of the same check."""
    path = shard.file(folder)
    return path.is_file() and _check_of(path) == check


def read_facts(folder: Path, check: str) -> Iterator[RowFacts]:
    """Return the facts of all rows in order, after looking whether all parts are there.

    Raises:
        FileNotFoundError: Parts are missing; all are named.
        ValueError: Parts are of different numbers of parts, or of another check.
    """
    found = sorted(
        (Shard(*map(int, match.groups())), path)
        for path in folder.glob("*.jsonl")
        if (match := _NAME.fullmatch(path.name))
    )
    numbers = {shard.of for shard, _ in found}
    if len(numbers) > 1:
        raise ValueError(
            f"{folder} holds parts of {' and of '.join(map(str, sorted(numbers)))}: keep those of "
            "one number of parts"
        )
    (number,) = numbers or {1}
    missing = sorted(set(range(1, number + 1)) - {shard.number for shard, _ in found})
    if missing:
        named = ", ".join(f"{one}/{number}" for one in missing[:20]) if found else "all"
        raise FileNotFoundError(
            f"{folder} lacks parts ({named}): make them with `mipha check DATA --shard "
            f"{missing[0]}/{number if found else 'N'} --facts {folder}`"
        )
    if others := [path for _, path in found if _check_of(path) != check]:
        raise ValueError(
            f"{others[0]} is of another check: give the data, recipe and --against that the parts "
            "were made with, or make them again"
        )
    return (_read(line) for _, path in found for line in _lines(path))


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="ascii") as stream:
        next(stream)
        yield from stream


def _check_of(path: Path) -> Any:
    with path.open(encoding="ascii", errors="replace") as stream:
        try:
            return json.loads(stream.readline())["check"]
        except (ValueError, TypeError, KeyError):
            return None


def _as_hex(value: Any) -> Any:
    return {"hex": value.hex()} if isinstance(value, bytes) else value.item()


def _read(line: str) -> RowFacts:
    row = RowFacts(*json.loads(line, object_hook=lambda one: bytes.fromhex(one["hex"])))
    return row._replace(
        findings=tuple(Finding(*one) for one in row.findings),
        images=tuple(
            ImageFacts(
                digest,
                width,
                height,
                tuple(map(tuple, problems)),
                tuple(NearHash(*o) for o in near),
            )
            for digest, width, height, problems, near in row.images
        ),
        names=tuple(row.names),
        turns=tuple(TurnFacts(*one) for one in row.turns),
        tokens=None if row.tokens is None else TokenFacts(*row.tokens),
        unread=tuple(row.unread),
    )
