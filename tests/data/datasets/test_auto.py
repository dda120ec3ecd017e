"""The format is told from the data and said; what fits nothing, or two things, is refused with the
forms that are known.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mipha.data.dataset import LoadedData, load_data
from mipha.data.datasets import auto
from mipha.data.mixture import Mixture
from mipha.recipe import DataRecipe

SAVED = Path(__file__).parent / "saved_by_datasets"
MESSAGES = {
    "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}],
    "images": ["a.png"],
}
LLAVA = {
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "That."},
    ],
}
TEXT_ONLY = {
    "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
}
SHAREGPT = {"conversations": [{"from": "system", "value": "Hm"}, *TEXT_ONLY["conversations"]]}
QUESTION = {"image": "a.png", "question": "What?", "answer": "That."}
CAPTION = {"file_name": "a.png", "text": "That."}


def _load(path: Path) -> LoadedData:
    return load_data(DataRecipe(dataset="auto", root=path))


def _lines(*rows: object) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def _tar(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in (("0.png", b"x"), ("0.txt", b"That.")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("name", "text", "wanted", "words"),
    [
        ("a.jsonl", _lines(MESSAGES), "messages", "conversations whose turns have a role"),
        ("a.json", json.dumps([MESSAGES]), "messages", "role"),
        (
            "a.ndjson",
            _lines({"prompt": MESSAGES["messages"][:1], "completion": MESSAGES["messages"][1:]}),
            "messages",
            "role",
        ),
        ("a.json", json.dumps([LLAVA, TEXT_ONLY]), "llava", "human and gpt"),
        ("a.jsonl", _lines(TEXT_ONLY, LLAVA), "llava", "human and gpt"),
        ("a.json", _lines(LLAVA, LLAVA), "llava", "human and gpt"),
        ("a.jsonl", _lines(TEXT_ONLY, LLAVA, SHAREGPT), "sharegpt", "ShareGPT"),
        ("a.json", json.dumps([TEXT_ONLY | {"image": ["a.png", "b.png"]}]), "sharegpt", "ShareGPT"),
        ("a.json", json.dumps([TEXT_ONLY | {"images": ["a.png"]}]), "sharegpt", "ShareGPT"),
        ("a.jsonl", _lines({"conversations": MESSAGES["messages"]}), "sharegpt", "ShareGPT"),
        (
            "a.csv",
            "image,question,answer\na.png,What?,That.\n",
            "table",
            "rows of question and answer",
        ),
        (
            "a.csv",
            "Image;Caption\na.png;That.\n",
            "table",
            'rows of caption (a caption answers "Describe the image.")',
        ),
        (
            "a.tsv",
            "image_path\tprompt\tcompletion\na.png\tWhat?\tThat.\n",
            "table",
            "prompt and completion",
        ),
        ("a.jsonl", _lines(QUESTION), "table", "question and answer"),
        ("a.json", json.dumps([CAPTION]), "table", "text"),
        ("a.jsonl", "{broken\n" + _lines({"comment": "hm"}, MESSAGES), "messages", "role"),
    ],
)
def test_a_file_is_told_by_its_records(
    name: str, text: str, wanted: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(text)
    found, sentence = auto.detect(path)
    assert found == wanted
    assert (
        sentence.startswith(f"{path} is read as {wanted}: ")
        and words in sentence
        and "\n" not in sentence
    )
    if "broken" not in text:
        loaded = _load(path)
        assert loaded.format == sentence
        samples = [loaded.to_sample(row) for row in loaded.records]
        assert all(
            sample.messages[-1].text == "That." and sample.id.startswith(wanted)
            for sample in samples
        )


def _folder_of_captions(root: Path) -> None:
    (root / "a.png").touch()
    (root / "a.txt").write_text("That.")


def _metadata(root: Path) -> None:
    (root / "a.png").touch()
    (root / "metadata.jsonl").write_text(_lines(CAPTION))


def _splits_of_pictures(root: Path) -> None:
    for split in ("train", "test"):
        (root / split).mkdir()
        _folder_of_captions(root / split)


def _records_beside_pictures(root: Path) -> None:
    (root / "a.png").touch()
    (root / "settings.json").write_text("{}")
    for split in ("train", "val"):
        (root / f"{split}.jsonl").write_text(_lines(MESSAGES))


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (_folder_of_captions, "image_folder"),
        (_metadata, "image_folder"),
        (_splits_of_pictures, "image_folder"),
        (_records_beside_pictures, "messages"),
        (lambda root: _tar(root / "00000.tar"), "webdataset"),
        (lambda root: shutil.copytree(SAVED / "splits", root, dirs_exist_ok=True), "arrow"),
        (lambda root: shutil.copytree(SAVED / "messages", root, dirs_exist_ok=True), "arrow"),
        (
            lambda root: shutil.copy(
                SAVED / "questions.parquet", root / "train-00000-of-00001.parquet"
            ),
            "parquet",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_folder_is_told_by_what_lies_in_it(
    make: Callable[[Path], object], wanted: str, tmp_path: Path
) -> None:
    if wanted in ("arrow", "parquet"):
        pytest.importorskip("pyarrow")
    root = tmp_path / "mine"
    root.mkdir()
    make(root)
    found, sentence = auto.detect(root)
    assert (
        found == wanted and sentence.startswith(f"{root} ") and f"is read as {wanted}: " in sentence
    )
    loaded = _load(root)
    assert (
        [loaded.to_sample(row).id.partition("/")[0] for row in loaded.records]
        == [wanted] * len(loaded)
        != []
    )


def test_one_tar_or_arrow_file(tmp_path: Path) -> None:
    _tar(tmp_path / "a.tar")
    assert auto.detect(tmp_path / "a.tar")[0] == "webdataset"
    pytest.importorskip("pyarrow")
    assert auto.detect(SAVED / "messages/data-00000-of-00001.arrow")[0] == "arrow"
    assert auto.detect(SAVED / "questions.parquet")[1].endswith(
        "is read as parquet: rows of question and answer"
    )


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        (
            "a.jsonl",
            _lines({"picture": "a.png", "tags": ["cat"]}),
            "its first record holds picture, tags",
        ),
        ("a.jsonl", "", "it holds no record"),
        ("a.json", "[3]", "its first record holds 3"),
        (
            "a.csv",
            "a.png,What?,That.\nb.png,Why?,So.\n",
            "its first record holds a.png, What[?], That",
        ),
        ("a.zip", "PK", "the format of a .zip file is not known; unpack it"),
        ("nameless", "", "the format of a nameless kind of file is not known"),
    ],
)
def test_what_fits_nothing_is_answered_with_the_forms(
    name: str, text: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence) as caught:
        auto.detect(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name)) and auto.FORMS in str(caught.value)


def test_the_forms_are_forms(tmp_path: Path) -> None:
    """What the message shows is found to be what it says."""
    objects, decoder = [], json.JSONDecoder()
    text = " ".join(auto.FORMS.split())
    while "{" in text:
        found, end = decoder.raw_decode(text[text.index("{") :])
        objects.append(found)
        text = text[text.index("{") + end :]
    shapes = ("messages", "llava", "texts", "documents")
    for number, (record, wanted) in enumerate(zip(objects, shapes, strict=True)):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(record))
        assert auto.detect(tmp_path / f"{number}.jsonl")[0] == wanted
        loaded = _load(tmp_path / f"{number}.jsonl")
        assert loaded.to_sample(loaded.records[0]).images == (tmp_path / "cat.jpg",)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (
            {"a.jsonl": _lines(MESSAGES | LLAVA)},
            "a.jsonl fits more than one format, messages and sharegpt",
        ),
        (
            {"train.jsonl": _lines(MESSAGES), "test.csv": "image,caption"},
            "holds train.jsonl and test.csv, which may each be the data",
        ),
        (
            {"metadata.csv": "file_name,text", "train.jsonl": _lines(MESSAGES)},
            "holds metadata.csv and train.jsonl",
        ),
        ({"readme.md": "hello"}, "holds no data of a known format; wanted one of"),
        ({"a.zip": "PK"}, "holds no data of a known format; unpack a.zip"),
        ({"a.png": "", "b.png": ""}, "a.png: it has no caption a.txt beside it"),
        ({"a.jsonl": "{broken"}, "a.jsonl, line 1: this is not valid JSON"),
        (
            {"a.json": "[" + json.dumps(MESSAGES)},
            "a.json is not valid JSON: its list is not closed",
        ),
    ],
)
def test_what_is_unclear_is_refused(files: dict[str, str], sentence: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        auto.detect(tmp_path)


def test_missing_things_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="no data at"):
        auto.detect(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match="set the data's root"):
        load_data(DataRecipe(dataset="auto"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("questions.parquet", "splits"):
        with pytest.raises(
            ModuleNotFoundError, match=r'not installed: pip install "mipha-vlm\[data\]"'
        ):
            auto.detect(SAVED / name)


def test_the_first_records_are_looked_at_once_a_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text(_lines(MESSAGES, MESSAGES))
    looked_at = []
    shapes_of = auto.shapes_of
    monkeypatch.setattr(
        auto, "shapes_of", lambda content: looked_at.append(content) or shapes_of(content)
    )
    mixture = Mixture([DataRecipe(dataset="auto", root=tmp_path / "a.jsonl")])
    assert mixture.notes and list(mixture)
    assert len(looked_at) == 2
