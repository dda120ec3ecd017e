"""MMBench in Chinese: the differences from English (test_mmbench.py has all that they share)."""

from __future__ import annotations

from pathlib import Path

import pytest

from mipha.comparison.statistics import tally, values
from mipha.evaluation.benchmarks import mmbench_cn
from tests.evaluation.benchmarks.test_mmbench import write_table
from tests.evaluation.official import BrokenLabel, Official, Upload

LINES = (
    "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit",
    "5\t图中有几只猫？\t看图。\t一只\t两只\t\t\tB\tcount\t\ts\tlogic_reasoning\t\tdev",
    "1000005\t图中有几只猫？\t\t两只\t一只\t\t\tA\tcount\t\ts\tlogic_reasoning\t\tdev",
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mmbench_dev_cn_20231003.tsv"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


def test_the_last_line_asks_in_chinese(file: Path) -> None:
    asked = mmbench_cn.BENCHMARK.read_labels(file.parent)
    assert [question.text for question in asked] == [
        "看图。\n图中有几只猫？\nA. 一只\nB. 两只\n请直接回答选项字母。",
        "图中有几只猫？\nA. 两只\nB. 一只\n请直接回答选项字母。",
    ]
    assert mmbench_cn.BENCHMARK.max_new_tokens == 1024
    assert not any("Chinese" in doubt for doubt in mmbench_cn.BENCHMARK.doubts(asked, "dev"))


@pytest.mark.parametrize(
    ("first", "second", "accuracy"),
    [
        ("B", "A", 100),
        ("两只", "两只", 100),
        ("答案是 B", "A.", 100),
        ("答案是B", "A", 0),  # Chinese has no spaces, so the letter is no word
        ("B。", "A", 0),
        ("（B）", "A", 0),
        ("B", "我想我看到两只", 100),  # an option's text, in seven characters of at most 2 x 4
        ("B", "我想图中有两只猫", 100),  # eight
        ("B", "我想图中是有两只猫", 0),  # nine
    ],
)
def test_chinese_answers(first: str, second: str, accuracy: float, file: Path) -> None:
    judgement = mmbench_cn.BENCHMARK.score(
        mmbench_cn.BENCHMARK.read_labels(file), {"5": first, "1000005": second}
    )
    assert (
        values(tally(judgement.contributions), mmbench_cn.BENCHMARK.measure)["accuracy"] == accuracy
    )


def test_the_upload_has_its_own_name(file: Path) -> None:
    pytest.importorskip("openpyxl")
    assert list(
        mmbench_cn.BENCHMARK.submission(
            mmbench_cn.BENCHMARK.read_labels(file), {"5": "B", "1000005": "A"}
        )
    ) == ["mmbench_cn.xlsx"]


# Official files in small, for the tests of the command line and of the evaluation.


def write_official(folder: Path) -> None:
    questions = [
        (5, "图中有几只猫？", "看图。", ("一只", "两只"), "B", "logic_reasoning"),
        (8, "这是什么颜色？", "", ("红色", "蓝色"), "A", "attribute_reasoning"),
    ]
    for split in ("dev", "test"):
        write_table(
            folder / f"mmbench_{split}_cn_20231003.tsv", split, questions, repeat_images=False
        )


GOLD = {"5": "B", "1000005": "A", "8": "A", "1000008": "B"}
OFFICIAL = Official(
    write=write_official,
    gold=GOLD,
    size="4,329",
    readings=("parsed", "submission"),
    broken_label=BrokenLabel(
        "mmbench_dev_cn_20231003.tsv", "\tB\tx", "\t\tx", (".tsv line 2 has no answer",)
    ),
    scored=[name for name in GOLD if int(name) < 1_000_000],  # rotations share one score
    upload="mmbench_cn.xlsx",
    served={
        "test": Upload(
            "mmbench_cn.xlsx", "index", [int(name) for name in GOLD], "mmbench.opencompass.org.cn"
        )
    },
    replies=[{"question_id": name, "text": "A"} for name in GOLD],
    prompts=(
        "    <image>\n    看图。\n    图中有几只猫？\n    A. 一只\n    B. 两只\n"
        "    请直接回答选项字母。<|im_end|>\n",
    ),
)
