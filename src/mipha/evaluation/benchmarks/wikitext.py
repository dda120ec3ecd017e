"""WikiText-2: how well a language model predicts articles that it was not trained on.

The number to watch before and after training on images: when it rises, language was forgotten. An
article is one text, tidied as lm-evaluation-harness does it, and read in windows of 1,024 tokens
that see nothing of one another, so numbers of models with longer windows do not compare.

    word_perplexity    exp(- log-likelihood / words)
    bits_per_byte      - log2-likelihood / bytes

Words and bytes are those of the file, so a tokenizer does not change them.

Source: EleutherAI/lm-evaluation-harness 244246fa `lm_eval/tasks/wikitext/preprocess_wikitext.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mipha.comparison.statistics import Totals
from mipha.evaluation.benchmark import Benchmark, Judge, Judgement, Metric, Question, Split
from mipha.evaluation.files import AGAIN, OfficialRecord, find_shards, read_parquet, read_record
from mipha.evaluation.likelihoods import read_likelihoods

FILES = ("wikitext-2-raw-v1/test-*.parquet", "test-*.parquet", "test.parquet")
SOURCE = "get wikitext-2-raw-v1/test-*.parquet from huggingface.co/datasets/Salesforce/wikitext"

_HEADING = re.compile(r" = [^=].* = \n?")
"""First line of an article; sections have more marks."""

# What the file has taken apart, and how a person writes it.
_BEFORE_MARKS = (("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
_MARKS = tuple((f" {mark} ", f"{mark} ") for mark in ":;.!?,")
_PAIRS = (
    (re.compile(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r"\"\s*([^\"]*?)\s*\""), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
)
_AFTER_PAIRS = (
    *(("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°")),
    *((" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
)


class _Row(OfficialRecord):
    text: str


def read(root: Path, split: str) -> list[Question]:
    """Return every article in the order of the file.

    Args:
        root: Folder with the .parquet file, or the file; a row is a line of an article.
        split: `test`.

    Returns:
        Questions without a text, whose facts are `continuations` (the article), `words` and
        `bytes`.
    """
    articles: list[list[str]] = []
    for path in find_shards(root, FILES, SOURCE):
        for where, cells in read_parquet(path, ("text",)):
            line = read_record(_Row, cells, where).text
            if _HEADING.fullmatch(line):
                articles.append([])
            if articles:
                articles[-1].append(line)
            elif line.strip():
                raise ValueError(
                    f"{where} stands before the first heading (` = Title = `): {AGAIN}"
                )

    questions = []
    for number, lines in enumerate(articles):
        page = "".join(lines)
        facts = {
            "continuations": (tidy(page),),
            "words": len(re.split(r"\s+", page)),
            "bytes": len(page.encode()),
        }
        questions.append(Question(str(number), "", None, facts))
    return questions


def read_labels(path: Path) -> list[Question]:
    """Return every article."""
    return read(path, "test")


def tidy(page: str) -> str:
    """Return an article as a person writes it."""
    for old, new in (*_BEFORE_MARKS, *_MARKS):
        page = page.replace(old, new)
    for pattern, new in _PAIRS:
        page = pattern.sub(new, page)
    for old, new in _AFTER_PAIRS:
        page = page.replace(old, new)
    return page


def score(
    questions: Sequence[Question], predictions: Mapping[str, str], judge: Judge | None = None
) -> Judgement:
    """Sum the surprise of every article.

    An article's own score is the mean probability of its bytes (geometric), at most 1.
    """
    probability = {}
    contributions = []
    for question in questions:
        (value,) = read_likelihoods(question, predictions)
        amounts = {
            "nats": -value,
            "words": float(question.facts["words"]),
            "bytes": float(question.facts["bytes"]),
        }
        contributions.append((question.id, amounts))
        probability[question.id] = math.exp(value / question.facts["bytes"])
    return Judgement(per_question=probability, contributions=contributions)


def measure(totals: Totals) -> dict[str, np.ndarray]:
    """Return perplexity by word, and bits by byte."""
    nats = totals.sum("nats")
    return {
        "word_perplexity": np.exp(nats / totals.sum("words")),
        "bits_per_byte": nats / math.log(2) / totals.sum("bytes"),
    }


BENCHMARK = Benchmark(
    name="wikitext",
    metrics=(
        Metric("word_perplexity", "points", "perplexity by word of the file; lower is better"),
        Metric("bits_per_byte", "points", "bits by byte of the file; lower is better"),
    ),
    splits={"test": Split(62)},
    protocol=(
        "WikiText-2 raw test, articles tidied as in lm-evaluation-harness, without a chat "
        "template, in windows of 1,024 tokens; perplexity by word of the file; 95 % interval: "
        "bootstrap over articles"
    ),
    source=SOURCE,
    max_new_tokens=0,
    read=read,
    read_labels=read_labels,
    score=score,
    measure=measure,
    by_likelihood=True,
    id_advice="an article's id is its number in the file, from 0",
)
