"""Photographs for `mipha quickstart --photos`: a folder split by content, and one to try it with.

split_photographs(DIR, OUT)   DIR -> OUT/train.jsonl, OUT/test.jsonl
tuxpaint_photographs(CACHE)   a Debian package -> CACHE/tuxpaint, photographs of eight kinds
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from mipha.files import whole_folder, write_whole

TEST_SHARE = 0.2
"""Share of the photographs that are kept for the questions."""

FEWEST = 20
"""Photographs; of fewer, hardly one is left to ask about."""

KINDS = ("animals", "clothes", "food", "household", "plants", "space", "town", "vehicles")
"""Folders of the package with photographs of one kind each."""

TUXPAINT = "tuxpaint"
PACKAGE = "tuxpaint-stamps-default"


class Split(NamedTuple):
    """Samples to train on and to ask about.

    Args:
        train: File for training; images are named from the photographs' folder.
        test: File with the questions, about other photographs.
    """

    train: Path
    test: Path


def split_photographs(folder: Path, out: Path) -> Split:
    """Write the samples of a folder as two files; no photograph is in both, nor a copy of one.

    Args:
        folder: Images with captions beside them, or with a table of captions: metadata.jsonl, or
            one .csv of any name.
        out: Folder of the files.

    Raises:
        FileNotFoundError: There is no such folder, or an image of it is missing.
        ValueError: It holds no images, too few, or what is not readable.
    """
    from mipha.data.dataset import load_data
    from mipha.data.datasets.image_folder import metadata_of
    from mipha.data.held_out import side_of
    from mipha.recipe import DataRecipe

    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} with photographs: check the path")
    tables = [path for path in folder.iterdir() if path.suffix == ".csv"]
    if len(tables) == 1 and not metadata_of(folder):
        data = load_data(DataRecipe(dataset="auto", root=tables[0]))
    else:
        data = load_data(DataRecipe(dataset="image_folder", root=folder))

    sides: dict[str, list[str]] = {"train": [], "validation": []}
    images = set()
    for record in data.records:
        sample = data.to_sample(record)
        paths = [_relative(image, folder) for image in sample.images]
        images.update(paths)
        row = {
            "id": sample.id,
            "images": paths,
            "messages": [{"role": m.role, "content": m.text} for m in sample.messages],
        }
        if side := side_of(sample, TEST_SHARE):
            sides[side].append(json.dumps(row, ensure_ascii=False) + "\n")

    if len(images) < FEWEST or not sides["validation"]:
        raise ValueError(
            f"{folder} has {len(images)} photograph{'s' * (len(images) != 1)} with a text: give "
            f"{FEWEST} or more, because a fifth of them is kept for the questions"
        )
    out.mkdir(parents=True, exist_ok=True)
    split = Split(out / "train.jsonl", out / "test.jsonl")
    write_whole(split.train, "".join(sides["train"]))
    write_whole(split.test, "".join(sides["validation"]))
    return split


def _relative(image: object, folder: Path) -> str:
    if not isinstance(image, Path):
        raise ValueError(f"{folder} holds images inside other files: give a folder of image files")
    return image.resolve().relative_to(folder.resolve()).as_posix()


def tuxpaint_photographs(cache: Path) -> Path:
    """Fetch the photographs of a Debian package, and write what each shows into metadata.csv.

    Two questions a photograph: what it shows, answered by the package's caption, and of which kind
    it is, answered by its folder. Drawings are left out.

    Returns:
        The folder, made once.

    Raises:
        ValueError: This system has no apt, or apt has no such package.
    """
    folder = cache / TUXPAINT
    if folder.is_dir():
        return folder
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise ValueError(
            "the photographs of tuxpaint are fetched with apt-get, which this system does not "
            "have: give a folder of your own, --photos DIR"
        )

    with whole_folder(folder) as partial:
        _run(["apt-get", "download", PACKAGE], partial)
        [package] = partial.glob("*.deb")
        _run(["dpkg", "-x", package.name, "all"], partial)

        # Keep the photographs, and the first line of each caption file, which is English.
        stamps = partial / "all/usr/share/tuxpaint/stamps"
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["file_name", "question", "answer"])
        for image in sorted(stamps.rglob("*.png")):
            kind = image.relative_to(stamps).parts[0]
            caption = image.with_suffix(".txt")
            if kind not in KINDS or "cartoon" in image.parts or not caption.is_file():
                continue
            name = "-".join(image.relative_to(stamps).parts)
            shutil.copyfile(image, partial / name)
            said = caption.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip()
            writer.writerow([name, "what is it?", said])
            writer.writerow([name, "what kind of thing is it?", kind])
        write_whole(partial / "metadata.csv", table.getvalue())
        shutil.rmtree(partial / "all")
        package.unlink()
    return folder


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(
            f"{PACKAGE} cannot be fetched ({reason}): run `apt-get update`, or give a folder of "
            "your own, --photos DIR"
        )
