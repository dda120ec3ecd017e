"""The linter on planted defects: each found at its row, none invented."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mipha.data.check import check_data
from mipha.data.check_source import open_source
from mipha.recipe import DataRecipe

sys.path.insert(0, str(Path(__file__).parent))
from planted import DEFECTS, Corpus, plant


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return plant(tmp_path_factory.mktemp("corpus"), 4 * len(DEFECTS))


def _source(path: Path):
    return open_source(DataRecipe(dataset="auto", root=path))


def test_every_planted_defect_is_found_at_its_row_and_nothing_else(corpus: Corpus, tiny_model, tiny_run_recipe) -> None:
    assert len(DEFECTS) >= 40
    stage = tiny_run_recipe("stages.finetune.row_tokens=2048").stages.finetune
    against = _source(corpus.evaluation)
    for tokens in (False, True):
        chosen = {"stage": stage, "processor": tiny_model()[1]} if tokens else {}
        result = check_data(_source(corpus.planted), against=against, **chosen)
        assert {(f.row, f.kind) for f in result.findings} == corpus.expected(with_tokens=tokens, with_evaluation=True)
        assert check_data(_source(corpus.clean), against=against, **chosen).findings == ()

def test_debug(corpus, tiny_model, tiny_run_recipe):
    stage = tiny_run_recipe("stages.finetune.row_tokens=2048").stages.finetune
    against = _source(corpus.evaluation)
    for tokens in (False, True):
        chosen = {"stage": stage, "processor": tiny_model()[1]} if tokens else {}
        for clean in (False, True):
            result = check_data(_source(corpus.clean if clean else corpus.planted), against=against, **chosen)
            print("TOKENS", tokens, "CLEAN", clean, result.seconds)
            got = {(f.row, f.kind) for f in result.findings}
            want = set() if clean else corpus.expected(tokens, True)
            said = {(f.row, f.kind): f for f in result.findings}
            for x in sorted(want - got, key=str): print("MISSED", x, corpus.where.get(x[0]))
            for x in sorted(got - want, key=str): print("INVENTED", x, corpus.where.get(x[0]), said[x].sentence)
            if not clean:
                for f in result.findings: print(f.row, f.where, f.kind, "|", f.sentence)
