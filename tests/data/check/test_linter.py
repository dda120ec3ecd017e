"""The linter on planted defects: each is found at its row, and none is invented."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mipha.data.check import rows
from mipha.data.check.html import html_report
from mipha.data.check.linter import check_data, counts_by_kind, histogram
from mipha.data.check.report import json_report
from mipha.data.dataset import LoadedData, data_recipe, load_data
from mipha.data.order import count_steps
from mipha.data.sample import Message, Sample
from mipha.recipe import DataRecipe, Recipe, StageRecipe

sys.path.insert(0, str(Path(__file__).parent))
from tests.data.check.planted import DEFECTS, Corpus, plant


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return plant(tmp_path_factory.mktemp("corpus"), 4 * len(DEFECTS))


def _source(path: Path) -> LoadedData:
    return load_data(data_recipe(str(path)))


def _stage(tiny_run_recipe: Callable[..., Recipe], **values: object) -> StageRecipe:
    return tiny_run_recipe(
        *(f"stages.finetune.{key}={value}" for key, value in values.items())
    ).stages["finetune"]


def _write(file: Path, rows: list[Any]) -> LoadedData:
    file.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n",
        encoding="utf-8",
    )
    return _source(file)


def test_answers_contradict_for_one_image_and_question_and_captions_never_do(
    tmp_path: Path,
) -> None:
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / name)
    captions = [
        {"image": "a.png", "caption": text} for text in ("a dog", "a small dog", "an animal")
    ]
    answers = [
        {"image": image, "question": "Which animal?", "answer": answer}
        for image, answer in (("a.png", "dog"), ("a.png", "cat"), ("b.png", "cow"))
    ]
    found = check_data(_write(tmp_path / "rows.jsonl", [*captions, *answers]), workers=1).findings
    assert [f.row for f in found if f.kind == "conflicting-answer"] == [4]


def test_the_advice_is_that_of_the_row(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "b"}, {"colour": "red"}]
    (finding,) = check_data(_write(tmp_path / "rows.jsonl", rows), workers=1).findings
    assert finding.kind == "malformed" and finding.sentence.endswith(
        "or an image with caption or text"
    )


def _talk(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.mark.parametrize("with_tokens", [False, True])
def test_every_planted_defect_is_found_at_its_row_and_nothing_else(
    corpus: Corpus, with_tokens, tiny_model, tiny_run_recipe
) -> None:
    assert len(DEFECTS) >= 40
    chosen = (
        {"stage": _stage(tiny_run_recipe, row_tokens=2048), "processor": tiny_model()[1]}
        if with_tokens
        else {}
    )
    against = _source(corpus.evaluation)
    result = check_data(_source(corpus.planted), against=against, **chosen)
    assert {(finding.row, finding.kind) for finding in result.findings} == corpus.expected(
        with_tokens, with_evaluation=True
    )
    assert all(
        finding.where == f"planted.jsonl, line {finding.row + 1}"
        for finding in result.findings
        if finding.row is not None
    )
    assert result.num_errors == sum(finding.severity == "error" for finding in result.findings) > 0
    clean = check_data(_source(corpus.clean), against=against, **chosen)
    assert clean.findings == ()
    assert clean.num_samples == clean.num_rows == len(_source(corpus.clean))


def test_leaks_are_looked_for_only_where_there_is_an_evaluation_set(corpus: Corpus) -> None:
    result = check_data(_source(corpus.planted))
    assert {(finding.row, finding.kind) for finding in result.findings} == corpus.expected(
        with_tokens=False, with_evaluation=False
    )


def test_two_processes_find_what_one_finds(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = check_data(_source(corpus.planted), workers=1)
    monkeypatch.setattr(rows, "WORTH_A_POOL", 1)
    together = check_data(_source(corpus.planted), workers=2)
    assert together.findings == alone.findings
    assert (together.histograms, together.answers, together.num_distinct) == (
        alone.histograms,
        alone.answers,
        alone.num_distinct,
    )


def test_a_process_that_dies_is_said_with_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    source = _write(
        tmp_path / "some.jsonl", [_talk(f"What is {number}?", "A number.") for number in range(200)]
    )
    monkeypatch.setattr(rows, "WORTH_A_POOL", 1)
    dying = LoadedData(
        "some.jsonl",
        source.records,
        lambda record: (
            os._exit(9) if record.where.endswith("line 100") else source.to_sample(record)
        ),
    )
    with pytest.raises(
        OSError, match=r"process that checked rows \d+ to \d+ of some.jsonl was killed"
    ):
        check_data(dying, workers=2)


def test_what_llavas_rules_change_in_silence_is_said(tmp_path: Path) -> None:
    Image.effect_noise((40, 40), 90).save(tmp_path / "a.png")
    human, gpt = (
        {"from": name, "value": text}
        for name, text in (("human", "<image>\nWhat is it?"), ("gpt", "A cat."))
    )
    rows = [
        {"image": "a.png", "conversations": [human, gpt]},
        {
            "image": "a.png",
            "conversations": [gpt, human | {"value": "<image>\nAnd the colour?"}, gpt],
        },
        {
            "image": "a.png",
            "conversations": [
                human | {"value": "<image>\nHow old?"},
                gpt,
                human | {"value": "Why?"},
            ],
        },
        {"image": "a.png", "conversations": [human | {"value": "<image> <image>\nHow big?"}, gpt]},
        {"image": "a.png", "conversations": [human]},
    ]
    result = check_data(_write(tmp_path / "llava.jsonl", rows))
    assert [(finding.row, finding.kind) for finding in result.findings] == [
        (1, "left-out-turn"), (2, "left-out-turn"), (3, "merged-marker"), (4, "role-order"),
    ]  # fmt: skip


def test_a_template_that_leaves_images_out_is_said(
    tiny_data: Path, tiny_model, tiny_run_recipe
) -> None:
    processor = tiny_model()[1]
    said = "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    turn = (
        "{% if message.role == 'user' %}"
        + said
        + "{% else %}{% generation %}"
        + said
        + "{% endgeneration %}{% endif %}"
    )
    processor.chat_template = "{% for message in messages %}" + turn + "{% endfor %}"
    result = check_data(_source(tiny_data), _stage(tiny_run_recipe), processor)
    assert [finding.row for finding in result.findings] == [
        row for row in range(24) if row % 4
    ]  # those with an image
    assert {(finding.kind, finding.what) for finding in result.findings} == {
        ("image-count", "its text holds 0 images but 1 are given")
    }


_WORDS = st.sampled_from(["user", "assistant", "<image>", "a.png", "text", "image"])
_KEYS = st.sampled_from(["role", "content", "type", "text", "image", "from", "value", "url"])
_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=9) | _WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=12,
)
_TURN = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system"]),
        "content": st.text(max_size=20) | _JSON,
    }
)
_ROW = st.fixed_dictionaries(
    {"messages": st.lists(_TURN, max_size=4) | _JSON, "images": st.lists(_JSON, max_size=2) | _JSON}
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(_ROW, max_size=6))
def test_no_row_stops_the_check(
    rows: list[Any], tmp_path: Path, tiny_model, tiny_run_recipe
) -> None:
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = load_data(DataRecipe(dataset="messages", root=tmp_path / "rows.jsonl"))
    result = check_data(source, _stage(tiny_run_recipe), tiny_model()[1])
    assert result.num_rows == len(rows)
    assert html_report(result) and json_report(result)


def test_a_table_names_its_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer\nWhat is it?,A cat.\nAnd this?,nan\n")
    [finding] = check_data(_source(tmp_path / "rows.csv")).findings
    assert (finding.kind, finding.row, finding.where) == (
        "placeholder-answer",
        1,
        "rows.csv, line 3",
    )


def test_limit_and_empty_sets(tmp_path: Path) -> None:
    source = _write(
        tmp_path / "some.jsonl", [_talk("What is this?", "A cat."), _talk("What is that?", "")]
    )
    one = LoadedData(source.name, source.records, source.to_sample, limit=1)
    assert (len(one), check_data(one).findings) == (1, ())
    none = check_data(LoadedData("nothing", [], lambda record: record))
    assert (none.num_rows, none.findings, none.histograms) == (0, (), ())


def test_evaluation_rows_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    source = _write(tmp_path / "some.jsonl", [_talk("What is this?", "A cat.")])
    [finding] = check_data(
        source, against=_write(tmp_path / "held.jsonl", [_talk("Really?", "Yes."), "{"])
    ).findings
    assert (finding.kind, finding.row) == ("uncompared", None)
    assert finding.what == "1 rows of held.jsonl could not be read"


def test_an_evaluation_set_may_be_samples(tmp_path: Path) -> None:
    """A benchmark's questions are no data set: they come as samples."""
    Image.effect_noise((40, 40), 90).save(tmp_path / "a.png")
    asked = Sample(
        "q",
        (Message("user", "<image>\nWhat IS  it?"), Message("assistant", "-")),
        (tmp_path / "a.png",),
    )
    row = _talk("<image>\nWhat is it?\nAnswer with one word.", "Cat") | {"images": ["a.png"]}
    result = check_data(
        _write(tmp_path / "some.jsonl", [row]),
        against=LoadedData("pope", [asked], lambda sample: sample),
    )
    assert [finding.kind for finding in result.findings] == ["leak"]


