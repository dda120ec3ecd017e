"""MMBench in Chinese: multiple choice with rotated options (CircularEval), dev split of 2023-10-03.

Source: haotian-liu/LLaVA c121f043 `scripts/v1_5/eval/mmbench_cn.sh`; see `_mmbench.py` for the score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mipha.evaluation.benchmark import Question
from mipha.evaluation.benchmarks import _mmbench
from mipha.evaluation.benchmarks._mmbench import (
    MAX_NEW_TOKENS,
    METRICS,
    SCORING,
    SERVERS,
    measure,
    score,
)
from mipha.evaluation.benchmarks._mmbench_files import read, spreadsheet
from mipha.evaluation.files import find, official_root

__all__ = ["MAX_NEW_TOKENS", "METRICS", "SERVERS", "measure", "score"]

INSTRUCTION = "\n请直接回答选项字母。"
FILES = {
    "dev": ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv"),
    "test": ("mmbench_test_cn_20231003.tsv", "MMBench_TEST_CN.tsv"),
}
SPLITS = tuple(FILES)
SIZES = {"dev": 4329, "test": 6666}
"""Rows, that is questions with their rotations."""
JUDGE = "optional"
BASELINES: dict[str, Callable[[Sequence[Question]], dict[str, str]]] = {}
SOURCE = (
    "get mmbench_dev_cn_20231003.tsv (or mmbench_test_cn_20231003.tsv) from open-compass/MMBench"
)
PROTOCOL = f"MMBench Chinese 1.0, hint, question, lettered options and LLaVA-1.5's Chinese instruction, greedy; {SCORING}"


def questions(root: Path | None, split: str) -> list[Question]:
    """Every row of a split, rotations included.

    Args:
        root: Folder with the official file, or the .tsv file itself.
        split: `dev`, or `test`, whose labels are private.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No root, no such split, or a malformed file: names the line.
    """
    root = official_root("mmbench_cn", root, split, SPLITS, SOURCE)
    return read(
        find(root, FILES[split], SOURCE), INSTRUCTION, with_labels=split == "dev", with_images=True
    )


def annotations(path: Path) -> list[Question]:
    """The labelled rows of a .tsv file, or of the dev file in a folder."""
    return read(find(path, FILES["dev"], SOURCE), INSTRUCTION, with_labels=True, with_images=False)


def submission(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, bytes]:
    """The server's spreadsheet."""
    return {"mmbench_cn.xlsx": spreadsheet(questions, predictions)}


def doubts(questions: Sequence[Question], split: str) -> list[str]:
    """Signs of version 1.1, of the other language, of missing rotations."""
    return _mmbench.doubts(questions, split, chinese=True)
