"""MMBench: the file as pandas reads it, CircularEval, the judge, the upload."""

from __future__ import annotations

import base64
import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mipha.comparison.statistics import tally, values
from mipha.evaluation.benchmark import Judgement, Question, Reply
from mipha.evaluation.benchmarks import mmbench
from tests.evaluation.official import BrokenLabel, Official, Upload, write_file
from tests.evaluation.official import make_image as official_image

COLUMNS = [
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
LETTER = "\nAnswer with the option's letter from the given choices directly."


def make_image(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(file, "png")
    return file.getvalue()


RED = base64.b64encode(make_image("red")).decode()
BLUE = base64.b64encode(make_image("blue")).decode()


def row(index: int, *choices: str, answer: str = "A", **cells: str) -> dict[str, str]:
    """One official row, two options where none are given."""
    given = {
        "index": str(index),
        "question": "Which?",
        "image": RED,
        "split": "dev",
        "answer": answer,
    }
    return (
        dict.fromkeys(COLUMNS, "")
        | given
        | dict(zip("ABCD", choices or ("red", "blue"), strict=False))
        | cells
    )


def rotations(index: int, *choices: str, answer: str = "A", **cells: str) -> list[dict[str, str]]:
    """A question with all rotations of its options."""
    at = "ABCD".index(answer)
    turned = [
        (choices[k:] + choices[:k], "ABCD"[(at - k) % len(choices)]) for k in range(len(choices))
    ]
    return [
        row(index + k * 1_000_000, *options, answer=label, **cells)
        for k, (options, label) in enumerate(turned)
    ]


def write(path: Path, rows: Sequence[Mapping[str, str]], columns: Sequence[str] = COLUMNS) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def labelled(tmp_path: Path, *rows: Mapping[str, str]) -> list[Question]:
    return mmbench.BENCHMARK.read_labels(write(tmp_path / "mmbench_dev_20230712.tsv", rows))


def measured(judgement: Judgement) -> dict[str, float]:
    return values(tally(judgement.contributions), mmbench.BENCHMARK.measure)


class Judge:
    """Gives the replies it was handed for each row, in order, and remembers what it was asked."""

    num_runs = None
    notes = ()

    def __init__(self, **replies: Sequence[str]) -> None:
        self.replies = {name.lstrip("_"): list(texts) for name, texts in replies.items()}
        self.asked: list[str] = []
        self.prompts: list[str] = []
        self.forgotten: list[tuple[str, int]] = []

    def ask(
        self,
        question_id: str,
        prompt: str,
        *,
        run: int = 0,
        attempt: int = 0,
        temperature: float = 0.0,
        max_tokens: int = 16,
    ) -> Reply:
        assert (run, temperature) == (0, 0.0) and attempt == self.asked.count(question_id)
        self.asked.append(question_id)
        self.prompts.append(prompt)
        return Reply(self.replies[question_id].pop(0))

    def forget(self, question_id: str, run: int = 0) -> None:
        self.forgotten.append((question_id, run))


@pytest.mark.parametrize(
    ("cells", "text", "choices"),
    [
        ({}, "Which?\nA. red\nB. blue", "AB"),
        ({"hint": "Look."}, "Look.\nWhich?\nA. red\nB. blue", "AB"),
        ({"hint": "None"}, "Which?\nA. red\nB. blue", "AB"),
        ({"hint": "NAN"}, "Which?\nA. red\nB. blue", "AB"),
        ({"hint": "none of it"}, "none of it\nWhich?\nA. red\nB. blue", "AB"),
        ({"C": "none"}, "Which?\nA. red\nB. blue", "ABC"),
        ({"C": "NONE", "D": "grey"}, "Which?\nA. red\nB. blue", "ABCD"),
        ({"C": "None", "D": "grey"}, "Which?\nA. red\nB. blue", "ABCD"),
        ({"B": "NA", "C": "grey"}, "Which?\nA. red", "ABC"),
        ({"B": "nan", "C": "grey"}, "Which?\nA. red", "AC"),
        ({"C": "n/a"}, "Which?\nA. red\nB. blue", "ABC"),
        ({"C": " "}, "Which?\nA. red\nB. blue\nC.  ", "ABC"),
        (
            {"C": 'a "quoted"\nline', "D": "N.A."},
            'Which?\nA. red\nB. blue\nC. a "quoted"\nline\nD. N.A.',
            "ABCD",
        ),
    ],
)
def test_the_prompt_ends_where_the_official_one_does_and_the_scorer_knows_every_option(
    cells: dict[str, str], text: str, choices: str, tmp_path: Path
) -> None:
    (question,) = labelled(tmp_path, row(241) | cells)
    assert question.text == text + LETTER
    assert "".join(question.facts["choices"]) == choices
    assert question.id == "241" and question.image is None


def test_circular_eval(tmp_path: Path) -> None:
    """Right four times, wrong once, wrong beside one unreadable, unreadable once, right twice."""
    lr, ar = (
        {"l2-category": "logic_reasoning", "category": "x"},
        {"l2-category": "attribute_reasoning", "category": "y"},
    )
    asked = labelled(
        tmp_path,
        *rotations(1, "red", "blue", "grey", "pink", **lr),
        *rotations(2, "red", "blue", answer="B", **ar),
        *rotations(3, "red", "blue", image=BLUE, **lr),
        *rotations(4, "red", "blue", image=BLUE, **lr),
        *rotations(5, "red", "blue", answer="B", **(ar | {"l2-category": "coarse_perception"})),
    )
    answers = {
        "1": "A",
        "1000001": "D",
        "2000001": "C.",
        "3000001": "(B)",
        "2": "B",
        "1000002": "B",
    }
    answers |= {
        "3": "A or B",
        "1000003": "A",
        "4": "A",
        "1000004": "no idea",
        "5": "blue",
        "1000005": "A",
    }
    judgement = mmbench.BENCHMARK.score(asked, answers)
    # Rotated once, the first option is the last: gold letters go A D C B for four options, A B and
    # B A for two.
    assert judgement.per_question == {"1": 1, "2": 0, "3": 0, "4": 0, "5": 1}
    assert judgement.parsed == {
        **{"1": "A", "1000001": "D", "2000001": "C", "3000001": "B", "2": "B", "1000002": "B"},
        **{"3": None, "1000003": "A", "4": "A", "1000004": None, "5": "B", "1000005": "A"},
    }
    assert measured(judgement) == {
        **{"accuracy": 40, "vanilla": 80, "unreadable": 2},
        **{"l2-category.AR": 0, "l2-category.CP": 100, "l2-category.LR": pytest.approx(100 / 3)},
        **{"category.x": pytest.approx(100 / 3), "category.y": 50},
    }
    clusters = [cluster for cluster, _ in judgement.contributions]
    assert (
        len(clusters) == 5
        and len(set(clusters)) == 2
        and clusters[0] == clusters[1] == clusters[4] != clusters[2] == clusters[3]
    )
    assert judgement.submission == answers
    assert judgement.notes == (
        "scored by rules, without a judge (exact_matching): 2 of 12 answers name no option and "
        "count as wrong",
    )


def test_only_questions_with_their_unrotated_row_count(tmp_path: Path) -> None:
    rows = [*rotations(1, "red", "blue", "grey")[:2], *rotations(2, "red", "blue")[1:]]
    asked = labelled(tmp_path, *reversed(rows))
    judgement = mmbench.BENCHMARK.score(asked, {"1": "A", "1000001": "C", "1000002": "A"})
    assert measured(judgement) == {"accuracy": 100, "vanilla": 100, "unreadable": 0}
    assert judgement.per_question == {"1": 1} and len(judgement.contributions) == 1
    assert "1 questions have fewer rotations than options" in judgement.notes[1]


def test_the_judge_reads_only_what_decides(tmp_path: Path) -> None:
    asked = labelled(
        tmp_path,
        *rotations(1, "red", "blue"),  # both unreadable, both matched
        *rotations(2, "red", "blue"),  # a readable wrong one: nothing to ask
        *rotations(
            3, "red", "blue", "grey"
        ),  # the first is matched wrongly: the rest is not asked about
        *rotations(4, "red", "blue"),  # no reply can be read: in no score
        *rotations(5, "red", "blue"),  # like none of the options
    )
    answers = dict.fromkeys((question.id for question in asked), "crimson")
    answers |= {"1000002": "A", "1000004": "B", "1000005": "B"}
    judge = Judge(
        _1=["hm", "<think>B or C? B</think>Sure: A"],
        _1000001=["It is like red"],
        _3=["C"],
        _4=["hm", "A or B", ""],
        _5=["Z"],
    )
    judgement = mmbench.BENCHMARK.score(asked, answers, judge)
    assert judge.asked == ["1", "1", "1000001", "3", "4", "4", "4", "5"]
    assert judge.forgotten == [("4", 0)]
    assert measured(judgement) == {
        "accuracy": 25,
        "vanilla": 25,
        "unreadable": 3,
    }  # 2; 1000003 and 2000003
    assert "4" not in judgement.per_question and judgement.failed == {
        "4": "no option can be read in 3 replies of the judge, the first being 'hm': use a judge "
        "that follows the prompt, or change its request with --judge-request"
    }
    parsed = judgement.parsed or {}
    assert [parsed[key] for key in ("1", "1000001", "2", "3", "1000003", "4", "5")] == [
        "A",
        "B",
        None,
        "C",
        None,
        None,
        "Z",
    ]
    assert judgement.notes == (
        "the judge was asked about 5 of 11 answers: those that the rules cannot read, where they "
        "decide",
    )
    options = "There are several options: \nA. red\nB. blue\n"
    assert judge.prompts[0].endswith(
        f"Example 3: \nQuestion: Which??\nOptions: {options}\nAnswer: crimson\nYour output: "
    )


def test_a_judge_that_reads_nothing_is_a_fault_of_the_judge(tmp_path: Path) -> None:
    asked = labelled(
        tmp_path, *(line for n in range(1, 26) for line in rotations(n, "red", "blue"))
    )
    answers = dict.fromkeys((question.id for question in asked), "crimson")

    class Silent(Judge):
        def ask(self, question_id: str, prompt: str, **_: object) -> Reply:
            self.asked.append(question_id)
            return Reply("<think> the first")

    judge = Silent()
    with pytest.raises(ValueError, match=r"^the first 20 answers fail: .*give it more with"):
        mmbench.BENCHMARK.score(asked, answers, judge)
    assert len(judge.asked) == 20 * 3
    few = [question for question in asked if question.facts["group"] < 4]
    with pytest.raises(ValueError, match=r"^no question has a score: no option can be read in 3"):
        mmbench.BENCHMARK.score(few, answers, Silent())


def test_both_layouts_give_one_decoded_image_to_all_its_rows(tmp_path: Path) -> None:
    repeated = [row(1), row(1_000_001), row(7, image=BLUE), row(2)]
    referring = [row(1_000_001, image="1"), row(1), row(7, image=BLUE), row(2, image="1")]
    for number, rows in enumerate((repeated, referring)):
        path = write(tmp_path / f"{number}.tsv", rows)
        by_id = {question.id: question for question in mmbench.BENCHMARK.questions(path, "dev")}
        assert by_id["7"].image == make_image("blue")
        assert (
            by_id["1"].image == make_image("red")
            and by_id["1"].image is by_id["1000001"].image is by_id["2"].image
        )
        same = {
            question.id: question.facts["image"] for question in mmbench.BENCHMARK.read_labels(path)
        }
        assert same["1"] == same["1000001"] == same["2"] != same["7"]
    assert [question.id for question in mmbench.BENCHMARK.questions(path, "dev")] == [
        "1000001",
        "1",
        "7",
        "2",
    ]
    long = base64.b64encode(bytes(200_000)).decode()  # beyond what the csv module takes by default
    assert mmbench.BENCHMARK.questions(write(path, [row(1, image=long)]), "dev")[0].image == bytes(
        200_000
    )


def test_the_folder_holds_a_file_a_split(tmp_path: Path) -> None:
    columns = [column for column in COLUMNS if column != "answer"]
    write(tmp_path / "mmbench_test_20230712.tsv", [row(1, split="test")], columns)
    (question,) = mmbench.BENCHMARK.questions(tmp_path, "test")
    assert "answer" not in question.facts
    with pytest.raises(
        FileNotFoundError,
        match=r"has no mmbench_dev_20230712\.tsv or MMBench_DEV_EN\.tsv: get mmbench",
    ):
        mmbench.BENCHMARK.questions(tmp_path, "dev")
    write(tmp_path / "MMBench_DEV_EN.tsv", [row(1), row(2)])
    assert (
        len(mmbench.BENCHMARK.questions(tmp_path, "dev"))
        == len(mmbench.BENCHMARK.read_labels(tmp_path))
        == 2
    )
    with pytest.raises(ValueError, match="no split 'val': choose dev or test"):
        mmbench.BENCHMARK.questions(tmp_path, "val")
    with pytest.raises(ValueError, match="give its folder with --data-root"):
        mmbench.BENCHMARK.questions(None, "dev")


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ({"index": "x"}, r"line 3: index 'x' is not a whole number"),
        ({"index": "1"}, r"line 3 has the index 1 of .* line 2: keep one of the two"),
        ({"answer": "C"}, r"line 3: the answer 'C' is the letter of none of its options"),
        ({"answer": "red"}, r"line 3: the answer 'red'"),
        ({"answer": ""}, r"line 3 has no answer: give a file whose labels are public"),
        ({"image": "A" * 65}, r"line 3: the image is not base64"),
        ({"image": "9"}, r"line 3: the image is neither an image"),
        ({"image": ""}, r"line 3: the image is neither an image"),
    ],
)
def test_a_malformed_row_is_named(broken: dict[str, str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        mmbench.BENCHMARK.questions(
            write(tmp_path / "mmbench.tsv", [row(1), row(2) | broken]), "dev"
        )


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    for content, sentence in (
        (b"id\tquestion\n", "has no column index or A or B"),
        (b"", "has no column"),
        (b"index\tquestion\tA\tB\n1\tq\ta\n", "line 2 has 3 cells, but the first line has 4"),
        (b"index\tquestion\tA\tB\n1\t\xff\ta\tb\n", "is not a table in UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"x\.tsv.*{sentence}"):
            mmbench.BENCHMARK.read_labels(path)


def test_the_upload(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    asked = labelled(
        tmp_path,
        row(1, "=1+1", "None", hint="h", comment="c"),
        row(1_000_001, "#N/A", "blue", answer="B"),
    )
    answers = {"1": "=A1", "1000001": "A\x0bB\x00\ud800"}
    (content,) = mmbench.BENCHMARK.submission(asked, answers).values()
    sheet = openpyxl.load_workbook(io.BytesIO(content)).active
    assert [[cell.value for cell in line] for line in sheet.iter_rows()] == [
        ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"],
        [1, "Which?", "=1+1", "None", None, None, "=A1", "A", "dev"],
        [1_000_001, "Which?", "#N/A", "blue", None, None, "A B\ufffd\ufffd", "B", "dev"],
    ]
    assert {sheet["C2"].data_type, sheet["G2"].data_type} == {"s"}
    with pytest.raises(ValueError, match=r"prediction of row 1 has 40,000 characters"):
        mmbench.BENCHMARK.submission(asked, answers | {"1": "a" * 40_000})


def test_the_uploads_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'not installed: pip install "mipha-vlm\[evaluation\]"'
    ):
        mmbench.BENCHMARK.submission(labelled(tmp_path, row(1)), {"1": "A"})


def test_signs_of_another_file_are_told(tmp_path: Path) -> None:
    def told(*rows: Mapping[str, str]) -> Any:
        return mmbench.BENCHMARK.doubts(labelled(tmp_path, *rows), "dev")

    whole = [turned for index in range(1164) for turned in rotations(index, "red", "blue")]
    assert told(*whole) == []
    assert told(*({**turned, "split": ""} for turned in whole)) == [], "not every file says it"
    assert any(
        "1,163 questions without their rotations, not the 1,164" in doubt
        for doubt in told(*whole[2:])
    )
    assert told(*whole[1:]) == [
        "1 questions lack their unrotated row, so they are not counted",
        "1 questions have fewer rotations than options, which makes CircularEval easier",
    ]
    assert any(
        "2,328 of 2,328 rows ask in Chinese" in doubt
        for doubt in told(*(turned | {"question": "哪个？"} for turned in whole))
    )
    assert told(*(turned | {"split": "test"} for turned in whole)) == [
        "rows say that they are of split test, not dev"
    ]


# Official files in small, for the tests of the command line and of the evaluation.


def write_table(
    path: Path, split: str, questions: Sequence[tuple[Any, ...]], repeat_images: bool
) -> None:
    columns = list(COLUMNS)
    if split == "test":
        columns.remove("answer")
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, delimiter="\t", extrasaction="ignore", restval="")
    writer.writeheader()
    for index, question, hint, choices, answer, ability in questions:
        cell = base64.b64encode(official_image(f"{path.name} {index}")).decode()
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
            image = cell if repeat_images or not turn else str(index)
            writer.writerow(
                row | {"image": image, "source": "s", "l2-category": ability, "split": split}
            )
    write_file(path, file.getvalue())


def write_official(folder: Path) -> None:
    questions = [
        (241, "Which is it?", "None", ("a cat", "a dog"), "A", "logic_reasoning"),
        (7, "Which number?", "Look well.", ("one", "two", "three"), "C", "coarse_perception"),
        (9, "Which colour?", "", ("red", "blue"), "B", "coarse_perception"),
    ]
    for split in ("dev", "test"):
        # Files of 2023 repeat a question's image in every rotation.
        write_table(folder / f"mmbench_{split}_20230712.tsv", split, questions, repeat_images=True)


GOLD = {
    **{"241": "A", "1000241": "B", "7": "C", "1000007": "B", "2000007": "A"},
    **{"9": "B", "1000009": "A"},
}
OFFICIAL = Official(
    write=write_official,
    gold=GOLD,
    size="4,377",
    readings=("parsed", "submission"),
    broken_label=BrokenLabel(
        "mmbench_dev_20230712.tsv",
        "\tA\tx",
        "\tC\tx",
        (".tsv line 2", "answer 'C' is the letter of none of its options"),
    ),
    scored=[name for name in GOLD if int(name) < 1_000_000],  # rotations share one score
    upload="mmbench.xlsx",
    served={
        "test": Upload(
            "mmbench.xlsx", "index", [int(name) for name in GOLD], "mmbench.opencompass.org.cn"
        )
    },
    replies=[{"question_id": name, "text": "A"} for name in GOLD],
)
