"""Every key of a record is read or named: images, options, earlier turns and marks are not lost."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mipha.data.check.fix import write_fixed
from mipha.data.check.linter import CheckResult, check_data
from mipha.data.dataset import data_recipe, load_data
from mipha.data.datasets._choices import INSTRUCTION
from mipha.data.mixture import Mixture
from mipha.data.sample import Sample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two different images, a.png and b.png."""
    for number, name in enumerate(("a", "b")):
        noise = Image.effect_noise((40, 40), 80 + 20 * number).convert("RGB")
        noise.save(tmp_path / f"{name}.png")
    return tmp_path


def _write(folder: Path, *rows: Any, name: str = "mine.jsonl") -> Path:
    file = folder / name
    if name.endswith(".json"):
        file.write_text(json.dumps(list(rows), indent=1))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _samples(file: Path) -> list[Sample]:
    data = load_data(data_recipe(str(file)))
    return [data.to_sample(record) for record in data.records]


def _check(file: Path) -> CheckResult:
    return check_data(load_data(data_recipe(str(file))), workers=1)


def _found(file: Path) -> dict[str, str]:
    return {finding.kind: finding.what for finding in _check(file).findings}


def _said(sample: Sample) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in sample.messages]


def _llava(number: int = 0, **more: Any) -> dict[str, Any]:
    asked = f"<image>\nwhat colour is shape {number}?"
    return {
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": asked},
            {"from": "gpt", "value": f"red {number}"},
        ],
    } | more


