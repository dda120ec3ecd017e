"""Published configs of the catalog's parts: the architecture of a full-size model.

`catalog/configs/NAME.json` holds the keys of the published `config.json` that decide the
architecture; `configs/README.md` names their sources.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mipha.lookup import did_you_mean, files_in

CONFIGS = Path(__file__).parent / "configs"


def part_config(name: str) -> dict[str, Any]:
    """Return the architecture of a vision tower or a language model of the catalog.

    Args:
        name: Catalog name.

    Returns:
        `model_type` and the keys of that type's config.

    Raises:
        ValueError: No part of this name in the catalog.
    """
    path = CONFIGS / f"{name}.json"
    if not path.is_file():
        raise ValueError(
            f"no config of a part {name!r}: {did_you_mean(name, files_in(CONFIGS, '.json'))}"
        )
    return json.loads(path.read_text(encoding="utf-8"))
