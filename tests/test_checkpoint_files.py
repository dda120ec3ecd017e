"""The files of a checkpoint: whole or not, headers read without torch, pickles and code refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mipha.checkpoint_files import (
    INDEX,
    count_image_tokens,
    is_whole,
    read_headers,
    refuse_code,
    weight_files,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config and two shards of one tensor each."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": np.zeros((2, 3), np.float32)}, tmp_path / "one.safetensors")
    save_file({"b": np.zeros(4, np.float16)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    return tmp_path


def test_headers_of_all_shards(folder: Path) -> None:
    tensors = read_headers(folder)
    assert {name: (tensor.shape, tensor.code) for name, tensor in tensors.items()} == {
        "a": ((2, 3), "F32"),
        "b": ((4,), "F16"),
    }
    assert tensors["b"].file == folder / "two.safetensors"


def test_a_folder_is_whole_with_its_config_and_every_shard(folder: Path) -> None:
    assert is_whole(folder)
    (folder / "two.safetensors").unlink()
    assert not is_whole(folder)
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 2 shards, such as two\.safetensors"):
        weight_files(folder)
    (folder / INDEX).unlink()
    assert not is_whole(folder)
    (folder / "one.safetensors").rename(folder / "model.safetensors")
    assert is_whole(folder)
    assert weight_files(folder) == [folder / "model.safetensors"]
    (folder / "config.json").unlink()
    assert not is_whole(folder)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": {"a": "../x"}}])
def test_an_index_names_files_beside_it(folder: Path, content: dict) -> None:
    (folder / INDEX).write_text(json.dumps(content))
    for look in (is_whole, weight_files):
        with pytest.raises(ValueError, match="does not name the shards beside it"):
            look(folder)


def test_a_tensor_that_no_shard_holds_is_named(folder: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks 1 tensors that .* names, such as c"):
        read_headers(folder)


@pytest.mark.parametrize(
    ("name", "reason"), [("a/training_args.bin", "is a pickle"), ("modeling_x.py", "is code")]
)
def test_pickles_and_code_are_refused_wherever_they_are(
    folder: Path, name: str, reason: str
) -> None:
    refuse_code(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    with pytest.raises(ValueError, match=reason):
        refuse_code(folder)


def test_tokens_of_an_image() -> None:
    """A class token is left out, registers stay; pixels without a whole patch do not count."""
    assert count_image_tokens(336, 336, 14, 1, "default") == 576
    assert count_image_tokens(384, 384, 14, 0, "full") == 729
    assert count_image_tokens(224, 224, 16, 5, "default") == 200