TALK = [{"from": "human", "value": "which is larger?"}, {"from": "gpt", "value": "the first"}]
TURNS = [{"role": "user", "content": "what shape?"}, {"role": "assistant", "content": "a circle"}]
SHAPES: dict[str, dict[str, Any]] = {
    "several images": {"images": ["a.png", "b.png"], "conversations": TALK},
    "a system turn": {"system": "Be brief.", "conversations": TALK, "image": "b.png"},
    "messages": {"messages": TURNS, "images": ["a.png"]},
    "texts": {"images": ["a.png"], "texts": [{"user": "what?", "assistant": "a circle"}]},
    "table": {"image": "a.png", "question": "what?", "answer": "a circle"},
    "caption": {"image": "b.png", "caption": "a circle"},
    "choice": {"image": "b.png", "question": "q?", "options": ["x", "y"], "answer": 1},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", [0, 25])
def test_a_row_is_read_by_its_own_format(shape: str, place: int, folder: Path) -> None:
    rows = [_llava(number) for number in range(30)]
    rows[place] = SHAPES[shape]
    (alone,) = _samples(_write(folder, SHAPES[shape], name="alone.json"))
    among = _samples(_write(folder, *rows, name="mine.json"))
    assert (_said(among[place]), among[place].images) == (_said(alone), alone.images)
    assert alone.images and len(among) == 30


def test_history_and_system_are_turns(folder: Path) -> None:
    history = [["what shape is it?", "a circle"], ["how large?", "small"]]
    row = {"system": "In one word.", "query": "and its colour?", "response": "red"}
    wanted = [
        ("system", "In one word."),
        ("user", "<image>\nwhat shape is it?"),
        ("assistant", "a circle"),
        ("user", "how large?"),
        ("assistant", "small"),
        ("user", "and its colour?"),
        ("assistant", "red"),
    ]
    dicts = [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    for given in (history, [{"user": q, "assistant": a} for q, a in history], dicts):
        file = _write(folder, row | {"history": given, "images": ["a.png"]})
        assert [_said(sample) for sample in _samples(file)] == [wanted]
        assert not _found(file)

    with (folder / "mine.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*row, "history", "image"])
        writer.writeheader()
        writer.writerow(row | {"history": json.dumps(history), "image": "a.png"})
        writer.writerow(row | {"history": str(history), "image": "a.png"})
        writer.writerow(row | {"history": "", "image": "a.png"})
    json_text, python_text, none = _samples(folder / "mine.csv")
    assert _said(json_text) == _said(python_text) == wanted
    assert _said(none) == [wanted[0], ("user", "<image>\nand its colour?"), wanted[-1]]

    for history in ("what came before", [["a"]], [{"user": "a"}], 3):
        kinds = _found(_write(folder, row | {"history": history}))
        assert "its history holds" in kinds["malformed"]


@pytest.mark.parametrize("shape", ["messages", "conversations", "llava", "texts", "alpaca"])
@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_column_is_read_beside_every_format(shape: str, key: str, folder: Path) -> None:
    row: dict[str, Any] = {
        "messages": {"messages": TURNS},
        "conversations": {"conversations": TURNS},
        "llava": {"conversations": TALK},
        "texts": {"texts": [{"user": "what?", "assistant": "a circle"}]},
        "alpaca": {"instruction": "what?", "output": "a circle"},
    }[shape]
    (sample,) = _samples(_write(folder, row | {key: "Be brief."}))
    assert _said(sample)[0] == ("system", "Be brief.") and not sample.remarks


def test_two_system_turns_are_refused(folder: Path) -> None:
    own = [{"role": "system", "content": "Be long."}, *TURNS]
    assert (
        "two different system turns"
        in _found(_write(folder, {"messages": own, "system": "Be brief."}))["malformed"]
    )
    (sample,) = _samples(_write(folder, {"messages": own, "system": "Be long."}))
    assert [role for role, _ in _said(sample)] == ["system", "user", "assistant"]


HISTORY = {"user": "what?", "assistant": "a pyramid"}


@pytest.mark.parametrize(
    "earlier",
    [
        [HISTORY | {"loss": False, "image": "b.png", "at": "noon"}],
        [
            {"role": "user", "content": "what?", "image": "b.png", "at": "noon"},
            {"from": "gpt", "value": "a pyramid", "weight": 0},
        ],
    ],
)
def test_nothing_of_an_earlier_turn_is_lost(earlier: list[dict[str, Any]], folder: Path) -> None:
    row = {"images": ["a.png"], "history": earlier, "query": "and now?", "response": "red"}
    file = _write(folder, row)
    assert [m.learned for m in _samples(file)[0].messages] == [True, False, True, True]
    found = _found(file)
    assert 'the key "history[].image", which holds an image' in found["unread-content"]
    assert "history[].at (1 row)" in found["unread-key"]


# Turns that are not to be learned.


def _marked(key: str, value: Any, last: Any = None) -> list[dict[str, Any]]:
    wrong = {"role": "assistant", "content": "a pyramid", key: value}
    right = {"role": "assistant", "content": "red"} | ({} if last is None else {key: last})
    asked = {"role": "user", "content": "what?"}
    return [asked, wrong, asked, right]


@pytest.mark.parametrize(
    ("key", "value", "last"),
    [
        ("loss", False, True),
        ("trainable", False, None),
        ("train", 0, 1),
        ("training", "false", None),
        ("weight", 0, 1),
        ("weight", 0.0, 1.0),
        ("loss_weight", 0.0, 1.0),
        ("loss_mask", 0, 1),
        ("loss_scale", 0, None),
    ],
)
def test_a_turn_that_is_not_to_be_learned_is_not(
    key: str, value: Any, last: Any, folder: Path, tiny_model: Callable
) -> None:
    from mipha.data.encode import IGNORE, encode

    turns = _marked(key, value, last)
    named = [
        {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]}
        | {k: turn[k] for k in turn if k == key}
        for turn in turns
    ]
    rows = [{"messages": turns}, {"conversations": turns}, {"conversations": named}]
    _, processor = tiny_model("llama")
    for sample in _samples(_write(folder, *rows)):
        assert [m.learned for m in sample.messages] == [True, False, True, True]
        assert not sample.remarks
        for prompt in ("chat", "plain"):
            encoded = encode(sample, processor, 500, prompt)
            learned = processor.tokenizer.decode(encoded.labels[encoded.labels != IGNORE])
            assert "red" in learned and "pyramid" not in learned


@pytest.mark.parametrize("marks", [[0, 0, 0, 1], [0, 1], [1, 0, 1, 1], "[0, 1]"])
@pytest.mark.parametrize("shape", ["messages", "conversations", "llava"])
def test_a_row_may_hold_the_marks(marks: Any, shape: str, folder: Path) -> None:
    turns = _marked("name", None)
    if shape == "llava":
        turns = [
            {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]}
            for turn in turns
        ]
    key = "messages" if shape == "messages" else "conversations"
    (sample,) = _samples(_write(folder, {key: turns, "loss_mask": marks}))
    assert [m.learned for m in sample.messages] == [True, False, True, True]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"messages": _marked("weight", 0.5)}, 'the "weight" of message 1 is .0.5.'),
        ({"messages": _marked("weight", "low")}, "which is neither yes nor no"),
        ({"messages": _marked("masked", True)}, 'the "masked" of message 1 is .True.'),
        ({"messages": _marked("train_on_turn", 0)}, "may say whether it is learned"),
        ({"messages": TURNS, "loss_mask": [0]}, None),
        ({"messages": TURNS, "loss_mask": [0, 1, 1]}, 'its "loss_mask" is .* for 2 turns'),
        ({"messages": TURNS, "trainable": False}, "so nothing of it is to be learned"),
        ({"question": "a", "answer": "b", "weight": 0}, "so nothing of it is to be learned"),
        ({"messages": TURNS, "label_mask": [0, 1]}, "which may say what is learned"),
        ({"image": "a.png", "caption": "A cat.", "train": False}, "so nothing of it is to be"),
        ({"image": "a.png", "caption": "A cat.", "loss_mask": [0]}, None),
        ({"images": [None], "texts": ["A cat."], "trainable": False}, "so nothing of it is to be"),
        ({"images": [None], "texts": ["A cat."], "loss_mask": [0]}, "it is not to be learned"),
        ({"history": [HISTORY | {"weight": 0.5}], "query": "a", "response": "b"}, "neither yes"),
    ],
)
def test_marks_that_cannot_be_followed_are_refused(
    row: dict, sentence: str | None, folder: Path
) -> None:
    file = _write(folder, row)
    if sentence is None:  # a mark for each answer: the only one is not learned
        assert not _samples(file)[0].messages[1].learned
        assert "all its answers are marked" in _found(file)["nothing-trained"]
        return
    (finding,) = [f for f in _check(file).findings if f.kind == "loss-mark"]
    assert finding.severity == "error"
    with pytest.raises(ValueError, match=sentence):
        _samples(file)


