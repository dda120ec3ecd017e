"""The paper's tables come out of the CSVs as printed, and our runs stand beside them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from mipha.comparison.figures import draw_radar
from mipha.comparison.results import (
    PROTOCOLS,
    PUBLISHED,
    TITLES,
    best_of,
    measured,
    published,
    published_rows,
    published_table,
    warn_of_protocols,
)
from mipha.comparison.tables import compare, print_comparison, render
from mipha.evaluation.benchmark import list_benchmarks


def test_lines_of_the_tables_as_printed() -> None:
    """Read off the paper's pages."""
    shown = render(published_table(2))
    assert (
        "| model | LM | Res. | PT | IT | VQAv2 | GQA | SQA-I | VQA-T | POPE | MME-P | MME-C | MMB "
        "| MM-Vet |" in shown
    )
    assert (
        "| Mipha-1.6B | Phi-1.5 (1.3B) | 384 | 558K | 665K | 77.5* | 62.7* | 58.3 | 45.6 "
        "| **86.9** | 1203.1 | 247.9 | 57.7 | 23.5 |" in shown
    )
    assert (
        "| Shikra-13B | Vicuna (13B) | 224 | 600K | 5.5M | 77.4* | - | - | - | - | - | - | 58.8 "
        "| - |" in shown
    )
    assert (
        "| IDEFICS-9B | LLaMA (7B) | 224 | 353M | 1M | 50.9 | 38.4 | 35.5 | - | 25.9 |"
        in render(published_table(3))
    )
    # Of the 16 rows Mipha-3B is best on POPE, MMBench, MMBench-CN and SEED, LLaVA-1.5-13B on MME
    # perception, and mPLUG-Owl2 on MM-Vet.
    line = "| Mipha-3B | 558K | 665K | **86.7** | 1488.9 | 295.0 | **69.7** | **64.3** "
    line += "| **68.9** | 32.1 |"
    assert line in render(published_table(4))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_documentation_shows_the_tables_as_they_are_rendered(number: int) -> None:
    page = Path(__file__).parents[2] / "docs" / "published" / f"table-{number}.md"
    assert page.read_text(encoding="utf-8") == render(published_table(number))


def test_the_texts_claims_follow_from_the_tables() -> None:
    """Section 5.2: Mipha-3B beats Bunny on VQAv2 and GQA by 1.5 and 1.4.

    It beats LLaVA-1.5-13B there by 1.3 and 0.6, and on MMB and MMB-CN by 2.0 and 0.7.
    """
    ours, bunny, llava = published("Mipha-3B"), published("Bunny-3B"), published("llava-1.5-13b")

    def ahead(of, *columns: str) -> list[float]:
        return [round(ours.cells[column].value - of.cells[column].value, 1) for column in columns]

    assert ahead(bunny, "vqav2", "gqa") == [1.5, 1.4]
    assert ahead(llava, "vqav2", "gqa", "mmbench", "mmbench_cn", "pope") == [
        1.3,
        0.6,
        2.0,
        0.7,
        0.8,
    ]
    # "9 of 11": best of the small models, ties counted.
    small = [
        row
        for number in (2, 3, 4)
        for row in published_table(number)
        if row.group == "small" and not row.name.startswith("Mipha")
    ]
    columns = [
        "vqav2",
        "gqa",
        "vizwiz",
        "scienceqa",
        "textvqa",
        "pope",
        "mme",
        "mmbench",
        "mmbench_cn",
        "seedbench",
        "mmvet",
    ]
    assert sum(ours.cells[column].value >= (best_of(small, column) or 0) for column in columns) == 9


def test_one_model_has_one_name_in_all_tables() -> None:
    llava = published("LLaVA-1.5-7B")
    assert set(llava.cells) >= {"vqav2", "vizwiz", "mmbench_cn"}, "from Tables 2, 3 and 4"
    assert (
        llava.cells["vqav2"].printed == "78.5*" and llava.facts["language_model"] == "Vicuna (7B)"
    )
    for number in (2, 3, 4):  # what two tables both print of one model is the same
        for row in published_table(number):
            merged = published(row.name)
            assert all(
                merged.cells[column].value == cell.value for column, cell in row.cells.items()
            ), row.name
    with pytest.raises(
        ValueError, match=r"no published model 'Mipha-4B': did you mean Mipha-2\.4B"
    ):
        published("Mipha-4B")


def test_a_whole_table_is_asked_for_by_its_number() -> None:
    assert compare(published=["table-3", "Mipha-3B"]).rows == (
        *published_table(3),
        published("Mipha-3B"),
    )
    with pytest.raises(ValueError, match="no table of results 5: 1 to 4"):
        compare(published=["table-5"])


