"""The files of a checkpoint: whole or not, headers without torch, and the gate for strangers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mipha.checkpoint_files import (
    INDEX,
    is_whole,
    read_checkpoint,
    read_headers,
    refuse_code,
    refuse_redirects,
    weight_files,
)
from mipha.geometry import count_image_tokens


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


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": ["one.safetensors"]}},
        {"weight_map": {"a": "../x.safetensors"}},
        {"weight_map": {"a": "/x.safetensors"}},
        {"weight_map": {"a": "weights.dat"}},
    ],
)
def test_an_index_names_safetensors_files_beside_it(folder: Path, content: dict) -> None:
    (folder / INDEX).write_text(json.dumps(content))
    for look in (is_whole, weight_files):
        with pytest.raises(ValueError, match="does not name safetensors files beside it"):
            look(folder)


@pytest.mark.parametrize("content", ["[]", "null", "1", "{", "[" * 100_000])
def test_an_index_that_is_no_object_is_named(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        weight_files(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    """transformers takes the last one, whatever the index says."""
    save_file({"a": np.ones((2, 3), np.float32), "b": np.zeros(4)}, folder / "two.safetensors")
    with pytest.raises(ValueError, match=r"one\.safetensors and two\.safetensors both hold a,"):
        read_headers(folder)


def test_a_tensor_that_no_shard_holds_is_named(folder: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks 1 tensors that .* names, such as c"):
        read_headers(folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a/training_args.bin", "is a pickle"),
        ("a.PKL", "is a pickle"),
        ("modeling_x.py", "is code"),
    ],
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


@pytest.fixture(scope="module")
def llava(tiny_model: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA as the program saves it."""
    from mipha.models.build import save_checkpoint

    path = tmp_path_factory.mktemp("llava") / "model"
    save_checkpoint(*tiny_model("llama", "siglip"), path)
    return path


