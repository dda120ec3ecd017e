"""Multimodal small language models: build, train, evaluate, ask. The public names are loaded on first use."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "load_recipe": "mipha.recipe",
    "Recipe": "mipha.recipe",
    "train": "mipha.training.pipeline",
    "evaluate": "mipha.evaluation.evaluate",
    "compare": "mipha.comparison.tables",
    "load_study": "mipha.studies.study",
    "run_study": "mipha.studies.runner",
    "load": "mipha.assistant",
    "Assistant": "mipha.assistant",
    "Answer": "mipha.assistant",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mipha' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