# Options, and the number of one as the answer.


@pytest.mark.parametrize(
    ("row", "letter"),
    [
        ({"choices": ["red", "blue", "green"], "answer": 0}, "A"),
        ({"options": ["red", "blue", "green"], "answer": "1"}, "B"),
        ({"options": "['red', 'blue', 'green']", "answer": "2"}, "C"),
        ({"options": "['red' 'blue'\n 'green']", "answer": "2"}, "C"),
        ({"choices": ["red", "blue", "green"], "answer": "Blue"}, "B"),
        ({"choices": ["red", "blue", "green"], "answer": "(c)"}, "C"),
        ({"choices": {"A": "red", "B": "blue", "C": "green"}, "answer": "B"}, "B"),
        ({"choices": {"text": ["red", "blue", "green"], "label": list("ABC")}, "label": "C"}, "C"),
        ({"choices": {"text": ["red", "blue", "green"], "label": list("123")}, "answer": 1}, "A"),
        ({"choices": ["red", "blue", "green"], "correct_choice_idx": 2}, "C"),
        ({"A": "red", "B": "blue", "C": "green", "D": None, "answer": "B"}, "B"),
        ({"choices": ["A. red", "B. blue", "C. green"], "answer": "B. blue"}, "B"),
        ({"choices": ["(A) red", "(B) blue", "(C) green"], "answer": 2}, "C"),
        ({"option_a": "red", "option_b": "blue", "option_c": "green", "answer": "c"}, "C"),
        ({"option1": "red", "option2": "blue", "option3": "green", "answer": 1}, "A"),
        ({"option1": "red", "option2": "blue", "option3": "green", "answer": "c"}, "C"),
        ({"choices": ["red", "blue", "green", None, ""], "answer": 2}, "C"),
        ({"choices": {"A": "red", "B": "blue", "C": "green", "D": None}, "answer": "C"}, "C"),
        ({"A": "red", "B": "blue", "C": "green", "D": "", "answer": "B"}, "B"),
        ({"A": "red", "B": None, "C": "blue", "D": "green", "answer": "D"}, "C"),
        ({"choices": ["red", "", "blue", "green"], "answer": "C"}, "B"),
        ({"options": "A)red|B) blue|C) green", "answer": "C"}, "C"),
        ({"options": "red|blue|green", "answer": None, "label": 1}, "B"),
    ],
)
def test_options_stand_in_the_question(row: dict, letter: str, folder: Path) -> None:
    row = {"image": "a.png", "question": "Which?", "hint": "Look.", "source": "s"} | row
    file = _write(folder, row)
    (sample,) = _samples(file)
    asked, said = sample.messages
    assert said.text == letter
    options = f"A. red\nB. blue\nC. green\n{INSTRUCTION}"
    assert asked.text == f"<image>\nContext: Look.\nWhich?\n{options}"
    assert _found(file) == {"unread-key": "nothing reads source (1 row)"}


