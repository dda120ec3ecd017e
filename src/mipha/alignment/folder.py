"""The folder of one alignment step, and what of it survives a kill.

runs/sft/recipe.yaml      what was asked, every default written out; marks the folder
         provenance.json  what it was made with, from which weights and data
         metrics.jsonl    one line an optimizer step, one a validation
         loss.png         the same as a picture
         checkpoints/     training states to resume from; gone when the step is finished
         adapter/         with LoRA: the adapter in PEFT's format
         model/           the result; there, and whole, when the step is finished
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mipha.alignment.recipe import StepRecipe, load_alignment_recipe
from mipha.files import read_lines, write_whole
from mipha.run import provenance

_MARK = "complete.json"


def open_folder(folder: Path, recipe: StepRecipe) -> None:
    """A new folder for a step, or the existing one of the same recipe.

    Raises:
        ValueError: The folder holds another recipe's step, or other files; nothing in it is touched.
    """
    known = folder / "recipe.yaml"
    if known.is_file():
        there = load_alignment_recipe(known)
        if there.digest() != recipe.digest():
            keys = ", ".join(there.differences(recipe))
            raise ValueError(
                f"{folder} holds a step of another recipe (it differs in {keys}): choose another -o, or use the old recipe"
            )
    elif folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder: choose another -o")
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty and not an alignment step: choose another -o, or empty the folder"
        )
    else:
        write_whole(known, recipe.dump())
    if not (folder / "provenance.json").is_file():
        write_whole(folder / "provenance.json", json.dumps(provenance(), indent=2) + "\n")


def is_finished(folder: Path) -> bool:
    """Whether the step's result is there; it appears when everything is in it."""
    return (folder / "model" / "config.json").is_file()


def record(folder: Path, key: str, facts: dict[str, Any]) -> None:
    """Write into provenance.json what the step is trained from.

    Raises:
        ValueError: Training began with something else: its states are for another base, or other data.
    """
    path = folder / "provenance.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    before = content.get(key)
    if before not in (None, facts) and (folder / "checkpoints").is_dir():
        raise ValueError(
            f"the {key} changed since {folder} began (then {before}, now {facts}), and its training states are of no use for another: "
            "put the old one back, or choose another -o"
        )
    content[key] = facts
    write_whole(path, json.dumps(content, indent=2) + "\n")


def mark_complete(checkpoint: Path) -> None:
    """Say of a training state that it is whole: the last file written into it, with the sizes of all others."""
    sizes = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    write_whole(checkpoint / _MARK, json.dumps(sizes, indent=2) + "\n")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest training state that is whole; those that are not are removed.

    The host's trainer writes its files in place, takes the newest folder whatever is in it, and starts its optimizer anew, without a
    word, where that file is missing.
    """
    states = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [state for state in states if _is_whole(state)]
    for state in set(states) - set(whole):
        shutil.rmtree(state)
    return whole[-1] if whole else None


def forget_after(metrics_jsonl: Path, step: int) -> None:
    """Drop the lines of steps that will be done again."""
    if metrics_jsonl.is_file():
        kept = [row for row in read_lines(metrics_jsonl) if row["step"] <= step]
        write_whole(metrics_jsonl, "".join(json.dumps(row) + "\n" for row in kept))


def _is_whole(checkpoint: Path) -> bool:
    if not (checkpoint / _MARK).is_file():
        return False
    sizes = json.loads((checkpoint / _MARK).read_text(encoding="utf-8"))
    return all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size
        for name, size in sizes.items()
    )
