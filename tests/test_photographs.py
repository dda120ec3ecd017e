"""A folder of photographs is split by content; what cannot be split is refused in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mipha.photographs import FEWEST, PACKAGE, split_photographs, tuxpaint_photographs


def make_photographs(folder: Path, num: int) -> Path:
    """Write images of one colour each, and a caption beside each."""
    folder.mkdir(parents=True)
    for number in range(num):
        colour = np.random.default_rng(number).integers(0, 256, 3)
        Image.new("RGB", (24, 16), tuple(map(int, colour))).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"number {number}")
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_photograph_is_on_both_sides_nor_is_a_copy(tmp_path: Path) -> None:
    folder = make_photographs(tmp_path / "photos", 60)
    for number in range(60):
        for suffix in ("png", "txt"):
            shutil.copyfile(folder / f"{number}.{suffix}", folder / f"copy-{number}.{suffix}")
    split = split_photographs(folder, tmp_path / "out")

    train, test = ({row["messages"][1]["content"] for row in rows(path)} for path in split)
    assert train.isdisjoint(test) and len(train | test) == 60 and 4 <= len(test) <= 22
    assert len(rows(split.train)) == 2 * len(train) and len(rows(split.test)) == 2 * len(test)
    assert all((folder / row["images"][0]).is_file() for row in rows(split.train))


@pytest.mark.parametrize(("num", "said"), [(1, "has 1 photograph with"), (0, "has 0 photographs")])
def test_too_few_photographs_are_refused(tmp_path: Path, num: int, said: str) -> None:
    folder = make_photographs(tmp_path / "photos", num)
    with pytest.raises(ValueError, match=f"{said}.*give {FEWEST} or more"):
        split_photographs(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nothing with photographs"):
        split_photographs(tmp_path / "nothing", tmp_path / "out")


def test_captions_that_name_missing_files_are_refused(tmp_path: Path) -> None:
    folder = make_photographs(tmp_path / "photos", 30)
    table = [f"{number}.png,number {number}" for number in range(30)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *table, "gone.png,gone"]))
    with pytest.raises((ValueError, FileNotFoundError), match=r"gone\.png"):
        split_photographs(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_captions_may_stand_in_a_table_of_any_name(tmp_path: Path) -> None:
    folder = make_photographs(tmp_path / "photos", 30)
    table = [f"{number}.png,what is it?,{number}" for number in range(30)]
    (folder / "mine.csv").write_text("\n".join(["image,question,answer", *table]))
    split = split_photographs(folder, tmp_path / "out")
    assert {row["messages"][0]["content"] for row in rows(split.train)} == {"<image>\nwhat is it?"}


def test_a_package_that_cannot_be_fetched_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"this system does not have: .* --photos DIR"):
        tuxpaint_photographs(tmp_path / "cache")

    for name in ("apt-get", "dpkg"):
        (tmp_path / name).write_text(
            "#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n"
        )
        (tmp_path / name).chmod(0o755)
    with pytest.raises(ValueError, match=f"{PACKAGE} cannot be fetched .*Unable to locate"):
        tuxpaint_photographs(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))