def test_a_question_without_an_image_leaks_too(tmp_path: Path) -> None:
    rows = [_talk("Who wrote Faust?", "Goethe."), _talk("Who painted it?", "Nobody.")]
    result = check_data(
        _write(tmp_path / "some.jsonl", rows),
        against=_write(tmp_path / "held.jsonl", [_talk("who wrote FAUST?", "Marlowe.")]),
    )
    assert [(finding.kind, finding.row) for finding in result.findings] == [("leak", 0)]


@pytest.mark.parametrize(("num_yes", "found"), [(75, False), (90, True)])
def test_an_answer_to_nearly_everything(num_yes: int, found: bool, tmp_path: Path) -> None:
    rows = [
        _talk(f"Is {number} large?", "Yes." if number < num_yes else "No.") for number in range(100)
    ]
    result = check_data(_write(tmp_path / "some.jsonl", rows))
    assert counts_by_kind(result.findings) == ({"unbalanced-answers": 1} if found else {})
    assert result.answers.top == (("yes", num_yes), ("no", 100 - num_yes))


def test_yes_and_no_are_weighed_among_themselves(tmp_path: Path) -> None:
    rows = [_talk(f"Is {number} large?", "yes" if number % 10 else "no") for number in range(100)]
    rows += [_talk(f"How much is {number}?", f"It is {number}.") for number in range(400)]
    [finding] = check_data(_write(tmp_path / "some.jsonl", rows)).findings
    assert finding.what.startswith("'yes' is 90 % of 100 yes/no answers")