@pytest.mark.parametrize(
    "row",
    [
        {"options": ["red", "blue"], "answer": 2},
        {"options": ["red", "blue"], "answer": "green"},
        {"options": ["1", "2", "0"], "answer": "1"},
        {"options": ["red", "blue"], "answer": ["A", "B"]},
        {"options": ["red"], "answer": "red"},
        {"options": 3, "answer": "red"},
        {"possible": ["red", "blue"], "answer": 1},
        {"possible": ["red", "blue"], "answer": "B"},
    ],
)
def test_an_answer_that_is_unclear_is_an_error(row: dict, folder: Path) -> None:
    result = _check(_write(folder, {"image": "a.png", "question": "Which?"} | row))
    assert "unclear-choice" in {finding.kind for finding in result.findings}
    assert result.num_errors


def test_initials_are_no_letters_of_options(folder: Path) -> None:
    row = {"question": "Which?", "options": "E. coli|S. aureus|A.M.", "answer": "E. coli"}
    (sample,) = _samples(_write(folder, row))
    assert "A. E. coli\nB. S. aureus\nC. A.M.\n" in sample.messages[0].text
    assert sample.messages[1].text == "A"


@pytest.mark.parametrize(
    "row",
    [
        {"options": ["red", "", "blue"], "answer": 1},
        {"option1": "red", "option2": "blue", "answer": 0},
        {"A": "red", "C": "blue", "answer": "C"},
        {"choice_2": "red", "choice_3": "blue", "answer": 2},
    ],
)
def test_an_answer_to_options_with_a_gap_is_unclear(row: dict, folder: Path) -> None:
    assert "unclear-choice" in _found(_write(folder, {"question": "Which?"} | row))


def test_a_number_may_be_an_answer(folder: Path) -> None:
    row = {"image": "a.png", "question": "How many?", "answer": 3, "tags": ["cat", "dog"]}
    assert _found(_write(folder, row)) == {"unread-key": "nothing reads tags (1 row)"}
    assert _samples(folder / "mine.jsonl")[0].messages[1].text == "3"