def test_current_small_models_have_a_row_for_each_source() -> None:
    rows = published_rows("small-models")
    assert len(rows) == 50 and sum(len(row.cells) for row in rows) == 399
    assert len({(row.name, row.facts["source"]) for row in rows}) == 50
    qwen = published_rows("qwen2.5-vl-3b")
    assert [row.cells["mmmu"].printed for row in qwen] == ["53.1?", "51.2§¿", "46.44¶"]
    # OCRBench is printed in points of 1,000, or divided by 10.
    assert [row.cells["ocrbench"].value for row in qwen if "ocrbench" in row.cells] == [828, 792]
    assert published_rows("Mipha-3B") == (published("Mipha-3B"),), "the paper's tables come first"
    with pytest.raises(ValueError, match=r"no published model 'SmolVLM-600M': did you mean Smol"):
        published_rows("SmolVLM-600M")


def test_published_numbers_have_known_columns_and_a_source() -> None:
    """Every column is a benchmark of ours, or a split of one."""
    with (PUBLISHED / "small-models.csv").open(encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    known = {*list_benchmarks(), "mme_cognition"}
    for record in records:
        assert record["benchmark"] in TITLES and record["benchmark"].split("-")[0] in known
        assert record["protocol"] in PROTOCOLS and record["source"] and record["date"]
        assert float(record["value"]) > 0


def test_columns_whose_protocols_differ_are_named(run: Path, capsys) -> None:
    ours, official = measured(run), published("Mipha-3B")
    assert warn_of_protocols([ours, official]) is None
    (theirs,) = published_rows("LLaVA-OneVision-1.5-4B")
    assert warn_of_protocols([theirs, official]) == (
        "Protocols differ, so gaps of a few points say nothing and the best number may not be the "
        "best model, in: SEED-I (lmms-eval, official)."
    )
    path = run / "pope" / "scores.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rules": "VLMEvalKit"}))
    for form in ("markdown", "latex"):
        found = render([measured(run), official], form)
        assert "POPE (VLMEvalKit, official)" in found and "By VLMEvalKit." in found
    print_comparison(compare([run], ["Mipha-3B"]))
    said = capsys.readouterr().out
    assert "80.0§" in said and "in: POPE (VLMEvalKit, official)." in said


def test_the_lowest_perplexity_is_the_best(tmp_path: Path) -> None:
    rows = []
    for name, value in (("before", 20.0), ("after", 30.0)):
        scores = [{"metric": "word_perplexity", "value": value}]
        content = {"benchmark": "wikitext", "blind": False, "complete": True, "scores": scores}
        (tmp_path / name / "wikitext").mkdir(parents=True)
        (tmp_path / name / "wikitext" / "scores.json").write_text(json.dumps(content))
        rows.append(measured(tmp_path / name))
    assert best_of(rows, "wikitext") == 20
    assert "| before | **20.0** |" in render(rows) and "| after | 30.0 |" in render(rows)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Scores as `mipha evaluate -o` writes them: POPE whole, MME's first questions, GQA blind."""
    folder = tmp_path / "mine"
    for name, metrics, complete, blind in (
        ("pope", {"f1": 80.04}, True, False),
        ("mme", {"perception": 1200.0, "cognition": 250.0}, False, False),
        ("gqa-blind", {"accuracy": 40.0}, True, True),
    ):
        scores = [
            {"metric": metric, "value": value, "low": value - 1, "high": value + 1}
            for metric, value in metrics.items()
        ]
        content = {
            "benchmark": name.split("-")[0],
            "blind": blind,
            "complete": complete,
            "scores": scores,
        }
        (folder / name).mkdir(parents=True)
        (folder / name / "scores.json").write_text(json.dumps(content))
    return folder


def test_a_run_stands_beside_published_models(run: Path) -> None:
    rows = [published("Mipha-3B"), measured(run)]
    assert "gqa-blind" not in rows[1].cells
    header, _, theirs, ours = (
        re.split(r" *\| *", line.strip("| ")) for line in render(rows).split("\n\n")[0].splitlines()
    )
    shown = dict(zip(header, ours, strict=True))
    assert (shown["model"], shown["POPE"], shown["MME-P"], shown["MME-C"], shown["GQA"]) == (
        "mine",
        "80.0",
        "1200.0~",
        "250.0~",
        "-",
    )
    assert dict(zip(header, theirs, strict=True))["POPE"] == "**86.7**"
    table = render(rows, "csv").splitlines()
    fields = dict(zip(table[0].split(","), table[2].split(","), strict=True))
    assert (fields["pope"], fields["pope_low"], fields["gqa"], fields["footnotes"]) == (
        "80.04",
        "79.04",
        "",
        "mme ~; mme_cognition ~",
    )
    assert r"\textbf{81.3$^*$}" in render(rows, "latex")