def test_what_a_model_guesses_without_the_image(tmp_path: Path) -> None:
    """Asked six times with four "red", and five times with three "cat": 7 of 11; a question asked
    once tells nothing.
    """
    answers = [
        ("Which colour?", ("red", "red", "red", "red", "blue", "green")),
        ("Which animal?", ("cat", "cat", "cat", "dog", "cow")),
        ("Why?", ("x",)),
    ]
    rows = []
    for question, said in answers:
        for answer in said:
            Image.effect_noise((40, 40), 90).save(tmp_path / f"{len(rows)}.png")
            rows.append(_talk(f"<image>\n{question}", answer) | {"images": [f"{len(rows)}.png"]})
    found = check_data(_write(tmp_path / "some.jsonl", rows)).answers
    assert (found.num_guessed, found.num_guessable) == (7, 11)


def test_histogram_counts_everything_once() -> None:
    values = np.asarray([5] * 50 + [6] * 30 + [9] * 20 + [10_000])
    found = histogram("length", "tokens", values)
    assert sum(found.counts) == 101
    assert (found.edges[0], found.minimum, found.median, found.maximum) == (5, 5, 6, 10_000)
    assert found.edges[-1] < 100  # the one outlier does not flatten the rest
    assert found.counts[:2] == (50, 30)


