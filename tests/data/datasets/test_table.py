"""Rows of (image, question, answer) or (image, caption), by the names that people give such
columns.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mipha.data.dataset import load_data
from mipha.data.datasets import table
from mipha.data.sample import Sample
from mipha.recipe import DataRecipe


def _sample(root: Path, row: object) -> Sample:
    (root / "train.jsonl").write_text(json.dumps(row))
    return table.to_sample(table.load(root, "train")[0])


@pytest.mark.parametrize("name", ["mine.csv", "mine.tsv", "semicolons.csv"])
def test_a_table_of_questions(name: str, tmp_path: Path) -> None:
    mark = "\t" if name.endswith("tsv") else ";" if name.startswith("semi") else ","
    rows = [
        ["Image", "Question", " answer "],
        ["cats/a.jpg", '"What, is; it?"', '"A ""cat"".\nA big one."'],
        ["", "Hello?", "Hi."],
    ]
    (tmp_path / name).write_text("\n".join(mark.join(row) for row in rows), encoding="utf-8-sig")
    first, second = (table.to_sample(row) for row in table.load(tmp_path / name, "train"))
    assert [message.text for message in first.messages] == [
        "<image>\nWhat, is; it?",
        'A "cat".\nA big one.',
    ]
    assert first.images == (tmp_path / "cats/a.jpg",)
    assert ([message.text for message in second.messages], second.images) == (["Hello?", "Hi."], ())
    assert [first.id, second.id] == [f"table/{name[:-4]}/2", f"table/{name[:-4]}/4"]


def test_a_table_of_several_kinds_of_rows(tmp_path: Path) -> None:
    text = "image,question,prompt,answer,caption\na,What?,,That,\nb,,,,A cat.\nc,,Who?,Me,\n"
    (tmp_path / "mine.csv").write_text(text + "d,Why?,,,A dog.\n")
    *rows, unanswered = table.load(tmp_path / "mine.csv", "train")
    said = [[message.text for message in table.to_sample(row).messages] for row in rows]
    assert said == [
        ["<image>\nWhat?", "That"],
        ["<image>\nDescribe the image.", "A cat."],
        ["<image>\nWho?", "Me"],
    ]
    with pytest.raises(ValueError, match="its answer is 'None'"):
        table.to_sample(unanswered)


def test_columns_of_other_names_by_their_meaning(tmp_path: Path) -> None:
    text = "Bild,Die Frage,Antwort,Wahl\na,Was?,1,\"['x', 'y']\"\n"
    (tmp_path / "mine.csv").write_text(text)
    said = {"image": "Bild", "question": "Die Frage", "answer": "Antwort", "options": "Wahl"}
    data = load_data(DataRecipe(dataset="auto", root=tmp_path / "mine.csv", columns=said))
    sample = data.to_sample(data.records[0])
    assert sample.messages[0].text.startswith("<image>\nWas?\nA. x\nB. y\n")
    assert (sample.messages[1].text, sample.images) == ("B", (tmp_path / "a",))
    wrong = DataRecipe(dataset="auto", root=tmp_path / "mine.csv", columns=said | {"answer": "X"})
    data = load_data(wrong)
    with pytest.raises(ValueError, match="it has no column 'X' for the answer; the columns are"):
        data.to_sample(data.records[0])


def test_an_empty_list_of_images_is_none(tmp_path: Path) -> None:
    row = {"question": "What?", "answer": "That"}
    assert _sample(tmp_path, row | {"images": [], "image": "a"}).images == (tmp_path / "a",)
    with pytest.raises(ValueError, match="the image path is ''"):
        _sample(tmp_path, row | {"images": [""]})


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"question": "What?", "answer": float("nan")}, "its answer is 'None'"),
        ({"question": "What?", "answer": float("inf")}, "its answer is 'inf'"),
        ({"Question": "What?", "question": "Why?", "answer": "a"}, "two columns 'question'"),
        ({"prompt": [{"role": "user"}], "completion": "a"}, "its completion is 'a'; wanted one"),
        (
            {"question": "A?", "options": ["a", {"text": "b"}], "answer": 0},
            "wanted a list of texts",
        ),
        ({"instruction": "Sort", "input": ["b"], "output": "b"}, r"its input is \"\['b'\]"),
    ],
)
def test_cells_that_are_no_words_are_refused(row: dict, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        _sample(tmp_path, row)


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        (
            {"image": "a", "instruction": "Add", "input": float("nan"), "output": 2},
            "<image>\nAdd",
            "2",
        ),
        ({"image": "a", "question": "What?", "answer": "That"}, "<image>\nWhat?", "That"),
        ({"image_path": "a", "Prompt": "What?", "Completion": "That"}, "<image>\nWhat?", "That"),
        ({"File Name": "a", "query": "What?", "response": "That"}, "<image>\nWhat?", "That"),
        ({"filename": "a", "question": "How many?", "answer": 3}, "<image>\nHow many?", "3"),
        ({"image": "a", "question": "Is <image> it?", "answer": "Yes"}, "Is <image> it?", "Yes"),
        ({"image": "a", "caption": "A cat."}, "<image>\nDescribe the image.", "A cat."),
        ({"file_name": "a", "text": "A cat."}, "<image>\nDescribe the image.", "A cat."),
        (
            {"images": ["a"], "question": "What?", "answer": "That", "caption": "A cat."},
            "<image>\nWhat?",
            "That",
        ),
    ],
)
def test_which_columns_are_read(row: dict, question: str, answer: str, tmp_path: Path) -> None:
    sample = _sample(tmp_path, row)
    assert [message.text for message in sample.messages] == [question, answer]
    assert sample.images == (tmp_path / "a",)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"image": "a", "label": "cat"},
            r"has the columns image, label; wanted a question \(question, prompt, query",
        ),
        ({"caption": "A cat."}, "has the columns caption; wanted"),
        ({}, "has the columns none; wanted"),
        ("a picture", "the row is not an object"),
        ({"image": None, "caption": "A cat."}, "its caption is about no image"),
        ({"image": "a", "question": "What?", "answer": ""}, "its answer is ''; wanted text"),
        ({"image": "a", "question": " ", "answer": "That"}, "its question is ' '"),
        ({"image": "a", "question": "What?", "answer": None}, "its answer is 'None'"),
        ({"image": "a", "question": "What?", "answer": True}, "its answer is 'True'"),
        ({"image": "a", "question": "What?", "answer": ["x", "y"]}, "its answer is"),
        ({"image": "/etc/passwd", "question": "What?", "answer": "That"}, "leads out"),
        (
            {"image": "a", "question": "A <image>?", "answer": "an <image>"},
            "2 <image> markers for 1 images",
        ),
    ],
)
def test_a_row_that_is_wrong_is_named(row: object, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"train\.jsonl, line 1.*{sentence}"):
        _sample(tmp_path, row)


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        (["no", "yes", "yes"], "yes"),
        (["no", "yes", "yes", "no"], "no"),
        ([{"answer": "a"}, {"answer": "b"}, {"answer": "b"}], "b"),
    ],
)
def test_of_several_answers_the_most_frequent_is_learned(
    answers: list, wanted: str, tmp_path: Path
) -> None:
    row = {"question": "What?", "answers": answers}
    assert _sample(tmp_path, row).messages[1].text == wanted
    sample = _sample(tmp_path, row | {"multiple_choice_answer": "this"})
    assert (sample.messages[1].text, sample.remarks) == ("this", ())
    sample = _sample(tmp_path, row | {"multiple_choice_answer": None})
    assert (sample.messages[1].text, sample.remarks) == (wanted, ())


def test_lists_of_questions_are_turns(tmp_path: Path) -> None:
    row = {"image": "a", "questions": ["Who?", "When?"], "answers": ["I", "Now"]}
    texts = [message.text for message in _sample(tmp_path, row).messages]
    assert texts == ["<image>\nWho?", "I", "When?", "Now"]
    with pytest.raises(
        ValueError, match="its questions is a list of 2, and its answers is a list of 1"
    ):
        _sample(tmp_path, row | {"answers": ["I"]})
    with pytest.raises(ValueError, match="question 1 or its answer is 'When\\?', ''"):
        _sample(tmp_path, row | {"answers": ["I", ""]})


def test_the_recipe_may_name_the_columns(tmp_path: Path) -> None:
    row = {"Pic": "a.png", "ask": "What?", "said": ["x", "y", "y"], "question": "Other?"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    columns = {"image": "Pic", "question": "ask", "answer": "said"}
    data = load_data(DataRecipe(dataset="table", root=tmp_path, columns=columns))
    sample = data.to_sample(data.records[0])
    assert [message.text for message in sample.messages] == ["<image>\nWhat?", "y"]
    assert sample.images == (tmp_path / "a.png",)
    assert [remark.what for remark in sample.remarks] == ["other question"]

    data = load_data(DataRecipe(dataset="table", root=tmp_path, columns={"question": "asked"}))
    with pytest.raises(ValueError, match="no column 'asked' for the question; the columns are pic"):
        data.to_sample(data.records[0])