@pytest.fixture
def spoiled(llava: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(llava, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    """Replace keys of a JSON file; `__` leads into an object."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        inner = content
        for key in outer:
            inner = inner[key]
        inner[last] = value
    path.write_text(json.dumps(content))


def test_the_gate_lets_a_saved_model_pass(llava: Path) -> None:
    files = read_checkpoint(llava)
    assert files.geometry.longest == 4 and files.dtypes == ["float32"]


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", "deep/notes.txt", "images"])
def test_a_link_out_of_the_folder_is_refused(spoiled: Path, name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    if name == "images":
        outside.mkdir()
    elif name == "model.safetensors":
        (spoiled / name).rename(outside)
    else:
        outside.write_text("secret")
    (spoiled / name).parent.mkdir(exist_ok=True)
    (spoiled / name).symlink_to(outside)
    with pytest.raises(ValueError, match=f"{name} is a link out of the folder, to .*outside"):
        read_checkpoint(spoiled)


def test_a_link_to_nothing_outside_is_refused(spoiled: Path) -> None:
    (spoiled / "notes.txt").symlink_to("../not-there")
    with pytest.raises(ValueError, match=r"notes\.txt is a link out of the folder"):
        read_checkpoint(spoiled)


def test_links_within_the_folder_and_into_the_cache_of_the_hub_are_read(
    llava: Path, tmp_path: Path
) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(llava.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "copy.json").symlink_to("config.json")
    read_checkpoint(snapshot)
    (snapshot / "notes.txt").symlink_to("../../../secret")
    with pytest.raises(ValueError, match="is a link out of the folder"):
        read_checkpoint(snapshot)


def test_links_in_a_circle_are_named(spoiled: Path) -> None:
    (spoiled / "a").symlink_to("b")
    (spoiled / "b").symlink_to("a")
    with pytest.raises(ValueError, match=r"a is a link that leads back to itself"):
        read_checkpoint(spoiled)


@pytest.mark.parametrize("templates", [[1], [{"name": "other"}], [None, {"name": "default"}]])
def test_templates_that_are_none_are_no_template(spoiled: Path, templates: list[Any]) -> None:
    (spoiled / "chat_template.jinja").unlink()
    edit(spoiled / "tokenizer_config.json", chat_template=templates)
    with pytest.raises(FileNotFoundError, match="has no chat_template"):
        read_checkpoint(spoiled)


@pytest.mark.parametrize("name", ["chat_template.jinja", "config.json"])
def test_a_file_of_gigabytes_is_not_read(spoiled: Path, name: str) -> None:
    os.truncate(spoiled / name, 2**32)  # sparse: it takes no room
    with pytest.raises(ValueError, match=rf"{name} has 4,294,967,296 bytes"):
        read_checkpoint(spoiled)


def test_a_pipe_is_refused_and_not_waited_for(spoiled: Path) -> None:
    os.mkfifo(spoiled / "notes.txt")
    with pytest.raises(ValueError, match=r"notes\.txt is a pipe or a device"):
        read_checkpoint(spoiled)


def test_an_adapter_beside_the_weights_is_refused(spoiled: Path) -> None:
    (spoiled / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter beside a model: merge it with"):
        read_checkpoint(spoiled)
    with pytest.raises(ValueError, match="is an adapter beside a model: merge it with"):
        refuse_redirects(spoiled)


def test_weights_in_two_ways_are_refused(spoiled: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model.safetensors"}}
    (spoiled / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"holds model\.safetensors and .*remove one"):
        read_checkpoint(spoiled)


REPLACES = {
    "type": "Sequence",
    "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}] * 2,
}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config", {"auto_map": {"AutoModel": "x.Y"}}, "code of its own"),
        ("config", {"text_config__auto_map": {"AutoModel": "x.Y"}}, "code of its own"),
        ("processor_config", {"image_processor__auto_map": {"A": "x.Y"}}, "code of its own"),
        ("tokenizer_config", {"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "code of its own"),
        ("config", {"attn_implementation": "kernels-community/x"}, "may be code from the hub"),
        ("config", {"_attn_implementation": "flash_attention_2"}, "may be code from the hub"),
        ("config", {"text_config__attn_implementation": "a/b"}, "may be code from the hub"),
        ("config", {"attn_implementation": {"text_config": "a/b"}}, "may be code from the hub"),
        ("config", {"experts_implementation": "a/b"}, "may be code from the hub"),
        ("config", {"transformers_weights": "other.safetensors"}, "another file of weights"),
        ("config", {"vision_config__model_type": "timm_wrapper"}, "a model of timm"),
        ("config", {"text_config__rope_theta": float("inf")}, "sets rope_theta to inf"),
        ("generation_config", {"temperature": float("nan")}, "sets temperature to nan"),
        ("generation_config", {"eos_token_id": "x"}, "sets eos_token_id to 'x'"),
        ("generation_config", {"eos_token_id": [2, -1]}, "sets eos_token_id to"),
        ("generation_config", {"pad_token_id": 1.5}, "sets pad_token_id to 1.5"),
        ("config", {"text_config__num_hidden_layers": 10**7}, "num_hidden_layers to 10000000, but"),
        ("config", {"vision_config__num_hidden_layers": 10**7}, "num_hidden_layers to 10000000"),
        ("config", {"text_config__hidden_size": 10**6}, "hidden_size to 1000000, but"),
        ("config", {"text_config__hidden_size": "x"}, "hidden_size to 'x', but"),
        ("config", {"text_config__vocab_size": 0}, "vocab_size to 0, but"),
        ("config", {"text_config__sliding_window": 0}, "sliding_window to 0, but"),
        ("config", {"text_config": []}, "not a LLaVA"),
        ("config", {"num_labels": 10**8}, "num_labels to 100000000, but the weights"),
        (
            "config",
            {"vision_config__num_labels": 10**8},
            "num_labels to 100000000, but the weights",
        ),
        ("config", {"quantization_config": {"quant_method": "x"}}, "weights are quantized"),
        ("config", {"text_config__return_dict": False}, "sets return_dict to False"),
        ("config", {"vision_feature_layer": 99}, "vision_feature_layer to 99: give a layer of"),
        ("config", {"vision_feature_layer": [-1, -99]}, "vision_feature_layer to"),
        ("tokenizer", {"model__dropout": 0.1}, "sets dropout to 0.1"),
        ("tokenizer", {"normalizer": REPLACES}, "writes 10,000 characters for one"),
        ("tokenizer", {"normalizer": {"type": "Prepend", "prepend": "x" * 99}}, "writes 99 "),
        ("processor_config", {"image_processor__image_std": [0, 0, 0]}, "sets image_std to"),
        ("processor_config", {"image_processor__image_std": [1e-300] * 3}, "sets image_std to"),
        ("processor_config", {"image_processor__image_mean": [0.5, 0.5]}, "sets image_mean to"),
        ("processor_config", {"image_processor__image_mean": [None, 0, 0]}, "sets image_mean to"),
        ("processor_config", {"image_processor__rescale_factor": 1e300}, "sets rescale_factor to"),
        ("processor_config", {"image_processor__resample": 99}, "sets resample to 99"),
        (
            "processor_config",
            {
                "image_processor__do_center_crop": True,
                "image_processor__size": {"shortest_edge": 10**7},
            },
            "shortest_edge of 10000000",
        ),
        ("processor_config", {"patch_size": 0}, "does not give image and patch sizes"),
        ("processor_config", {"patch_size": None}, "does not give image and patch sizes"),
        ("processor_config", {"patch_size": "x"}, "does not give image and patch sizes"),
        ("processor_config", {"image_processor": []}, "does not give image and patch sizes"),
        ("processor_config", {"image_processor__size": 28}, "does not give image and patch sizes"),
        ("processor_config", {"image_processor": {}}, "lacks 'size'"),
    ],
)
def test_a_setting_that_is_not_safe_is_named(
    spoiled: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    edit(spoiled / f"{name}.json", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(spoiled)
    assert f"{name}.json" in str(caught.value) or message == "not a LLaVA"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [14_000, 14_000_000])
def test_an_image_with_more_patches_than_the_weights_have_rows_is_refused(
    spoiled: Path, size: int
) -> None:
    side = {"height": size, "width": size}
    processor = json.loads((spoiled / "processor_config.json").read_text())
    processor["image_processor"] |= {"size": side, "crop_size": side}
    (spoiled / "processor_config.json").write_text(json.dumps(processor))
    edit(
        spoiled / "config.json",
        vision_config__image_size=size,
        image_seq_length=(size // 14) ** 2,
    )
    with pytest.raises(ValueError, match="more than the weights have positions or words"):
        read_checkpoint(spoiled)


@pytest.mark.parametrize(
    ("layers", "is_read"),
    [(-1, True), (1, True), ([-1, 1], True), (0, False), (7, False), (-9, False), ([1, 0], False)],
)
def test_a_layer_that_the_tower_does_not_have_is_refused(
    spoiled: Path, layers: int | list[int], is_read: bool
) -> None:
    edit(spoiled / "config.json", vision_feature_layer=layers)
    if is_read:
        read_checkpoint(spoiled)
    else:
        with pytest.raises(ValueError, match=r"vision_feature_layer to .*: give a layer of the"):
            read_checkpoint(spoiled)


def test_tokens_besides_the_patches_are_those_of_the_tower(
    spoiled: Path, tiny_model: Callable, tmp_path: Path
) -> None:
    from mipha.models.build import save_checkpoint

    save_checkpoint(*tiny_model("llama", "clip"), tmp_path / "clip")
    read_checkpoint(tmp_path / "clip")
    for folder, found, strategy in ((spoiled, 0, "default"), (tmp_path / "clip", 1, "full")):
        edit(
            folder / "processor_config.json",
            num_additional_image_tokens=1 - found,
            vision_feature_select_strategy=strategy,
        )
        sentence = (
            rf"makes {found} tokens besides its patches, but the processor counts {1 - found}"
        )
        with pytest.raises(ValueError, match=sentence):
            read_checkpoint(folder)


def test_a_grid_of_tiles_takes_the_patches_alone(tmp_path: Path) -> None:
    source = Path(__file__).parent / "fixtures" / "images" / "next-siglip-qwen2"
    folder = Path(shutil.copytree(source, tmp_path / "next"))
    for name in ("config", "processor_config"):
        edit(folder / f"{name}.json", vision_feature_select_strategy="default")
    with pytest.raises(ValueError, match=r"the grid takes the patches alone, .*: use full"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "processor_config.json", "tokenizer_config.json"),
        *("generation_config.json", "tokenizer.json"),
    ],
)
@pytest.mark.parametrize("content", ["", "[]", "null", '{"a": ', "[" * 100_000, b"\xff\xfe"])
def test_a_file_that_is_no_json_object_is_named(
    spoiled: Path, name: str, content: str | bytes
) -> None:
    (spoiled / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read_checkpoint(spoiled)


def test_weights_that_were_cut_short_are_named(spoiled: Path) -> None:
    whole = (spoiled / "model.safetensors").read_bytes()
    for size in (0, 4, 100, len(whole) // 2):
        (spoiled / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is cut short"):
            read_checkpoint(spoiled)


def test_weights_that_are_whole_numbers_are_refused(spoiled: Path) -> None:
    """Places are, and may be."""
    weights = load_file(spoiled / "model.safetensors")
    name = next(name for name in weights if name.endswith("linear_1.weight"))
    places = {"vision_tower.position_ids": np.arange(3)}
    save_file(weights | places, spoiled / "model.safetensors", {"format": "pt"})
    read_checkpoint(spoiled)
    weights[name] = weights[name].astype(np.int8)
    save_file(weights, spoiled / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"linear_1\.weight are of the type I8, not of floating"):
        read_checkpoint(spoiled)


def test_code_beside_a_pretrained_part_is_not_run_and_may_stay(spoiled: Path) -> None:
    (spoiled / "modeling_x.py").touch()
    edit(spoiled / "config.json", auto_map={"AutoModel": "x.Y"})
    refuse_redirects(spoiled)
    edit(spoiled / "config.json", attn_implementation="a/b")
    with pytest.raises(ValueError, match="may be code from the hub"):
        refuse_redirects(spoiled)
