"""Several data sets as one sequence."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mipha.data.held_out import side_of
from mipha.data.images import grey_image
from mipha.data.mixture import Mixture
from mipha.data.sample import Sample
from mipha.recipe import DataRecipe


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
    assert questions(Mixture([write("a", [None] * 4, limit=2), write("b", [None] * 2)])) == [
        "a 0?",
        "a 1?",
        "b 0?",
        "b 1?",
    ]
    assert len(Mixture([write("a", [None] * 4, limit=9)])) == 4


def test_samples_with_too_many_images_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image>\n" * number + f"What of {number}?"},
                {"role": "assistant", "content": "yes"},
            ],
            "images": ["0.png"] * number,
        }
        for number in (1, 3, 0, 2, 4)
    ]
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))

    mixture = Mixture([DataRecipe(dataset="messages", root=path, max_images=2)])
    assert [len(sample.images) for sample in mixture] == [1, 0, 2]
    (note,) = [note for note in mixture.notes if "left out" in note]
    assert "2 of 5 samples are left out: they show more than max_images=2 images (up to 4)" in note
    assert len(Mixture([DataRecipe(dataset="messages", root=path)])) == 5

    path.write_text("\n".join(json.dumps(row) for row in (rows[1], rows[4])))
    with pytest.raises(
        ValueError, match=r"every sample of .* more than max_images=2 images: raise"
    ):
        Mixture([DataRecipe(dataset="messages", root=path, max_images=2)])


def test_a_blind_data_set_shows_grey(write: Callable) -> None:
    plain, blind = write("a", ["0.png", None]), write("b", ["0.png", None], images="grey")
    mixture = Mixture([plain, blind])
    assert [len(sample.images) for sample in mixture] == [1, 0, 1, 0]
    assert isinstance(mixture[0].images[0], Path)
    assert mixture[2].images == (grey_image(),)
    assert mixture[2].messages[0].text == "<image>\nb 0?", "the place of the image stays"
    with Image.open(io.BytesIO(grey_image())) as image:
        assert image.getcolors() == [(image.width * image.height, (127, 127, 127))]


def test_shuffled_images_are_those_of_other_samples(write: Callable) -> None:
    given = [f"{number}.png" if number % 5 else None for number in range(40)]
    own, shuffled = Mixture([write("a", given)]), Mixture([write("a", given, images="shuffled")])
    assert [sample.messages for sample in shuffled] == [sample.messages for sample in own]
    assert [len(sample.images) for sample in shuffled] == [len(sample.images) for sample in own]
    shown = [sample.images[0].name for sample in shuffled if sample.images]
    assert not any(image == row for image, row in zip(shown, filter(None, given), strict=True))
    assert len(set(shown)) > 20, "what samples without an image pass on is shown twice"
    assert list(Mixture([write("a", given, images="shuffled")])) == list(shuffled)
    assert len(Mixture([write("b", ["0.png"], images="shuffled")])[0].images) == 1, (
        "there is no other"
    )


def test_a_sample_of_several_images_gets_as_many(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "which?"}, {"role": "assistant", "content": "that"}]
    rows = [
        {"messages": turns, "images": [f"{row}-{image}.png" for image in range(row)]}
        for row in range(5)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shuffled = Mixture(
        [DataRecipe(dataset="messages", root=tmp_path / "a.jsonl", images="shuffled")]
    )
    assert [len(sample.images) for sample in shuffled] == [0, 1, 2, 3, 4]
    assert all(sample.images[0].name[0] != str(row) for row, sample in enumerate(shuffled) if row)


def test_the_format_of_a_bare_path_is_detected_and_said(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(
        json.dumps(
            [
                {
                    "id": "1",
                    "conversations": [
                        {"from": "human", "value": "a?"},
                        {"from": "gpt", "value": "b"},
                    ],
                }
            ]
        )
    )
    mixture = Mixture([DataRecipe(dataset="auto", root=path)])
    assert (mixture[0].id, mixture[0].messages[0].text) == ("llava/x/0/1", "a?")
    assert mixture.notes == [
        f"{path} is read as llava: LLaVA's conversations between human and gpt"
    ]


def test_images_may_lie_elsewhere(write: Callable, tmp_path: Path) -> None:
    assert Mixture([write("a", ["0.png"], image_root=tmp_path / "pictures")])[0].images == (
        tmp_path / "pictures/0.png",
    )
    with pytest.raises(
        ValueError, match="image_root has no effect with the data set easy_vqa: remove it"
    ):
        Mixture([DataRecipe(dataset="easy_vqa", image_root=tmp_path)])


def test_what_is_wrong_is_said(
    write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError,
        match=r"^no data set 'photos': known: .*; for the data in that place write \./photos$",
    ):
        (tmp_path / "photos").mkdir()
        monkeypatch.chdir(tmp_path)
        Mixture([DataRecipe(dataset="photos")])
    with pytest.raises(ValueError, match="no data set 'mesages': did you mean messages"):
        Mixture([DataRecipe(dataset="mesages")])
    with pytest.raises(ValueError, match="has no samples"):
        Mixture([write("empty", [])])
    with pytest.raises(FileNotFoundError):
        Mixture([DataRecipe(dataset="messages", root=tmp_path / "gone.jsonl")])


def test_missing_images_are_named_before_anything_is_trained(
    write: Callable, tmp_path: Path
) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "what?"},
                {"role": "assistant", "content": "that"},
            ],
            "images": [f"{n}.png"],
        }
        for n in range(3)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "1.png").write_bytes(grey_image())
    with pytest.raises(
        FileNotFoundError,
        match=r"2 of 3 image files are missing, for example .*0\.png of sample messages/train/1",
    ):
        Mixture([DataRecipe(dataset="messages", root=path)]).check()


def test_weights_and_caps_say_what_an_epoch_shows(write: Callable) -> None:
    data = [
        write("a", [None] * 10, weight=2),
        write("b", [None] * 10, weight=0.3),
        write("c", [None] * 10, weight=9, cap=4),
    ]
    mixture = Mixture([*data, write("d", [None] * 2)])
    assert len(mixture) == 32
    assert mixture.num_per_epoch == 20 + 3 + 4 + 2
    order = mixture.epoch_order(0, 0)
    assert mixture.count_sources(order) == {"a.jsonl": 20, "b.jsonl": 3, "c.jsonl": 4, "d.jsonl": 2}
    assert np.bincount(order, minlength=32).tolist()[:10] == [2] * 10
    assert order.tolist() != sorted(order.tolist())
    assert sorted(mixture.epoch_order(0, 0, 4)) == sorted(order), "bundles are of the same samples"


def test_data_sets_of_one_name_are_told_apart(write: Callable) -> None:
    recipe = write("a", [None] * 3)
    mixture = Mixture([recipe, recipe, write("b", [None])])
    assert mixture.count_sources([0, 1, 4, 6]) == {"a.jsonl (1)": 2, "a.jsonl (2)": 1, "b.jsonl": 1}


def test_samples_of_one_image_share_a_key(write: Callable) -> None:
    mixture = Mixture([write("a", ["0.png", "1.png", None, "0.png", None])])
    keys = mixture.image_keys
    assert keys[0] == keys[3] != keys[1]
    assert keys[2] == keys[4] == 0 != keys[1]


def test_an_image_is_on_one_side_only(write: Callable, tmp_path: Path) -> None:
    for number in range(40):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / f"copy of {number}.png").write_bytes((tmp_path / f"{number}.png").read_bytes())
    first = write("a", [f"{number % 40}.png" for number in range(80)])
    second = write("b", [f"copy of {number}.png" for number in range(40)], weight=2)

    def shown(data: list[DataRecipe], held_out: float, side: str) -> list[str]:
        return [
            sample.images[0].name.removeprefix("copy of ")
            for sample in Mixture(data, held_out, side)
        ]

    train, validation = (shown([first, second], 0.25, side) for side in ("train", "validation"))
    assert len(train) + len(validation) == 120 and not set(train) & set(validation)
    assert 3 <= len(set(validation)) <= 20
    assert all(validation.count(name) == 3 for name in set(validation)), (
        "two questions and the copy keep company"
    )
    assert set(shown([second], 0.25, "validation")) == set(validation), (
        "whatever other data there are"
    )
    assert set(shown([first], 0.5, "validation")) > set(validation), (
        "a larger share holds out the same images, and more"
    )
    assert Mixture([first, second], 0.25).num_per_epoch == len(train) + len(set(train)), (
        "the weight counts on each side"
    )
    with pytest.raises(
        ValueError, match=r"held_out=1e-09 leaves no sample for validation: choose another share"
    ):
        Mixture([first], 1e-9, "validation")


def test_samples_of_images_on_both_sides_are_counted(tmp_path: Path) -> None:
    for number in range(40):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    turns = [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "no"}]
    rows = [{"messages": turns, "images": [f"{n}.png", f"{n + 20}.png"]} for n in range(20)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = Mixture([DataRecipe(dataset="messages", root=path)], 0.5)
    torn = 20 - len(train) - len(train.on_side("validation"))
    assert torn > 0
    said = f"train.jsonl: {torn} of 20 samples are used on neither side, because they show images"
    assert any(note.startswith(said) for note in train.notes)


def test_both_sides_of_a_split_read_each_image_once(
    write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    data = [write("a", [f"{number}.png" for number in range(12)])]
    alone = {side: list(Mixture(data, 0.4, side)) for side in ("train", "validation")}

    looked_at: list[str] = []

    def noted(sample: Sample, held_out: float) -> str | None:
        looked_at.append(sample.id)
        return side_of(sample, held_out)

    monkeypatch.setattr("mipha.data.mixture.side_of", noted)
    train = Mixture(data, 0.4)
    assert len(train.image_keys) == len(train)  # read before, it must not be the other side's
    validation = train.on_side("validation")
    assert len(looked_at) == 12
    assert list(train) == alone["train"] and list(validation) == alone["validation"]
    assert len(validation.image_keys) == len(validation) != len(train)


def test_a_mixture_travels_to_another_process(write: Callable) -> None:
    images = ["0.png", None, "1.png"]
    mixture = Mixture(
        [
            write("a", images, weight=0.5),
            write("b", images, images="grey"),
            write("c", images, images="shuffled"),
        ]
    )
    copy = pickle.loads(pickle.dumps(mixture))
    assert list(copy) == list(mixture)
    assert (copy.epoch_order(0, 0, 3) == mixture.epoch_order(0, 0, 3)).all()


def test_the_hash_of_the_data_follows_what_is_trained_on_and_not_where_it_lies(
    tmp_path: Path,
) -> None:
    def sha256(folder: str, image: str = "a.png", **answer: object) -> str:
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / folder / image)
        turns = [
            {"role": "user", "content": "<image>\nwhich?"},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": "sure?"},
            {"role": "assistant", "content": "yes"} | answer,
        ]
        (tmp_path / folder / "my.jsonl").write_text(
            json.dumps({"messages": turns, "images": [image]}) + "\n"
        )
        data = DataRecipe(dataset="messages", root=tmp_path / folder / "my.jsonl")
        return Mixture([data]).check()

    first = sha256("one")
    assert sha256("two") == first
    others = [
        sha256("three", content="no"),
        sha256("four", image="b.png"),
        sha256("five", loss=False),
    ]
    assert len({first, *others}) == 4
    # A run that began with an earlier version goes on: its data have the hash that they had.
    assert (first[:12], others[2][:12]) == ("e4b1231e1f69", "a42b5c8c775f")
