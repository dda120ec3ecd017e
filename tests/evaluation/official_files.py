"""Small folders in the official formats of all benchmarks, as they lie after the downloads; pictures of a few pixels.

Beside the labelled splits there are the questions of the private ones: VQAv2 test-dev and test, VizWiz test, MMBench test.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MME_SUBTASKS = (
    *(
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    ),
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)

# Question id to an answer that earns full marks, in the order of the files.
GOLD: dict[str, dict[str, str]] = {
    "easy_vqa": {
        **{"test/0/0": "yes", "test/0/1": "it is a circle", "test/0/2": "no"},
        **{"test/1/0": "no", "test/1/1": "teal", "test/1/2": "so yes"},
    },
    "gqa": {"201": "yes", "202": "No.", "203": "red", "204": "no", "205": "Yes", "206": "dog"},
    "mmbench": {
        "241": "A",
        "1000241": "B",
        "7": "C",
        "1000007": "B",
        "2000007": "A",
        "9": "B",
        "1000009": "A",
    },
    "mmbench_cn": {"5": "B", "1000005": "A", "8": "A", "1000008": "B"},
    "mme": {
        f"{subtask}/{number}": answer
        for subtask in MME_SUBTASKS
        for number, answer in enumerate(("Yes", "No"))
    },
    "mmvet": {
        "v1_0": "x = -1 or x = -5",
        "v1_1": "A red car",
        "v1_2": "On the left",
        "v1_3": "It pokes fun at names",
    },
    "pope": {
        **{"1": "Yes", "2": "No", "3": "no", "4": "Yes, there is"},
        **{"10000001": "Yes", "10000002": "No", "10000003": "yes"},
        **{"20000001": "There is not", "20000002": "Yes", "20000003": "No", "20000004": "yes"},
    },
    "scienceqa": {"4": "A", "7": "B", "12": "The answer is E.", "15": "A. yes", "20": "B"},
    "seedbench": {"101669": "A", "104933": "B", "104934": "B", "89257": "D"},
    "textvqa": {"34602": "Yes", "34603": "B", "34604": "nokia"},
    "vizwiz": {
        **{"VizWiz_val_00000000.jpg": "unanswerable", "VizWiz_val_00000001.jpg": "No."},
        **{"VizWiz_val_00000002.jpg": "2", "VizWiz_val_00000003.jpg": "yes"},
    },
    "vqav2": {"42000": "yes", "42001": "red", "42002": "2", "139000": "no", "139001": "B"},
}

SCORED = {
    name: [question for question in answers if name[:7] != "mmbench" or int(question) < 1_000_000]
    for name, answers in GOLD.items()
}
"""Ids that have a score of their own: MMBench's rotations share that of the question as it stands."""


def write_official_files(root: Path) -> Path:
    """One folder a benchmark, by name; returns the root."""
    for name, write in WRITERS.items():
        write(root / name)
    return root


def picture(name: str, kind: str = "PNG") -> bytes:
    """A picture of its own for every name."""
    pixels = np.random.default_rng(zlib.crc32(name.encode())).integers(
        0, 255, (6, 8, 3), dtype=np.uint8
    )
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_pope(folder: Path) -> None:
    """`coco_pope_*.json` and `val2014/`."""
    first, second = (f"COCO_val2014_{number:012d}.jpg" for number in (42, 139))
    subsets = {
        "adversarial": [(1, first, "yes"), (2, first, "no"), (3, second, "no"), (4, second, "yes")],
        "random": [(1, first, "yes"), (2, first, "no"), (3, second, "yes")],
        "popular": [(1, first, "no"), (2, first, "yes"), (3, second, "no"), (4, second, "yes")],
    }
    for subset, rows in subsets.items():
        write_pope_subset(folder, subset, rows)
    _pictures(folder / "val2014", (first, second))


def write_pope_subset(folder: Path, subset: str, rows: Iterable[tuple[int, str, str]]) -> None:
    """One of POPE's three files from (question id, image, label)."""
    lines = [
        {
            "question_id": number,
            "image": image,
            "text": f"Is there a {subset} thing, number {number}, in the image?",
            "label": label,
        }
        for number, image, label in rows
    ]
    _write(folder / f"coco_pope_{subset}.json", "".join(json.dumps(line) + "\n" for line in lines))


