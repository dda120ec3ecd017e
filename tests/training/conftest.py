"""What the tests of training share: reading back what a run left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], dict[str, Tensor]]:
    """`weights(checkpoint)`: its tensors by name."""
    return lambda checkpoint: load_file(checkpoint / "model.safetensors")


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], list[dict]]:
    """`metrics(path)`: the lines of a metrics file; none when there is none."""
    return lambda path: (
        [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    )
