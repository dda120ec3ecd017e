"""easy-VQA step by step: every step agrees with the published answer, and the last word is it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from mipha.data.datasets import easy_vqa, easy_vqa_steps
from mipha.evaluation.benchmarks.easy_vqa import read_answer

pytestmark = pytest.mark.skipif(
    find_spec("easy_vqa") is None, reason="easy-vqa is not installed: make install"
)


@pytest.mark.parametrize("split", easy_vqa.SPLITS)
def test_the_steps_lead_to_the_published_answer(split: str) -> None:
    turned = ("is there not ", "is no ", "does the image not ")
    for record in easy_vqa.load(None, split):
        said = easy_vqa_steps.reason(record)
        assert read_answer(said) == record.answer
        if record.answer in ("yes", "no"):
            is_right = " is right, so " in said
            assert is_right is not (" is wrong, so " in said)
            is_turned = record.question.startswith(turned)
            assert (record.answer == "yes") is (is_right is not is_turned)


def test_a_sample_is_a_question_and_its_steps() -> None:
    records = easy_vqa.load(None, "validation")
    samples = [easy_vqa_steps.to_sample(record) for record in records]
    assert len({sample.id for sample in samples}) == len(samples)
    said = {sample.messages[1].text for sample in samples}
    assert any(text.endswith(" is wrong, so no") for text in said)
    assert any(", so circle" in text and "right" not in text for text in said)
