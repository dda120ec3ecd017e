"""Many rows on several cores, in their order."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from mipha.data.check.rows import Job, RowFacts, row_checker

CHUNK = 64
"""Rows handed to a process at a time."""

WORTH_A_POOL = 1_000
"""Rows: below, starting processes takes longer than it saves."""


def check_rows(job: Job, rows: Sequence[int], workers: int) -> Iterator[list[RowFacts]]:
    """Facts of rows in their order, a chunk at a time.

    Args:
        rows: Which.
        workers: Processes; 1 works in this one. They are forked, so that the rows need not be read again; where the system
            cannot do so safely, this process works alone.

    Raises:
        OSError: A process was killed, by a decoder's crash or for want of memory.
    """
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    if workers == 1 or len(rows) < WORTH_A_POOL or sys.platform != "linux":
        check = row_checker(job)
        yield from ([check(row) for row in chunk] for chunk in chunks)
        return
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), _begin_worker, (job,)
    ) as pool:
        done = 0
        try:
            for facts in pool.map(_check_chunk, chunks):
                done += 1
                yield facts
        except BrokenProcessPool as error:
            span = f"{chunks[done][0]} to {chunks[min(done + workers, len(chunks)) - 1][-1]}"
            raise OSError(
                f"a process that checked rows {span} of {job.source.name} was killed: look at the images of those rows, or free memory"
            ) from error


_check: Callable[[int], RowFacts]


def _begin_worker(job: Job) -> None:
    global _check
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the process that gives out the rows
    _check = row_checker(job)


def _check_chunk(rows: Sequence[int]) -> list[RowFacts]:
    return [_check(row) for row in rows]
