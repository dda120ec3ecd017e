"""The three reports: what stands in them, and that nothing of the data gets out of its place."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mipha.data.check.findings import KINDS
from mipha.data.check.html import html_report
from mipha.data.check.linter import NO_RECIPE, CheckResult, check_data
from mipha.data.check.report import json_report, text_report
from mipha.data.dataset import data_recipe, load_data
from mipha.terminal import Console

sys.path.insert(0, str(Path(__file__).parent))
from tests.data.check.planted import DEFECTS, Corpus, plant

VOID = {"meta", "img", "line", "br"}


class _Page(HTMLParser):
    """A page's elements; asserts that every one is closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.trained = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["span"] and self.found[-1][1].get("class") in ("a", "b"):
            self.trained += data


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return plant(tmp_path_factory.mktemp("corpus"), 4 * len(DEFECTS))


@pytest.fixture(scope="module")
def plain(corpus: Corpus) -> CheckResult:
    return check_data(load_data(data_recipe(str(corpus.planted))))


@pytest.fixture
def full(corpus: Corpus, tiny_model, tiny_run_recipe) -> CheckResult:
    stage = tiny_run_recipe("stages.finetune.row_tokens=2048").stages["finetune"]
    return check_data(load_data(data_recipe(str(corpus.planted))), stage, tiny_model()[1])


def _printed(result: CheckResult, width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(text_report(result))
    return console.export_text()


@pytest.mark.parametrize("width", [60, 200])
def test_the_text_names_every_kind_with_its_count(plain: CheckResult, width: int) -> None:
    printed = " ".join(_printed(plain, width).split())
    counts = {
        kind: sum(finding.kind == kind for finding in plain.findings)
        for kind in {finding.kind for finding in plain.findings}
    }
    if width == 200:
        assert all(KINDS[kind].title in printed for kind in counts)
        assert NO_RECIPE in printed
    assert (
        f"{plain.num_errors} errors, {plain.count('warning')} warnings, {plain.count('note')} notes"
        in printed
    )
    assert "planted.jsonl" in printed


def test_the_text_says_what_training_will_do(full: CheckResult) -> None:
    printed = _printed(full, 200)
    assert full.training is not None
    assert f"{full.training.steps} of 6 samples" in printed
    assert "packed (the recipe's)" in printed
    assert NO_RECIPE not in printed


def test_the_json_has_everything(full: CheckResult, plain: CheckResult) -> None:
    tree = json.loads(json_report(full))
    assert [(row["kind"], row["row"], row["where"], row["what"]) for row in tree["findings"]] == [
        tuple(f)[:4] for f in full.findings
    ]
    assert all(
        row["severity"] == KINDS[row["kind"]].severity and row["mend"] for row in tree["findings"]
    )
    assert tree["severities"]["error"] == full.num_errors
    assert sum(tree["kinds"].values()) == len(full.findings)
    assert tree["training"]["trained_tokens"] == full.training.num_trained  # type: ignore[union-attr]
    assert [packing["batching"] for packing in tree["training"]["packings"]] == [
        "padded",
        "packed",
        "shared-image",
    ]
    assert sum(tree["histograms"][0]["counts"]) == full.training.num_samples  # type: ignore[union-attr]
    assert (
        json.loads(json_report(plain))["training"],
        json.loads(json_report(plain))["not_checked"],
    ) == (None, NO_RECIPE)


def test_the_page_is_whole_and_needs_nothing_beside_it(full: CheckResult) -> None:
    page = html_report(full)
    found = _Page(page).found
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in found}
    sources = [attributes["src"] for tag, attributes in found if tag == "img"]
    assert sources and all(
        source and source.startswith("data:image/jpeg;base64,") for source in sources
    )
    assert not any("href" in attributes or "srcset" in attributes for _, attributes in found)
    assert "url(" not in page and "@import" not in page
    for kind in {finding.kind for finding in full.findings}:
        assert KINDS[kind].title.replace("'", "&#x27;").replace("<", "&lt;") in page
    for number, name in enumerate(DEFECTS):  # one of each, four rows apart
        assert (
            name not in ("JPEG cut short", "half a character", "broken JSON")
            or f"row {4 * number + 1} " in page
        )


def test_the_page_colours_exactly_the_trained_tokens(
    tmp_path: Path, tiny_model, tiny_run_recipe
) -> None:
    Image.effect_noise((40, 40), 90).save(tmp_path / "a.png")
    answer = "A <b>bold</b> & “crimson” 🫖."
    talk = [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": answer},
    ]
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": talk, "images": ["a.png"]}) + "\n")
    stage = tiny_run_recipe().stages["finetune"]
    page = html_report(
        check_data(load_data(data_recipe(str(tmp_path / "one.jsonl"))), stage, tiny_model()[1])
    )
    legend = "trained onthe next token"
    assert _Page(page).trained == legend + answer + "<|im_end|>"


@pytest.mark.parametrize("with_tokens", [False, True])
def test_no_text_of_the_data_becomes_part_of_the_page(
    with_tokens: bool, tmp_path: Path, tiny_model, tiny_run_recipe
) -> None:
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)> $name ${style} \x1b[31m \ud83d"
    rows = [
        {
            "messages": [
                {"role": "user", "content": hostile},
                {"role": "assistant", "content": hostile},
            ],
            "id": hostile,
        },
        {"messages": hostile},
        {"messages": [{"role": hostile, "content": "x"}]},
        {
            "messages": [
                {"role": "user", "content": "<image>"},
                {"role": "assistant", "content": "x"},
            ],
            "images": [hostile],
        },
        {
            "messages": [
                {"role": "user", "content": "Hi?"},
                {"role": "assistant", "content": "</div></body>"},
            ]
        },
    ]
    file = tmp_path / "<script>alert(2)<" / "$style.jsonl"
    file.parent.mkdir()
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    more = (
        {"stage": tiny_run_recipe().stages["finetune"], "processor": tiny_model()[1]}
        if with_tokens
        else {}
    )
    result = check_data(load_data(data_recipe(str(file))), **more)
    page = html_report(result)
    elements = _Page(page)
    assert "script" not in {tag for tag, _ in elements.found}
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    assert page.encode() and "\x1b" not in page
    assert "\x1b" not in _printed(result, 120)
    json.loads(json_report(result))


def test_a_clean_set_is_said_to_be_clean(corpus: Corpus) -> None:
    result = check_data(load_data(data_recipe(str(corpus.clean))))
    assert "Nothing was found." in html_report(result)
    assert "0 errors, 0 warnings, 0 notes" in _printed(result, 100)