@pytest.mark.parametrize("batching", ["padded", "packed", "shared-image"])
def test_steps_tokens_and_packing_are_those_of_training(
    batching: str, tiny_data: Path, tiny_model, tiny_run_recipe
) -> None:
    from mipha.data.batches import StepDataset
    from mipha.data.mixture import Mixture

    stage = _stage(
        tiny_run_recipe,
        batching=batching,
        epochs=1,
        max_steps="null",
        batch_size=8,
        micro_batch_rows=2,
    )
    processor = tiny_model()[1]
    steps = StepDataset(Mixture(stage.data), processor, stage, seed=3)
    training = check_data(_source(tiny_data), stage, processor, seed=3).training
    assert training is not None
    made = [steps[step] for step in range(len(steps))]
    assert (training.steps, training.samples_read, training.num_samples) == (len(steps), 24, 24)
    assert training.num_trained == sum(step.num_supervised for step in made)
    [packing] = [packing for packing in training.packings if packing.chosen]
    assert packing.batching == batching
    positions, tokens = sum(step.num_padded for step in made), sum(step.num_tokens for step in made)
    assert packing.positions_per_sample == pytest.approx(positions / 24)
    assert packing.padding == pytest.approx(100 * (1 - tokens / positions))


@pytest.mark.parametrize(
    "shown", [{"weight": 0.5}, {"weight": 2.5}, {"cap": 7}, {"weight": 3, "cap": 30}]
)
@pytest.mark.parametrize("opened_by", ["the stage's own entry", "its address"])
def test_the_linter_a_plan_and_training_count_the_same_steps(
    shown: dict[str, Any],
    opened_by: str,
    tiny_data: Path,
    tiny_model,
    tiny_run_recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mipha.catalog.published_data import PUBLISHED_DATA
    from mipha.data.batches import StepDataset
    from mipha.data.mixture import Mixture
    from mipha.planning import plan

    stage = _stage(tiny_run_recipe, epochs=1.5, max_steps="null", batch_size=5)
    data = stage.data[0].model_copy(update=shown)
    stage = stage.model_copy(update={"data": (data,)})
    model, processor = tiny_model()
    steps = StepDataset(Mixture(stage.data), processor, stage, seed=3)
    indices = [index for step in range(len(steps)) for index in steps.indices(step)]

    # The linter reads the data itself, by either way of naming it.
    source = _source(tiny_data) if opened_by == "its address" else load_data(data)
    training = check_data(source, stage, processor, seed=3).training
    assert training is not None
    assert (training.steps, training.samples_read) == (len(steps), len(indices))

    # A plan for published data that is not on this machine knows the number of samples alone.
    fact = dataclasses.replace(PUBLISHED_DATA["llava_instruct"], samples=24)
    monkeypatch.setattr(plan, "PUBLISHED_DATA", {data.dataset: fact})
    gone = stage.model_copy(
        update={"data": (data.model_copy(update={"root": Path("/nowhere/at.all")}),)}
    )
    recipe = tiny_run_recipe()
    recipe = recipe.model_copy(update={"stages": {"finetune": gone}})
    case = plan._Case(recipe, "finetune", plan.device_named("a100"), 1)
    assert plan._read_steps(case, model)[1] == len(steps)


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(1, "null", (4, 24)), (2, "null", (8, 48)), (0.5, "null", (2, 12)), (2, 3, (3, 18))],
)
def test_steps_follow_from_epochs_and_batch_size(
    epochs, max_steps, expected, tiny_run_recipe
) -> None:
    assert (
        count_steps(_stage(tiny_run_recipe, epochs=epochs, max_steps=max_steps, batch_size=6), 24)
        == expected
    )


def test_without_a_recipe_neither_torch_nor_transformers_is_loaded(corpus: Corpus) -> None:
    import subprocess

    program = (
        "import sys\nfrom mipha.data.check.linter import check_data\n"
        "from mipha.data.check.html import html_report\n"
        "from mipha.data.dataset import data_recipe, load_data\n"
        f"html_report(check_data(load_data(data_recipe({str(corpus.clean)!r}))))\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[3] / "src")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "set()"