def _write_easy_vqa(folder: Path) -> None:
    red = "is there a red shape?"
    rows = {
        "train": [
            [red, "no", 0],
            [red, "no", 1],
            [red, "yes", 2],
            ["what color is the shape?", "blue", 0],
        ],
        "test": [
            *(
                [red, "yes", 0],
                ["what shape is in the image?", "circle", 0],
                ["is there a blue shape?", "no", 0],
            ),
            *(
                [red, "no", 1],
                ["what color is the shape?", "teal", 1],
                ["is there not a circle?", "yes", 1],
            ),
        ],
    }
    for part, questions in rows.items():
        _write(folder / part / "questions.json", questions)
        _pictures(folder / part / "images", [f"{number}.png" for number in range(3)])


def _write_gqa(folder: Path) -> None:
    rows = [
        ("201", "n1", "Is there a cat?", "yes", "verify", "obj", "exist"),
        ("202", "n1", "Is the cat red?", "no", "verify", "attr", "verify color"),
        ("203", "n1", "What color is the car?", "red", "query", "attr", "query"),
        ("204", "n2", "Is it indoors?", "no", "verify", "global", "verify"),
        ("205", "n2", "Are there dogs?", "yes", "verify", "obj", "exist"),
        ("206", "n2", "Is that a cat or a dog?", "dog", "choose", "cat", "choose name"),
    ]
    questions = {
        name: {
            "semantic": [{"operation": operation, "argument": "it", "dependencies": []}],
            "question": question,
            "imageId": image,
            "isBalanced": True,
            "groups": {"global": semantic, "local": None},
            "answer": answer,
            "types": {"detailed": "x", "semantic": semantic, "structural": structural},
            "fullAnswer": "",
        }
        for name, image, question, answer, structural, semantic, operation in rows
    }
    _write(folder / "testdev_balanced_questions.json", questions)
    _pictures(folder / "images", ("n1.jpg", "n2.jpg"))


def _write_mmbench(folder: Path) -> None:
    questions = [
        (241, "Which is it?", "None", ("a cat", "a dog"), "A", "logic_reasoning"),
        (7, "Which number?", "Look well.", ("one", "two", "three"), "C", "coarse_perception"),
        (9, "Which colour?", "", ("red", "blue"), "B", "coarse_perception"),
    ]
    for split in ("dev", "test"):
        # Files of 2023 repeat a question's picture in every rotation.
        _write_table(
            folder / f"mmbench_{split}_20230712.tsv", split, questions, repeat_pictures=True
        )


def _write_mmbench_cn(folder: Path) -> None:
    questions = [
        (5, "图中有几只猫？", "看图。", ("一只", "两只"), "B", "logic_reasoning"),
        (8, "这是什么颜色？", "", ("红色", "蓝色"), "A", "attribute_reasoning"),
    ]
    for split in ("dev", "test"):
        _write_table(
            folder / f"mmbench_{split}_cn_20231003.tsv", split, questions, repeat_pictures=False
        )


def _write_table(path: Path, split: str, questions: Sequence[tuple], repeat_pictures: bool) -> None:
    columns = [
        "index",
        "question",
        "hint",
        *"ABCD",
        "answer",
        "category",
        "image",
        "source",
        "l2-category",
        "comment",
        "split",
    ]
    if split == "test":
        columns.remove("answer")
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, delimiter="\t", extrasaction="ignore", restval="")
    writer.writeheader()
    for index, question, hint, choices, answer, ability in questions:
        cell = base64.b64encode(picture(f"{path.name} {index}")).decode()
        for turn in range(len(choices)):
            turned = dict(zip("ABCD", choices[turn:] + choices[:turn], strict=False))
            label = next(
                letter
                for letter, choice in turned.items()
                if choice == choices["ABCD".index(answer)]
            )
            row = {
                "index": index + turn * 1_000_000,
                "question": question,
                "hint": hint,
                **turned,
                "answer": label,
                "category": "x",
            }
            image = cell if repeat_pictures or not turn else str(index)
            writer.writerow(
                row | {"image": image, "source": "s", "l2-category": ability, "split": split}
            )
    _write(path, file.getvalue())