# Images.


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", "image2": "b.png"},
        {"image_1": "a.png", "image_2": "b.png", "image_3": None},
        {"left_image": "a.png", "right_image": "b.png"},
        {"images": ["a.png", "b.png"], "source_image": "dir/a.png"},
        {"image": "['a.png', 'b.png']"},
        {"images": '["a.png", "b.png"]'},
    ],
)
def test_several_columns_of_images_are_all_shown(row: dict, folder: Path) -> None:
    (sample,) = _samples(_write(folder, row | {"question": "which?", "answer": "the second"}))
    assert sample.images == (folder / "a.png", folder / "b.png")
    assert sample.messages[0].text == "<image>\n<image>\nwhich?"


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"thumbnail": "b.png"}, "thumbnail"),
        ({"img": "b.png"}, "img"),
        ({"extra": ["b.png"]}, "extra"),
        ({"extra": {"path": "b.png", "bytes": None}}, "extra"),
        ({"mask": "data:image/png;base64,AAAA"}, "mask"),
        ({"thumb": "iVBORw0KGgo" + "A" * 300}, "thumb"),
        ({"files": [{"name": "b.png", "size": 3}]}, "files"),
        ({"side_picture": "gone.png"}, "side_picture"),
        ({"video": "b.mp4"}, "video"),
        ({"videos": ["b.mp4"]}, "videos"),
        ({"choices": ["x", "y"]}, "choices"),
        ({"conversation_history": [["a", "b"]]}, "conversation_history"),
        ({"system_instruction": "Be brief."}, "system_instruction"),
        ({"train_detail": [{"begin_offset": 0, "train": False}]}, "train_detail"),
    ],
)
def test_a_key_that_changes_the_meaning_is_an_error(more: dict, key: str, folder: Path) -> None:
    file = _write(folder, _llava() | more, _llava(1))
    (finding,) = _check(file).findings
    assert (finding.kind, finding.severity, finding.row) == ("unread-content", "error", 0)
    assert f'nothing reads the key "{key}", which holds' in finding.what
    mixture = Mixture([data_recipe(str(file))])
    mixture.check()
    assert [note for note in mixture.notes if f'"{key}"' in note and "(1 of 2 samples)" in note]


def test_other_keys_are_named_once(folder: Path) -> None:
    turns = [TURNS[0] | {"name": "Ann"}, TURNS[1]]
    rows = [
        {"messages": turns, "source": "web", "image_id": 3, "system_name": None, "note": ""},
        {
            "messages": TURNS,
            "source": "book",
            "copy": "a circle",
            "image": "a.png",
            "path": "a.png",
        },
    ]
    result = _check(_write(folder, *rows))
    (finding,) = result.findings
    assert (finding.kind, finding.severity, finding.row) == ("unread-key", "warning", 0)
    assert finding.what == (
        "nothing reads source (2 rows), image_id (1 row), messages[].name (1 row), copy (1 row), "
        "path (1 row)"
    )


def test_two_columns_of_bytes(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = [(folder / f"{name}.png").read_bytes() for name in "ab"]

    def write(name: str, **columns: Any) -> Path:
        file = folder / name
        table = {column: [value] for column, value in columns.items()}
        parquet.write_table(pyarrow.table(table | {"question": ["q?"], "answer": ["a"]}), file)
        return file

    (sample,) = _samples(write("a.parquet", image=images[0], image2=images[1]))
    assert [image.read() for image in sample.images] == images
    (sample,) = _samples(write("d.parquet", image=images[0], image_b=images[1]))
    assert len(sample.images) == 2
    assert "mask" in _found(write("b.parquet", mask=images[0], image=images[1]))["unread-content"]
    file = write("e.parquet", mask=images[0], image="b.png")
    assert _samples(file)[0].images == (folder / "b.png",)
    assert '"mask", which holds an image' in _found(file)["unread-content"]
    assert not _samples(write("f.parquet", mask=images[0], image=None))[0].images
    assert not _found(write("c.parquet", scan=images[0], file_name="x/scan.png"))


def test_an_llava_row_without_a_marker(folder: Path) -> None:
    rows = [{"id": str(i), "image": "a.png", "conversations": TALK} for i in range(2)]
    rows[1]["image"] = "b.png"
    file = _write(folder, *rows, name="geo.json")
    mixed = _write(folder, rows[0], SHAPES["several images"], name="mixed.json")
    assert _said(_samples(file)[0]) == _said(_samples(mixed)[0])
    assert _said(_samples(file)[0])[0] == ("user", "<image>\nwhich is larger?")

    result = _check(file)
    assert result.num_errors == 0 and {f.kind for f in result.findings} == {"added-marker"}
    fixed = write_fixed(result, folder / "fixed.json")
    kept = json.loads(fixed.file.read_text())
    assert fixed.num_kept == 2
    assert [row["conversations"][0]["value"] for row in kept] == ["<image>\nwhich is larger?"] * 2
    assert not _found(fixed.file)
    mixture = Mixture([data_recipe(str(file))])
    mixture.check()
    assert sum("without an <image> marker" in note for note in mixture.notes) == 1


def test_captions_without_an_image_are_counted(folder: Path) -> None:
    images = folder / "pics"
    images.mkdir()
    shutil.copy(folder / "a.png", images / "a.png")
    (images / "b.svg").write_text("<svg/>")
    (images / "d.tga").write_bytes(b"x")
    for name in "abcd":
        (images / f"{name}.txt").write_text("a circle")
    (finding,) = _check(images).findings
    assert (finding.kind, finding.row) == ("left-out", None)
    assert finding.what.startswith("3 captions have no image")
    assert "b.txt (beside b.svg), c.txt, d.txt (beside d.tga)" in finding.what
    assert any("3 captions" in note for note in Mixture([data_recipe(str(images))]).notes)


def test_a_file_address_is_a_path(folder: Path) -> None:
    (folder / "my image.png").write_bytes((folder / "a.png").read_bytes())
    for address, wanted in (
        (f"file://{folder}/a.png", "a.png"),
        (f"file://localhost{folder}/a.png", "a.png"),
        (f"file:{folder}/a.png", "a.png"),
        (f"file://{folder}/my%20image.png", "my image.png"),
    ):
        part = {"type": "image", "image": address}
        turns = [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}, TURNS[1]]
        (sample,) = _samples(_write(folder, {"messages": turns}))
        assert sample.images == (folder / wanted,)


