"""Several data sets as one, and an order that depends on seed and epoch alone."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mipha.data.images import grey_image
from mipha.data.mixture import Mixture, check_samples, epoch_order, list_datasets, load_dataset_module
from mipha.recipe import DataRecipe


def conversation(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., DataRecipe]:
    """`write(name, images)`: a messages file with a sample for each, null for one without an image."""

    def file(name: str, images: list[str | None], **options: object) -> DataRecipe:
        lines = [{"messages": conversation(f"{name} {i}?"), "images": [image] if image else []} for i, image in enumerate(images)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return DataRecipe(dataset="messages", root=tmp_path / f"{name}.jsonl", **options)

    return file


def questions(mixture: Mixture) -> list[str]:
    return [sample.messages[0].text.removeprefix("<image>\n") for sample in mixture]


def test_data_sets_follow_one_another(write: Callable) -> None:
    mixture = Mixture([write("a", [None, "0.png"]), write("b", [None] * 3)])
    assert len(mixture) == 5
    assert questions(mixture) == ["a 0?", "a 1?", "b 0?", "b 1?", "b 2?"]
    assert mixture[-1] == mixture[4] and mixture[-5] == mixture[0]
    for outside in (5, -6):
        with pytest.raises(IndexError):
            mixture[outside]


def test_limit_takes_the_first_of_its_own_data_set(write: Callable) -> None:
    assert questions(Mixture([write("a", [None] * 4, limit=2), write("b", [None] * 2)])) == ["a 0?", "a 1?", "b 0?", "b 1?"]
    assert len(Mixture([write("a", [None] * 4, limit=9)])) == 4


def test_a_blind_data_set_shows_grey(write: Callable) -> None:
    plain, blind = write("a", ["0.png", None]), write("b", ["0.png", None], blind=True)
    mixture = Mixture([plain, blind])
    assert [len(sample.images) for sample in mixture] == [1, 0, 1, 0]
    assert isinstance(mixture[0].images[0], Path)
    assert mixture[2].images == (grey_image(),)
    assert mixture[2].messages[0].text == "<image>\nb 0?", "the place of the image stays"
    with Image.open(io.BytesIO(grey_image())) as image:
        assert image.getcolors() == [(image.width * image.height, (127, 127, 127))]


@pytest.mark.parametrize(("name", "module"), [("x.jsonl", "messages"), ("x.json", "llava_instruct")])
def test_the_format_of_a_bare_path_is_told_by_its_name(tmp_path: Path, name: str, module: str) -> None:
    path = tmp_path / name
    llava = [{"id": "1", "conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]}]
    path.write_text(json.dumps(llava) if module != "messages" else json.dumps({"messages": conversation("a?")}))
    mixture = Mixture([DataRecipe(dataset="auto", root=path)])
    assert mixture[0].messages[0].text == "a?"
    assert mixture[0].id.startswith(module.partition("_")[0])


def test_what_is_wrong_is_said(write: Callable, tmp_path: Path) -> None:
    (tmp_path / "x.csv").touch()
    with pytest.raises(ValueError, match=r"cannot tell the format from the name; give a \.jsonl of messages or a LLaVA \.json"):
        Mixture([DataRecipe(dataset="auto", root=tmp_path / "x.csv")])
    with pytest.raises(ValueError, match="no data set 'mesages': did you mean messages"):
        Mixture([DataRecipe(dataset="mesages")])
    with pytest.raises(ValueError, match="has no samples"):
        Mixture([write("empty", [])])
    with pytest.raises(FileNotFoundError):
        Mixture([DataRecipe(dataset="messages", root=tmp_path / "gone.jsonl")])


def test_every_data_set_module_has_the_contract() -> None:
    assert {"messages", "llava_instruct", "llava_pretrain"} <= set(list_datasets())
    assert not any(name.startswith("_") for name in list_datasets())
    for name in list_datasets():
        module = load_dataset_module(name)
        assert callable(module.load) and callable(module.to_sample)


IMAGES = [f"{number % 4}.png" if number % 5 else None for number in range(40)]


@pytest.mark.parametrize("bundle", [None, 3])
def test_the_order_is_a_permutation_and_a_function_of_seed_and_epoch(write: Callable, bundle: int | None) -> None:
    mixture = Mixture([write("a", IMAGES)])
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            orders[seed, epoch] = epoch_order(mixture, seed, epoch, bundle).tolist()
            assert sorted(orders[seed, epoch]) == list(range(40))
    assert len({tuple(order) for order in orders.values()}) == 4
    np.random.seed(1)  # whatever ran before
    assert all(epoch_order(Mixture([write("a", IMAGES)]), *key, bundle).tolist() == order for key, order in orders.items())


def test_bundles_stand_side_by_side(write: Callable) -> None:
    mixture = Mixture([write("a", IMAGES)])
    order = epoch_order(mixture, 0, 0, 4)
    images = [mixture[int(index)].images for index in order]
    runs, counts = 0, {image: images.count(image) for image in set(images) if image}
    for before, image in pairwise([(), *images]):
        runs += bool(image) and image != before
    assert runs <= sum(-(-count // 4) for count in counts.values())
    shuffled = epoch_order(mixture, 0, 0, None)
    assert sum(mixture[int(a)].images == mixture[int(b)].images for a, b in pairwise(shuffled)) < len(images) / 2
    other = epoch_order(mixture, 0, 1, 4)

    def bundles(order: np.ndarray) -> set[frozenset[int]]:
        return {frozenset(order[start : start + 4].tolist()) for start in range(0, 40)}

    assert bundles(order) != bundles(other), "which samples keep company is chosen anew each epoch"


def test_missing_images_are_named_before_anything_is_trained(write: Callable, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}], "images": [f"{n}.png"]}
        for n in range(3)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "1.png").write_bytes(grey_image())
    with pytest.raises(FileNotFoundError, match=r"2 of 3 image files are missing, for example .*0\.png of sample messages/train/1"):
        check_samples(Mixture([DataRecipe(dataset="messages", root=path)]))
