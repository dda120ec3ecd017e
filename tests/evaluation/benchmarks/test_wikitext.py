"""WikiText-2: articles from lines, tidied; perplexity by word and bits by byte."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mipha.comparison.statistics import tally, values
from mipha.evaluation.benchmarks import wikitext
from tests.evaluation.official import BrokenLabel, Official, write_parquet

FILE = "wikitext-2-raw-v1/test-00000-of-00001.parquet"
LINES = [
    "",
    " = Robert = \n",
    "",
    ' Robert said " so , 1 @,@ 000 times " ( twice ) . \n',
    " = = Life = = \n",
    " It 's long . \n",
    " = Iron \u00b0 = \n",
    " Iron is a metal ; it is red @-@ brown . \n",
]
PAGES = ["".join(LINES[1:6]), "".join(LINES[6:])]
GOLD = {"0": "[[0.0, 40]]", "1": "[[0.0, 12]]"}
NUM_BYTES = sum(len(page.encode()) for page in PAGES)
# What stands before the first and behind the last space counts as a word, as in the source.
NUM_WORDS = sum(len(page.split()) + 2 for page in PAGES)


def write_official(folder: Path) -> None:
    write_parquet(folder / FILE, [{"text": line} for line in LINES])


def test_articles_begin_at_their_headings_and_are_tidied(tmp_path: Path) -> None:
    write_official(tmp_path)
    asked = wikitext.BENCHMARK.questions(tmp_path)
    assert [question.facts["continuations"] for question in asked] == [
        (' = Robert =\nRobert said "so, 1,000 times" (twice).\n== Life ==\nIt\'s long.\n',),
        (" = Iron°=\nIron is a metal; it is red-brown.\n",),
    ]
    assert sum(question.facts["bytes"] for question in asked) == NUM_BYTES
    assert [question.facts["words"] for question in asked] == [
        len(page.split()) + 2 for page in PAGES
    ]


def test_numbers_by_hand(tmp_path: Path) -> None:
    write_official(tmp_path)
    labelled = wikitext.read_labels(tmp_path)
    judgement = wikitext.score(labelled, {"0": "[[-100, 20]]", "1": "[[-60, 9]]"})
    assert judgement.per_question["1"] == pytest.approx(math.exp(-60 / len(PAGES[1].encode())))
    found = values(tally(judgement.contributions), wikitext.measure)
    assert found == pytest.approx(
        {
            "word_perplexity": math.exp(160 / NUM_WORDS),
            "bits_per_byte": 160 / math.log(2) / NUM_BYTES,
        }
    )


def test_text_before_the_first_heading_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / FILE, [{"text": line} for line in LINES[3:]])
    with pytest.raises(ValueError, match=r"row 0 stands before the first heading \(` = Title = `"):
        wikitext.read_labels(path)


# Official files in small, for the tests of the command line and of the evaluation.

OFFICIAL = Official(
    write=write_official,
    gold=GOLD,
    size="62",
    readings=(),
    broken_label=BrokenLabel(
        FILE, " = Robert = ", " - Robert - ", ("row 1 stands before the first heading",)
    ),
    metric="word_perplexity",
    unit="points",
    best=1,
    by_likelihood=True,
    without_file="test-*.parquet",
    prompts=('    = Robert =\n    Robert said "so, 1,000 times"',),
)
