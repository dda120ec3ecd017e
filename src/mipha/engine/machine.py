"""The machine that trains: its disk, its memory, its peak of computation, and what it reaches."""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mipha.catalog.devices import device_reported_as
from mipha.world import World, processes_of_machine

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None  # type: ignore[assignment]


def check_free_space(folder: Path, need: int) -> None:
    """Refuse a disk that is too small.

    Args:
        need: Bytes that the folder will hold; an interrupted stage has written a part of them.

    Raises:
        OSError: The disk of the folder has less than the rest free.
    """
    free = shutil.disk_usage(folder).free
    rest = need - sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if free < rest:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB free, but this stage writes up to "
            f"{rest / 1e9:.1f} GB: free some, or choose another -o"
        )


def main_memory() -> float:
    """Return the main memory of this machine, bytes."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def device_memory(world: World) -> float:
    """Return the memory that this process may use, bytes: its GPU's, or its share of the machine's.

    Of a GPU in the catalog it is the size printed there, as in plans; a driver may show more.
    """
    if world.device.type != "cuda":
        return main_memory() / processes_of_machine(world)
    entry = device_reported_as(torch.cuda.get_device_name(world.device))
    shown = float(torch.cuda.get_device_properties(world.device).total_memory)
    return min(shown, entry.memory_gb * 1e9) if entry else shown


def peak_memory_gib() -> float:
    """Return the most memory that this process has held: on its GPU, else resident.

    0 where the system does not count it, as Windows.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def return_freed_memory() -> None:
    """Return freed memory to the system.

    Rows of ever new lengths leave holes that glibc keeps: gigabytes over an hour.
    """
    with suppress(OSError, AttributeError):  # another C library has nothing to trim
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_flops(world: World, autocast: torch.dtype | None) -> float | None:
    """Return what all processes together could compute by their makers' sheets, in FLOP/s.

    Args:
        autocast: Type that matrix products run in; None for float32.

    Returns:
        None where the catalog does not know the device.
    """
    if world.device.type != "cuda":
        return None
    entry = device_reported_as(torch.cuda.get_device_name(world.device))
    dtype = "bfloat16" if autocast is torch.bfloat16 else "float32"
    tflops = entry.tflops(dtype) if entry else None
    return tflops * 1e12 * world.size if tflops else None


def measure_flops(dtype: torch.dtype) -> float:
    """Return what this CPU reaches in matrix products, FLOP/s, on the threads that torch uses."""
    left, right = torch.ones(1024, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
    return 2 * 1024 * 2048 * 2048 / median_seconds(lambda: left @ right, 5)


def measure_reading() -> float:
    """Return what this CPU reads from memory, bytes a second, on the threads that torch uses."""
    array = torch.ones(2**27)  # 512 MiB
    return array.nbytes / median_seconds(array.amax)


def median_seconds(call: Callable[[], Any], repeats: int = 3) -> float:
    """Return the median seconds of a call, after one that does not count."""
    call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
