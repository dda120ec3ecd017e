"""The card: the hub's reader parses it, numbers are the run's, its code runs, no folder leaks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from mipha.deploy.model_card import export_for_hub, model_card, write_model_card
from mipha.evaluation.score import Result, Score
from mipha.models.build import save_checkpoint
from mipha.recipe import Recipe
from mipha.run import Run, create_run


def write_scores(run: Run, name: str, scores: list[Score], **changes: Any) -> None:
    facts = {
        "benchmark": name.removesuffix("-blind"),
        "split": "test",
        "blind": False,
        "num_questions": 2000,
        "n_asked": 2000,
    }
    facts |= {
        "n_failed": 0,
        "complete": True,
        "baselines": {},
        "prompts_sha256": "",
        "checkpoint_sha256": "",
        "max_new_tokens": 8,
    }
    result = Result(**facts | {"scores": tuple(scores), "protocol": ""} | changes)
    path = run.evaluation(name) / "scores.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(asdict(result)))


@pytest.fixture
def make_run(
    tmp_path: Path, tiny_model: Callable, tiny_run_recipe: Callable[..., Recipe]
) -> Callable[..., Run]:
    """`make_run("seed=1", family="phi")`: a finished run, its model not trained."""

    def run(*overrides: str, family: str = "llama") -> Run:
        made = create_run(tmp_path / "run", tiny_run_recipe(*overrides))
        made.stage("finetune").mkdir()
        save_checkpoint(*tiny_model(family), made.checkpoint("finetune"))
        return made

    return run


def card_of(run: Run) -> ModelCard:
    return ModelCard.load(write_model_card(run.final_checkpoint(), run))


def test_the_card_holds_the_scores_of_the_run(make_run: Callable[..., Run]) -> None:
    run = make_run()
    accuracy = Score("accuracy", 81.254, "%", 2000, 79.5, 83.0)
    write_scores(run, "gqa", [accuracy, Score("yes_no", 90.0, "%", 900, 88.0, 92.0)])
    write_scores(
        run,
        "mme",
        [
            Score("perception", 1488.9, "points", 2114, 1450.0, 1520.0),
            Score("cognition", 295.0, "points", 260),
        ],
    )
    write_scores(
        run,
        "pope",
        [Score("f1", 86.7, "%", 100, 80.0, 90.0)],
        n_asked=100,
        n_failed=3,
        complete=False,
    )
    write_scores(run, "textvqa", [Score("accuracy", None, "%", 2000)])
    half = [Score("accuracy", 50.0, "%", 2000)]
    write_scores(run, "scienceqa", half, n_empty=2000, all_empty=True)
    write_scores(run, "seedbench", [Score("images", None, "%", 2000)], n_empty=1200)
    write_scores(run, "vqav2", [], complete=True)  # its labels are with a server
    write_scores(run, "gqa-blind", [Score("accuracy", 40.0, "%", 2000, 38.0, 42.0)], blind=True)
    card = card_of(run)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in card.text.splitlines()
        if line.startswith("| gqa")
    ]
    blind, seen = sorted(rows, key=lambda row: row[3])
    assert seen == ["gqa", "test", "accuracy", "81.25 %", "79.50 to 83.00", "2000", ""]
    assert blind[3:5] == ["40.00 %", "38.00 to 42.00"] and "grey" in blind[6]
    assert "| mme | test | perception | 1488.90 points | 1450.00 to 1520.00 |" in card.text
    assert "| mme | test | cognition | 295.00 points |  | 260 |" in card.text
    assert (
        "| pope | test | f1 | 86.70 % | 80.00 to 90.00 | 100 "
        "| 97 of 2,000 questions: not comparable |" in card.text
    )
    assert "| textvqa | test | accuracy | undefined |" in card.text
    assert "| 50.00 % |  | 2000 | all answers are empty |" in card.text
    assert "| undefined |  | 2000 | 1,200 empty |" in card.text
    assert "vqav2" not in card.text
    # The hub shows only what may be compared.
    found = {(result.dataset_type, result.metric_type): result for result in card.data.eval_results}
    assert {key: result.metric_value for key, result in found.items()} == {
        ("gqa", "accuracy"): 81.25,
        ("mme", "perception"): 1488.9,
    }
    assert "79.50 to 83.00" in found["gqa", "accuracy"].metric_name


def test_the_card_says_how_it_was_made_and_names_no_folder_of_this_machine(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run("seed=17", "stages.finetune.learning_rate=4e-3")
    provenance = json.loads((run.folder / "provenance.json").read_text())
    hashes = {
        str(tmp_path / folder / "train.jsonl"): digest
        for folder, digest in (("a", "sha256:0123abcd"), ("b", "sha256:4567cdef"))
    }
    (run.folder / "provenance.json").write_text(json.dumps(provenance | {"data": hashes}))
    card = card_of(run)
    assert (
        card.data.pipeline_tag == "image-text-to-text" and card.data.library_name == "transformers"
    )
    assert card.data.eval_results is None and "The model was not evaluated." in card.text
    assert f"recipe {run.recipe.digest()}" in card.text and "seed: 17" in card.text
    assert all(digest in card.text for digest in hashes.values())
    trained = "vision tower full, projector full, language model full"
    assert (
        f"| finetune | messages (train.jsonl) | {trained} | 0.004 | 6 | at most 6 steps |"
        in card.text
    )
    assert "28 x 28 pixels, 4 tokens" in card.text and "at most 512 tokens" in card.text
    assert f"torch: {provenance['torch']}" in card.text
    assert str(tmp_path.parent) not in str(card) and "/tmp" not in str(card)


@pytest.mark.parametrize(
    ("tower", "language_model", "licence", "base_model"),
    [
        (
            "siglip-so400m-384",
            "qwen2.5-0.5b-instruct",
            "apache-2.0",
            ["google/siglip-so400m-patch14-384", "Qwen/Qwen2.5-0.5B-Instruct"],
        ),
        (
            "clip-large-336",
            "phi-2",
            "mit",
            ["openai/clip-vit-large-patch14-336", "microsoft/phi-2"],
        ),
        (
            "siglip-so400m-384",
            "phi-2",
            "other",
            ["google/siglip-so400m-patch14-384", "microsoft/phi-2"],
        ),
        (
            "dinov3-small",
            "gemma-2b",
            "other",
            ["facebook/dinov3-vits16-pretrain-lvd1689m", "google/gemma-2b"],
        ),
        (
            "dinov2-small",
            "somebody/model",
            "unknown",
            ["somebody/model"],
        ),  # the tower comes out of a Python package
        (None, None, "unknown", None),  # folders
    ],
)
def test_parts_and_licences(
    make_run: Callable[..., Run],
    tower: str | None,
    language_model: str | None,
    licence: str,
    base_model: Any,
) -> None:
    card = card_of(
        make_run(
            *(
                [f"model.vision_tower={tower}", f"model.language_model={language_model}"]
                if tower
                else []
            )
        )
    )
    assert card.data.license == licence
    assert card.data.get("license_name") == (
        "licences-of-the-parts" if licence == "other" else None
    )
    assert card.data.base_model == base_model
    if (tower, language_model) == ("siglip-so400m-384", "phi-2"):
        assert "| language model | `microsoft/phi-2` | MIT | Mipha-3B, Table 2 |" in card.text


@pytest.mark.parametrize(
    ("family", "reader"), [("llama", "from transformers import"), ("phi", "import mipha")]
)
def test_the_code_on_the_card_runs(
    make_run: Callable[..., Run],
    family: str,
    reader: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    out = export_for_hub(make_run(family=family).folder, tmp_path / "out")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image.jpg")
    (code,) = re.findall("```python\n(.*?)```", (out / "README.md").read_text(), flags=re.DOTALL)
    assert reader in code
    code = (
        code.replace("FOLDER OR HUB ID", str(out))
        .replace("FOLDER", str(out))
        .replace("image.jpg", str(tmp_path / "image.jpg"))
    )
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_a_folder_for_the_hub_is_the_model_and_its_card(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    run = make_run()
    source, out = run.final_checkpoint(), export_for_hub(run.folder, tmp_path / "out")
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert files.pop("README.md").decode() == model_card(source, run)
    assert files == {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(ValueError, match="out exists: choose another -o"):
        export_for_hub(run.folder, out)
    (source / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has not finished finetune"):
        export_for_hub(run.folder, tmp_path / "other")


def test_a_model_without_a_run_has_a_card_of_what_its_config_tells(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    card = ModelCard.load(
        export_for_hub(make_run().final_checkpoint(), tmp_path / "mine") / "README.md"
    )
    assert card.data.license == "unknown" and card.data.base_model is None
    assert "# mine" in card.text and "| language model | `a llama` | unknown |" in card.text
    assert "## Training" not in card.text and "## Scores" not in card.text


def test_a_strangers_words_are_text_in_the_card(make_run: Callable[..., Run]) -> None:
    from markdown_it import MarkdownIt

    name = "x\n# y <script>alert(1)</script>"
    run = make_run(f"name={json.dumps(name)}", f"description={json.dumps(HOSTILE)}")
    shown = MarkdownIt("commonmark").enable("table").render(card_of(run).text)
    outside = re.sub(r"<pre>.*?</pre>", "", shown, flags=re.DOTALL)
    assert not re.search(r"<(script|img|b|a|h3)\b|<!--|<em>", outside)
    assert outside.count("<h1>") == 1
    assert outside.count("<details>") == outside.count("</details>") >= 1
    assert "&lt;img src=x&gt;" in outside and "`three`" in outside.replace("</p>", "")


HOSTILE = """A model.

```
</details><img src=x> ````
### A heading [of](https://example.org) *mine* &lt;b> `three` <b>bold</b> <!-- the rest
"""