def _write_mme(folder: Path) -> None:
    for subtask in MME_SUBTASKS:
        lines = "".join(
            f"0001.jpg\tIs it {subtask} {which}? Please answer yes or no.\t{which}\n"
            for which in ("Yes", "No")
        )
        _write(folder / f"{subtask}.txt", lines)
        _pictures(folder / subtask, ("0001.jpg",))


def _write_mmvet(folder: Path) -> None:
    rows = [
        ("v1_0", "a.png", "What is x?", "-1<AND>-5", ["ocr", "math"]),
        ("v1_1", "a.png", "What is there?", "car<OR>red car", ["rec"]),
        ("v1_2", "b.png", "Where?", "left", ["rec", "spat"]),
        ("v1_3", "b.png", "Why is it fun?", "names", ["rec", "know", "gen"]),
    ]
    records = {
        name: {
            "imagename": image,
            "imagesource": "x",
            "question": question,
            "answer": answer,
            "capability": capabilities,
        }
        for name, image, question, answer, capabilities in rows
    }
    _write(folder / "mm-vet.json", records)
    _pictures(folder / "images", ("a.png", "b.png"))


def _write_scienceqa(folder: Path) -> None:
    rows = {
        "1": ("Trained on?", ["yes", "no"], 0, "", None),
        "4": ("Which figure?", ["chiasmus", "apostrophe"], 0, "Read.", None),
        "7": ("Which state?", ["Maine", "Utah", "Ohio", "Iowa"], 1, "", "image.png"),
        "12": ("Select one.", list("vwxyz"), 4, "Look.", "image.png"),
        "15": ("Is it warm?", ["yes", "no"], 0, "", "image.png"),
        "20": ("Is it cold?", ["yes", "no"], 1, "", "image.png"),
    }
    rest = dict.fromkeys(
        ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution"), "x"
    )
    problems = {
        name: rest | dict(zip(("question", "choices", "answer", "hint", "image"), row, strict=True))
        for name, row in rows.items()
    }
    _write(folder / "problems.json", problems)
    _write(folder / "pid_splits.json", {"train": ["1"], "test": ["4", "7", "12", "15", "20"]})
    for name, row in rows.items():
        _pictures(folder / "images" / "test" / name, ("image.png",) if row[4] else ())


def _write_seedbench(folder: Path) -> None:
    rows = [
        ("101669", "1454426_2591111986", 5, "A", "image"),
        ("104933", "1454426_2591111986", 1, "B", "image"),
        ("104934", "90_1", 1, "B", "image"),
        (89257, "90_1", 5, "D", "image"),
        ("v1738", "94328.webm", 10, "C", "video"),
    ]
    names = ("question_id", "data_id", "question_type_id", "answer", "data_type")
    choices = {"choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four"}
    questions = [
        dict(zip(names, row, strict=True)) | choices | {"question": f"How many in number {row[0]}?"}
        for row in rows
    ]
    types = {"Scene Understanding": 1, "Instances Counting": 5, "Action Recognition": 10}
    _write(folder / "SEED-Bench.json", {"questions": questions, "question_type": types})
    _pictures(folder / "SEED-Bench-image", ("1454426_2591111986", "90_1"), kind="JPEG")


def _write_textvqa(folder: Path) -> None:
    rows = [
        (34602, "003a8ae2ef43b901", "is it red?", ["yes"] * 10),
        (34603, "003a8ae2ef43b901", "which letter?", ["b"] * 6 + ["no"] * 4),
        (34604, "0054c91397f2fe05", "what brand?", ["nokia"] * 8 + ["Nokia phone", "no"]),
    ]
    data = [
        dict(zip(("question_id", "image_id", "question", "answers"), row, strict=True))
        | {"set_name": "val"}
        for row in rows
    ]
    _write(
        folder / "TextVQA_0.5.1_val.json",
        {
            "dataset_type": "val",
            "dataset_name": "textvqa",
            "dataset_version": "0.5.1",
            "data": data,
        },
    )
    tokens = [
        {"image_id": rows[0][1], "ocr_tokens": ["B", "STOP"]},
        {"image_id": rows[2][1], "ocr_tokens": []},
    ]
    _write(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})
    _pictures(folder / "train_images", [f"{rows[number][1]}.jpg" for number in (0, 2)])