def test_footnote_marks_are_explained_where_they_stand(run: Path, capsys) -> None:
    """In Markdown, in LaTeX, and on the terminal; a mark that is not there is not explained."""
    starred, ours = published("Mipha-3B"), measured(run)
    seen = "The training images or annotations of the benchmark were seen in training."
    partly = "Not all questions of the benchmark were answered."
    both = render([starred, ours])
    assert both.endswith(f"\n\n\\* {seen}\n\n~ {partly}\n")
    latex = render([starred, ours], "latex")
    header = latex.splitlines()[2]
    width = header.count("&") + 1
    assert latex.endswith(
        f"\\bottomrule\n\\multicolumn{{{width}}}{{l}}{{\\footnotesize $^*$ {seen}}} \\\\\n"
        f"\\multicolumn{{{width}}}{{l}}{{\\footnotesize $\\sim$ {partly}}} \\\\\n\\end{{tabular}}\n"
    )
    assert seen in render([starred]) and "~" not in render([starred])
    print_comparison(compare([run], ["Mipha-3B"]))
    printed = capsys.readouterr().out
    assert f"* {seen}\n" in printed and f"~ {partly}\n" in printed
    assert "It includes data" in render([published("Qwen-VL")], "latex")


def test_a_score_of_empty_answers_is_marked(run: Path) -> None:
    path = run / "pope" / "scores.json"
    content = json.loads(path.read_text()) | {"all_empty": True, "complete": False}
    path.write_text(json.dumps(content))
    found = render([measured(run)])
    assert "| 80.0~‡ |" in found and found.endswith("‡ All answers are empty.\n")
    assert r"80.0$\sim$$^\ddagger$" in render([measured(run)], "latex")


def test_a_folder_that_is_missing_is_told_from_one_without_scores(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*gone: give a run"):
        measured(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="has no scores: make them with"):
        measured(tmp_path)


def test_scores_that_cannot_be_compared_are_told_from_none(run: Path, tmp_path: Path) -> None:
    path = run / "pope" / "scores.json"
    content = json.loads(path.read_text())
    content["scores"][0]["value"] = None
    path.write_text(json.dumps(content))
    assert set(measured(run).cells) == {"mme", "mme_cognition"}
    (run / "mme" / "scores.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"of gqa-blind, pope are blind, undefined or"):
        measured(run)
    with pytest.raises(FileNotFoundError, match=rf"results of one benchmark: .*, {run}$"):
        measured(run / "pope")
    for damaged in ({}, content | {"scores": [{"metric": "f1", "value": "80"}]}):
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=r"scores\.json is not as `mipha evaluate` writes it"):
            measured(run)


def test_a_metric_with_a_column_of_its_own_stands_in_it(tmp_path: Path) -> None:
    scores = [{"metric": "f1", "value": 80.0}, {"metric": "recall", "value": 70.0}]
    scores.append({"metric": "hard.f1", "value": 60.0, "column": "pope_hard"})
    content = {"benchmark": "pope", "blind": False, "complete": True, "scores": scores}
    (tmp_path / "pope").mkdir()
    (tmp_path / "pope" / "scores.json").write_text(json.dumps(content))
    cells = measured(tmp_path).cells
    assert {name: cell.value for name, cell in cells.items()} == {"pope": 80, "pope_hard": 60}


def test_a_radar_is_drawn_and_one_of_too_little_is_refused(run: Path, tmp_path: Path) -> None:
    draw_radar([published("Mipha-3B"), measured(run)], tmp_path / "radar.png")
    assert (tmp_path / "radar.png").read_bytes()[:4] == b"\x89PNG"
    draw_radar([published("Mipha-3B"), published("Bunny-3B")], tmp_path / "radar.svg")
    assert b"<svg" in (tmp_path / "radar.svg").read_bytes()
    with pytest.raises(ValueError, match="a radar wants two models and three benchmarks"):
        draw_radar([published("Mipha-3B")], tmp_path / "one.png")


@pytest.mark.parametrize(
    ("rows", "form", "sentence"),
    [([], "markdown", "no rows"), ([0], "html", "no form 'html': use markdown, csv, latex")],
)
def test_what_cannot_be_rendered(rows: list, form: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        render([published("Mipha-3B") for _ in rows], form)


def test_a_folder_without_scores(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no scores: make them with `mipha evaluate"):
        measured(tmp_path)
