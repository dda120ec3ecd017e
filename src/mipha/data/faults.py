"""Faults of one record: the kind, the place, what is wrong and how to fix it."""

from __future__ import annotations

from typing import Literal

FaultKind = Literal[
    "malformed",
    "role-order",
    "loss-mark",
    "unclear-choice",
    "image-count",
    "outside-path",
    "missing-image",
    "null-image",
    "unreadable-image",
    "region-count",
    "region-scale",
    "region-outside",
    "region-empty",
    "lone-surrogate",
    "empty-answer",
    "no-preference",
    "nothing-trained",
    "too-many-images",
]
"""What can be wrong with a record; `check/findings.py` describes each of them."""


class RecordError(ValueError):
    """One record of a data set is at fault; the others can be read.

    The linter reads the parts; a user reads `str()`, which joins them into one sentence.

    Args:
        what: What is wrong, without the place and without advice.
        fix: What the user should do.
        where: File and line (or row, or sample) of the record, as `Row.where` gives it.
        kind: Kind of the fault; "malformed" where no other fits.
    """

    def __init__(
        self, what: str, fix: str = "", where: str = "", kind: FaultKind = "malformed"
    ) -> None:
        super().__init__(what, fix, where, kind)  # pickled with these
        self.what, self.fix, self.where = what, fix, where
        self.kind: FaultKind = kind

    def __str__(self) -> str:
        return (
            (f"{self.where}: " if self.where else "")
            + self.what
            + (f"; {self.fix}" if self.fix else "")
        )

    def at(self, where: str) -> RecordError:
        """Return the same fault at another place."""
        return RecordError(self.what, self.fix, where, self.kind)
