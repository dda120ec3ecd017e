"""Which file is of which split, by the hub's words."""

from __future__ import annotations

from pathlib import Path

import pytest

from mipha.data.datasets._splits import split_files


def _splits(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).touch()


@pytest.mark.parametrize(
    ("files", "split", "wanted"),
    [
        (["data.csv"], "train", ["data"]),
        (["train.csv", "test.csv"], "train", ["train"]),
        (["my_train_file.csv", "dev.csv", "test-file.csv", "eval1.csv"], "validation", ["dev"]),
        (
            ["my_train_file.csv", "dev.csv", "test-file.csv", "eval1.csv"],
            "test",
            ["eval1", "test-file"],
        ),
        (["training.csv", "valid.csv"], "val", ["valid"]),
        (
            ["train-00001-of-00002.csv", "train-00000-of-00002.csv"],
            "train",
            ["train-00000-of-00002", "train-00001-of-00002"],
        ),
        (["0.csv", "1.csv", "2.csv"], "train", ["0", "1", "2"]),
        (["part-0001.csv", "part-0002.csv"], "train", ["part-0001", "part-0002"]),
        (["data/train-0.csv", "data/test-0.csv"], "test", ["data/test-0"]),
        (["train/a.csv", "train/b.csv", "val/a.csv"], "train", ["train/a", "train/b"]),
        (["train/a.csv", "train/b.csv", "val/a.csv"], "dev", ["val/a"]),
        (["cats.csv", "dogs.csv"], "dogs", ["dogs"]),
        (["dev.csv", "cats.csv"], "dev", ["dev"]),
        (
            ["train.csv", ".train.csv", "_train.csv", "train.csv.txt", "other/train.csv"],
            "train",
            ["train"],
        ),
        (["retrain.csv", "train.csv"], "train", ["train"]),
        (["train.CSV"], "train", ["train"]),
    ],
)
def test_files_of_a_split(files: list[str], split: str, wanted: list[str], tmp_path: Path) -> None:
    _splits(tmp_path, *files)
    assert [name for name, _ in split_files("mine", tmp_path, split, (".csv", ".jsonl"))] == wanted


@pytest.mark.parametrize(
    ("files", "split", "sentence"),
    [
        (["cats.csv", "dogs.csv"], "train", "no split 'train': use cats or dogs"),
        (["train.csv", "val.csv"], "test", "no split 'test': use train or validation"),
        (["test.csv"], "train", "no split 'train': use test"),
        ([], "train", "use a folder that holds one"),
    ],
)
def test_a_split_that_is_not_there(
    files: list[str], split: str, sentence: str, tmp_path: Path
) -> None:
    _splits(tmp_path, *files)
    with pytest.raises(ValueError, match=sentence):
        split_files("mine", tmp_path, split, (".csv",))


def test_the_first_kind_of_file_that_is_there_counts(tmp_path: Path) -> None:
    _splits(tmp_path, "train.jsonl", "settings.json")
    assert split_files("mine", tmp_path, "train", (".csv", ".jsonl", ".json")) == [
        ("train", tmp_path / "train.jsonl")
    ]


def test_one_file_is_train(tmp_path: Path) -> None:
    _splits(tmp_path, "test.csv")
    assert split_files("mine", tmp_path / "test.csv", "train", (".csv",)) == [
        ("test", tmp_path / "test.csv")
    ]
    with pytest.raises(ValueError, match="no split 'test': use train"):
        split_files("mine", tmp_path / "test.csv", "test", (".csv",))
    with pytest.raises(FileNotFoundError, match="mine: no file or folder"):
        split_files("mine", tmp_path / "gone", "train", (".csv",))
    with pytest.raises(
        ValueError, match=r"mine has no packaged copy: set the data's root to a \.csv file"
    ):
        split_files("mine", None, "train", (".csv",))
