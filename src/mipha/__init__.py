"""Multimodal small language models: build, train, evaluate, ask.

The public names are loaded on first use, so that importing the package is instant.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# The OpenMP threads of torch's wheels (libgomp) spin for 15 ms before they sleep. Beside other work
# they spin while the thread that they wait for has no core, and training takes ten times as long:
# LOG.md, 2026-11-30. This must be set before torch is imported; a setting of the user's stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# oneDNN keeps the programs of its last 1,024 products, one for each shape. Rows have ever new
# lengths, so that was a gigabyte after 70 steps; 64 are more than a step has in its layers.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

if TYPE_CHECKING:
    from mipha.api import evaluate, run_study, train
    from mipha.assistant import Answer, Assistant, load
    from mipha.comparison.tables import compare
    from mipha.recipe import Recipe, load_recipe
    from mipha.studies.study import Study, load_study

_HOME = {
    "load_recipe": "mipha.recipe",
    "Recipe": "mipha.recipe",
    "train": "mipha.api",
    "evaluate": "mipha.api",
    "compare": "mipha.comparison.tables",
    "load_study": "mipha.studies.study",
    "Study": "mipha.studies.study",
    "run_study": "mipha.api",
    "load": "mipha.assistant",
    "Assistant": "mipha.assistant",
    "Answer": "mipha.assistant",
}

__all__ = [
    "Answer",
    "Assistant",
    "Recipe",
    "Study",
    "compare",
    "evaluate",
    "load",
    "load_recipe",
    "load_study",
    "run_study",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mipha' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