def _write_vizwiz(folder: Path) -> None:
    answers = [
        ["unanswerable"] * 7 + ["no"] * 3,
        ["no"] * 10,
        ["2"] * 4 + ["yes"] * 6,
        ["yes"] * 10,
    ]
    kinds = ("unanswerable", "yes/no", "number", "yes/no")
    val = [
        {
            **{
                "image": f"VizWiz_val_{number:08d}.jpg",
                "question": f"Is this can number {number}? What is it?",
                "answer_type": kind,
            },
            **{
                "answers": [{"answer": text, "answer_confidence": "yes"} for text in texts],
                "answerable": int(number > 0),
            },
        }
        for number, (kind, texts) in enumerate(zip(kinds, answers, strict=True))
    ]
    test = [
        {"image": f"VizWiz_test_{number:08d}.jpg", "question": f"Is this number {number}?"}
        for number in range(5)
    ]
    for split, records in (("val", val), ("test", test)):
        _write(folder / f"{split}.json", records)
        _pictures(folder / split, [record["image"] for record in records])


def _write_vqav2(folder: Path) -> None:
    rows = [
        (42000, 42, "Is it a cat?", "yes/no", ["yes"] * 10),
        (42001, 42, "What color is it?", "other", ["red"] * 5 + ["dark red"] * 3 + ["no"] * 2),
        (42002, 42, "How many are there?", "number", ["2"] * 3 + ["two"] * 3 + ["3"] * 4),
        (139000, 139, "Is it red?", "yes/no", ["no"] * 6 + ["yes"] * 4),
        (139001, 139, "Which letter is it?", "other", ["b"] * 9 + ["no"]),
    ]
    annotations = [
        {
            **{
                "question_id": question_id,
                "image_id": image_id,
                "answer_type": kind,
                "question_type": text[:5].lower(),
            },
            "answers": [
                {"answer": one, "answer_confidence": "yes", "answer_id": n}
                for n, one in enumerate(answers, start=1)
            ],
        }
        for question_id, image_id, text, kind, answers in rows
    ]
    _write(
        folder / "v2_mscoco_val2014_annotations.json",
        {"data_subtype": "val2014", "annotations": annotations},
    )
    test = [
        (number, number // 1000, f"Is it number {number}?")
        for number in (1000, 1001, 1002, 16000, 16001)
    ]
    parts = {
        "val2014": [row[:3] for row in rows],
        "test2015": test,
        "test-dev2015": [test[number] for number in (0, 2, 3)],
    }
    for subtype, part in parts.items():
        questions = [
            dict(zip(("question_id", "image_id", "question"), row, strict=True)) for row in part
        ]
        _write(
            folder / f"v2_OpenEnded_mscoco_{subtype}_questions.json",
            {"data_subtype": subtype, "questions": questions},
        )
    for name, numbers in (("val2014", (42, 139)), ("test2015", (1, 16))):
        _pictures(folder / name, [f"COCO_{name}_{number:012d}.jpg" for number in numbers])


WRITERS: dict[str, Callable[[Path], None]] = {
    **{
        "easy_vqa": _write_easy_vqa,
        "gqa": _write_gqa,
        "mmbench": _write_mmbench,
        "mmbench_cn": _write_mmbench_cn,
        "mme": _write_mme,
    },
    **{
        "mmvet": _write_mmvet,
        "pope": write_pope,
        "scienceqa": _write_scienceqa,
        "seedbench": _write_seedbench,
    },
    **{"textvqa": _write_textvqa, "vizwiz": _write_vizwiz, "vqav2": _write_vqav2},
}


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        content if isinstance(content, str) else json.dumps(content, ensure_ascii=False),
        encoding="utf-8",
    )


def _pictures(folder: Path, names: Iterable[str], kind: str = "") -> None:
    for name in names:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(
            picture(
                f"{folder.name}/{name}", kind or {".jpg": "JPEG", ".png": "PNG"}[Path(name).suffix]
            )
        )
