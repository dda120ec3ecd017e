"""The contract of a data set, and how one is loaded by a recipe."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mipha.data import dataset, datasets
from mipha.data.check.linter import check_data
from mipha.data.dataset import DataSet, data_recipe, list_datasets, load_data, load_dataset
from mipha.recipe import DataRecipe


def test_every_file_is_a_data_set_of_its_name() -> None:
    assert {"messages", "llava_instruct", "llava_pretrain", "auto"} <= set(list_datasets())
    assert not any(name.startswith("_") for name in list_datasets())
    for name in list_datasets():
        assert load_dataset(name).name == name


def test_a_data_set_reads_or_detects() -> None:
    for values in ({}, {"load": list}, {"load": list, "to_sample": str, "detect": str}):
        with pytest.raises(AssertionError, match="mine: to_sample, and load or detect"):
            DataSet("mine", **values)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data set in one file, as a newcomer writes it: two texts, the second without an answer."""
    (tmp_path / "mine.py").write_text(
        """from mipha.data.dataset import DataSet
from mipha.data.sample import Message, Sample

def load(root, split):
    return [("What?", "That."), ("Why?", None)]

def to_sample(record):
    question, answer = record
    if answer is None:
        raise ValueError(f"{question} has no answer")
    return Sample(question, (Message("user", question), Message("assistant", answer)))

DATASET = DataSet("mine", load, to_sample, left_out=lambda root, split: f"nothing of {split}")
"""
    )
    monkeypatch.setattr(dataset, "DATASETS", tmp_path)
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(tmp_path)])
    yield tmp_path
    sys.modules.pop("mipha.data.datasets.mine", None)


def test_a_data_set_is_one_file(mine: Path) -> None:
    loaded = load_data(DataRecipe(dataset="mine"))
    assert (loaded.name, len(loaded), loaded.format) == ("mine", 2, None)
    assert loaded.left_out == "nothing of train"
    assert loaded.to_sample(loaded.records[0]).messages[1].text == "That."
    assert len(load_data(DataRecipe(dataset="mine", limit=1))) == 1
    with pytest.raises(ValueError, match="image_root has no effect with the data set mine: remove"):
        load_data(DataRecipe(dataset="mine", image_root=mine))


def test_a_plain_error_of_a_data_set_is_a_malformed_row(mine: Path) -> None:
    finding, left_out = check_data(load_data(DataRecipe(dataset="mine"))).findings
    assert (finding.kind, finding.row, finding.where) == ("malformed", 1, "")
    assert finding.what == "Why? has no answer"
    assert (left_out.kind, left_out.row, left_out.what) == ("left-out", None, "nothing of train")


def test_a_detected_format_is_loaded_and_said(write: Callable) -> None:
    root = write("a", [None, None]).root
    loaded = load_data(data_recipe(str(root)))
    assert (
        loaded.format
        == f"{root} is read as messages: conversations whose turns have a role and content"
    )
    assert loaded.to_sample is load_dataset("auto").to_sample, "each record by its own format"
    assert loaded.shorten(loaded.format).startswith("a.jsonl is read as messages")


def test_a_row_is_placed_by_its_file(write: Callable, tmp_path: Path) -> None:
    loaded = load_data(write("a", ["0.png"]))
    assert loaded.place(loaded.records[0]) == "a.jsonl, line 1"
    assert loaded.place("no record of a file") == ""
    assert loaded.image_name(tmp_path / "0.png") == "0.png"
    assert loaded.image_name(b"123") == "of 3 bytes"


def test_what_a_command_means_by_data(tmp_path: Path) -> None:
    own = data_recipe("./my.jsonl", image_root=[tmp_path])
    assert (own.dataset, own.root, own.image_root) == ("auto", Path("my.jsonl"), (tmp_path,))
    named = data_recipe("llava_instruct", tmp_path, [tmp_path / "images"])
    assert (named.dataset, named.root) == ("llava_instruct", tmp_path)
    assert named.image_root == (tmp_path / "images",)
    with pytest.raises(
        ValueError, match=r"--root .* is for the name of a data set, and \./my.json"
    ):
        data_recipe("./my.jsonl", tmp_path)


def test_a_named_data_set_is_read_from_its_root(tmp_path: Path) -> None:
    rows = [
        {
            "image": "1.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "That."},
            ],
        }
    ]
    (tmp_path / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    loaded = load_data(data_recipe("llava_instruct", tmp_path))
    assert loaded.to_sample(loaded.records[0]).images == (tmp_path / "1.jpg",)


def test_settings_of_a_command_are_keys_of_the_recipe(tmp_path: Path) -> None:
    recipe = data_recipe("./x.jsonl", settings=["min_ratings.relevance=2", "split=test"])
    assert (recipe.min_ratings, recipe.split) == ({"relevance": 2}, "test")
    assert data_recipe("messages", settings=["point_scale=100"]).point_scale == "hundred"
    with pytest.raises(ValueError, match="'split' has no `=`: write key=value"):
        data_recipe("./x.jsonl", settings=["split"])
    with pytest.raises(ValueError, match="min_rating: unknown key; did you mean min_ratings"):
        data_recipe("./x.jsonl", settings=["min_rating.relevance=2"])


def test_a_key_about_reading_that_has_no_effect_is_an_error() -> None:
    with pytest.raises(ValueError, match="answer_form has no effect with the data set easy_vqa"):
        load_data(DataRecipe(dataset="easy_vqa", answer_form="text"))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"rows\.jsonl is a pipe or a device"):
        load_data(data_recipe(str(tmp_path / "rows.jsonl")))