# Shapes of other programs.


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        (
            {"instruction": "<image>what colour?", "input": "", "output": "red"},
            [("user", "<image>what colour?"), ("assistant", "red")],
        ),
        (
            {"instruction": "Translate.", "input": "rot", "output": "red", "history": []},
            [("user", "<image>\nTranslate.\nrot"), ("assistant", "red")],
        ),
        (
            {"problem": "what?", "solution": "red"},
            [("user", "<image>\nwhat?"), ("assistant", "red")],
        ),
        (
            {"texts": [{"user": "a?", "assistant": "b"}, {"user": "c?", "assistant": "d"}]},
            [("user", "<image>\na?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d")],
        ),
        (
            {"texts": [{"user": "a <image> <image>?", "assistant": "b"}]},
            [("user", "<image>\na  ?"), ("assistant", "b")],
        ),
    ],
)
def test_shapes_of_other_programs(row: dict, turns: list, folder: Path) -> None:
    (sample,) = _samples(_write(folder, row | {"images": ["a.png"]}))
    assert _said(sample) == turns and sample.images == (folder / "a.png",)


def test_a_part_has_one_text(folder: Path) -> None:
    part = {"type": "text", "text": "what?", "value": "which?"}
    turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "red"}]
    found = _found(_write(folder, {"messages": turns}))
    assert found == {"unread-key": "nothing reads messages[].content[].value (1 row)"}


def test_parts_with_a_value(folder: Path) -> None:
    parts = [{"type": "image_url", "value": "a.png"}, {"type": "text", "value": "what colour?"}]
    said = [{"type": "text", "value": "red"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]
    (sample,) = _samples(_write(folder, {"messages": turns}))
    assert _said(sample) == [("user", "<image>\nwhat colour?"), ("assistant", "red")]
    assert sample.images == (folder / "a.png",)


@pytest.mark.parametrize(
    "marker",
    [
        "<bbox>",
        "<ref-object>",
        "<|image_pad|>",
        "<|vision_start|>",
        "<image_placeholder>",
        "<img>",
        "[IMG]",
        "[IMG_BREAK]",
        "<image 1>",
        "<image1>",
        "<|image_1|>",
        "<IMG_CONTEXT>",
        "<start_of_image>",
        "<image_soft_token>",
        "<im_patch>",
        "<video>",
        "<audio>",
        "<|box_start|>",
        "<loc0123>",
        "<ImageHere>",
        "<fake_token_around_image>",
        "{image}",
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_placeholder_of_another_program_is_an_error(
    marker: str, place: int, folder: Path
) -> None:
    turns = [dict(turn) for turn in TURNS]
    turns[place]["content"] += f" {marker}"
    result = _check(_write(folder, {"messages": turns, "images": ["a.png"]}))
    assert {"foreign-marker"} == {finding.kind for finding in result.findings}
    assert result.num_errors == 1
