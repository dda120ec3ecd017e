"""Every benchmark from official files to scores, as a user types it.

Runs are killed and resumed, shared by two processes, repaired, and compared.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mipha.cli import app
from mipha.evaluation.evaluate import plan_benchmarks
from tests import forked
from tests.evaluation.benchmarks.test_pope import write_official as write_pope
from tests.evaluation.benchmarks.test_pope import write_subset as write_pope_subset
from tests.evaluation.official import collect

OFFICIAL = collect()
NAMES = list(OFFICIAL)
ALL = ",".join(NAMES)
LONGEST = max(NAMES, key=lambda name: len(OFFICIAL[name].gold))
IMAGE = "val2014/COCO_val2014_000000000139.jpg"
ABOUT_IT = ["3", "4", "10000003", "20000003", "20000004"]
"""POPE's questions about that image, in the order of its files."""

SCORE_ALL = """
import json, sys
sys.modules["torch"] = sys.modules["transformers"] = None  # whoever imports them fails
from mipha.cli import app
for arguments in json.loads(sys.argv[1]):
    assert not app(arguments, standalone_mode=False), arguments
"""


def mipha(*arguments: object) -> Any:
    """The program's verb in this process, which has torch already."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mipha", *map(str, arguments)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_scores(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scores.json").read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder; a spreadsheet's name only, for it holds the time."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): b"" if path.suffix == ".xlsx" else path.read_bytes()
        for path in files
    }


@pytest.fixture(scope="module")
def replies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a judge said about the answers of every benchmark that takes one."""
    rows = [row for official in OFFICIAL.values() for row in official.replies]
    path = tmp_path_factory.mktemp("judge") / "replies.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def checkpoint(
    tiny_model: Callable, official_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`checkpoint(family)`: random weights, saved in the standard format."""
    root = tmp_path_factory.mktemp("checkpoints")

    def save(family: str) -> Path:
        from mipha.models.build import save_checkpoint

        if not (root / family).is_dir():
            model, processor = tiny_model(family)
            answer_in_one_word(model, processor, official_files)
            save_checkpoint(model, processor, root / family)
        return root / family

    return save


def answer_in_one_word(model: Any, processor: Any, data: Path) -> None:
    """Make random weights say yes, no, A or B, each about as often, and end their turn.

    Image and question decide which of them it is. POPE's questions set the balance: without a right
    yes its F1 is undefined.
    """
    import torch

    from mipha.assistant import render_prompt
    from mipha.data.images import open_image

    words = [
        processor.tokenizer.encode(word, add_special_tokens=False)[0]
        for word in (" yes", " no", "A", "B")
    ]
    questions = [
        question
        for part in plan_benchmarks(["pope"], data)
        for question in part.questions
        if question.image
    ]
    inputs = [
        processor(
            text=render_prompt(processor, question.text, True),
            images=open_image(question.image),
            return_tensors="pt",
        )
        for question in questions
    ]
    with torch.inference_mode():
        logits = torch.stack([model.eval()(**one).logits[0, -1, words] for one in inputs])
    bias = [
        [[word], 1e3 - usual] for word, usual in zip(words, logits.mean(0).tolist(), strict=True)
    ]
    model.generation_config.sequence_bias = bias + [
        [[word, processor.tokenizer.eos_token_id], 3e3] for word in words
    ]


@pytest.fixture(scope="module")
def evaluation(
    checkpoint: Callable[[str], Path], official_files: Path, replies: Path
) -> Callable[..., list[object]]:
    """`evaluation(out)`: the arguments that measure a checkpoint on every benchmark."""

    def arguments(
        out: Path, *more: object, root: Path = official_files, family: str = "gpt_neox"
    ) -> list[object]:
        return [
            "evaluate",
            checkpoint(family),
            "-b",
            ALL,
            "--data-root",
            root,
            "-o",
            out,
            "--judge-replies",
            replies,
            *more,
        ]

    return arguments


@pytest.fixture(scope="module")
def whole(
    evaluation: Callable[..., list[object]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Results of an uninterrupted evaluation."""
    out = tmp_path_factory.mktemp("whole")
    done = mipha(*evaluation(out))
    assert done.exit_code == 0, done.stderr
    assert "not complete" not in done.stdout
    return out


def test_every_benchmark_has_answers_and_scores_that_describe_themselves(whole: Path) -> None:
    assert sorted(path.name for path in whole.iterdir()) == NAMES
    partly_right = []
    for name, official in OFFICIAL.items():
        written = {path.name for path in (whole / name).iterdir()}
        assert written == {
            "predictions.meta.json",
            "predictions.jsonl",
            "scores.json",
            "tally.json",
            *([] if official.by_likelihood else ["worst-cases.html"]),
            *([official.upload] if official.upload else []),
        }
        rows = read_rows(whole / name / "predictions.jsonl")
        assert [row["question_id"] for row in rows] == list(official.gold)
        if official.by_likelihood:
            assert all(json.loads(row["text"]) for row in rows) and rows[0]["num_tokens"] > 1
        else:
            assert {row["text"] for row in rows} <= {"yes", "no", "A", "B"}
        assert all(row["finished"] for row in rows)

        content = read_scores(whole / name)
        assert (content["benchmark"], content["complete"], content["n_failed"]) == (name, True, 0)
        assert content["n_asked"] == content["num_questions"] == len(official.gold)
        assert content["split"] and content["protocol"]
        assert len(content["prompts_sha256"]) == len(content["checkpoint_sha256"]) == 64
        headline = content["scores"][0]
        assert (headline["metric"], headline["unit"]) == (official.metric, official.unit)
        assert 0 < headline["n"] <= len(official.gold)
        assert headline["low"] <= headline["value"] <= headline["high"]
        partly_right.append(0 < headline["value"] != official.best)
    assert sum(partly_right) > len(NAMES) / 2, "scores that are all or nothing test little"
    notes = [note for name in ("mmvet", "mmbench") for note in read_scores(whole / name)["notes"]]
    assert "graded by the judge in 2 runs" in notes[0] and "the judge was asked about" in notes[1]


def test_a_killed_evaluation_goes_on_and_asks_nothing_twice(
    evaluation: Callable[..., list[object]], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    typed = evaluation(out, "--batch-size", 2)
    process = forked.start(["mipha", *typed], tmp_path / "said.txt")
    watched = out / LONGEST / "predictions.jsonl"
    while process.is_alive() and not (watched.is_file() and watched.read_bytes().count(b"\n") >= 2):
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
    answered = {}
    for path in sorted(out.glob("*/predictions.jsonl")):
        rows = answered[path.parent.name] = read_rows(path)
        # A row that was written anew would lack the mark.
        path.write_text(
            "".join(json.dumps(row | {"before": True}) + "\n" for row in rows), encoding="utf-8"
        )
    num_questions = sum(len(official.gold) for official in OFFICIAL.values())
    assert set(answered) >= set(NAMES[: NAMES.index(LONGEST) + 1])
    assert sum(map(len, answered.values())) < num_questions

    done = mipha(*typed)
    assert done.exit_code == 0, done.stderr[-3000:]
    for name in NAMES:
        rows = read_rows(out / name / "predictions.jsonl")
        before = {row["question_id"] for row in answered.get(name, ())}
        assert {row["question_id"] for row in rows if row.pop("before", False)} == before, name
        assert rows == read_rows(whole / name / "predictions.jsonl"), name
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / name / "predictions.jsonl").write_text(lines, encoding="utf-8")
    assert contents(out) == contents(whole)


def test_two_processes_do_what_one_does(
    evaluation: Callable[..., list[object]], official_files: Path, whole: Path, tmp_path: Path
) -> None:
    """Errors included: one image file of POPE, in the second process's share, is none."""
    root = shutil.copytree(official_files, tmp_path / "data")
    (root / "pope" / IMAGE).write_bytes(b"not an image")
    assert mipha(*evaluation(tmp_path / "one", root=root)).exit_code == 1
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    typed = [*launch, *command(*evaluation(tmp_path / "two", root=root))[1:]]
    done = subprocess.run(
        typed,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 1 and "not complete: 6 of 11 questions" in done.stdout, done.stderr[
        -3000:
    ]
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == two
    assert [
        row["question_id"] for row in read_rows(tmp_path / "two" / "pope" / "errors.jsonl")
    ] == ABOUT_IT
    others = {
        name: content for name, content in contents(whole).items() if not name.startswith("pope/")
    }
    assert {
        name: content for name, content in two.items() if not name.startswith("pope/")
    } == others


def test_an_unreadable_image_is_an_error_until_it_is_replaced(
    checkpoint: Callable[[str], Path], whole: Path, tmp_path: Path
) -> None:
    write_pope(tmp_path / "data")
    good = (tmp_path / "data" / IMAGE).read_bytes()
    (tmp_path / "data" / IMAGE).write_bytes(good[:-20])
    arguments = (
        "evaluate",
        checkpoint("gpt_neox"),
        "-b",
        "pope",
        "--data-root",
        tmp_path / "data",
        "-o",
        tmp_path / "out",
    )
    out = tmp_path / "out" / "pope"
    for _ in range(2):  # what failed is asked again, and fails again
        done = mipha(*arguments)
        assert done.exit_code == 1, done.stderr
        assert (
            "5 of 11 questions failed and are not in these scores: see errors.jsonl"
            in done.stdout.replace("\n", " ")
        )
        assert "not complete: 6 of 11 questions" in done.stdout
        errors = read_rows(out / "errors.jsonl")
        assert [row["question_id"] for row in errors] == ABOUT_IT
        assert all(Path(IMAGE).name in row["error"] for row in errors)
        rows = {row["question_id"]: row for row in read_rows(whole / "pope" / "predictions.jsonl")}
        assert read_rows(out / "predictions.jsonl") == [
            row for name, row in rows.items() if name not in ABOUT_IT
        ]
        content = read_scores(out)
        assert (
            content["complete"],
            content["n_asked"],
            content["n_failed"],
            content["scores"][0]["n"],
        ) == (False, 11, 5, 6)
    (tmp_path / "data" / IMAGE).write_bytes(good)
    done = mipha(*arguments)
    assert done.exit_code == 0 and "not complete" not in done.stdout and "failed" not in done.stdout
    assert contents(out) == contents(whole / "pope")


def test_scoring_the_predictions_again_gives_the_same_numbers_without_torch(
    whole: Path, official_files: Path, replies: Path, tmp_path: Path
) -> None:
    calls = []
    for name in NAMES:
        calls.append(
            [
                "score",
                name,
                "--annotations",
                str(official_files / name),
                "--predictions",
                str(whole / name / "predictions.jsonl"),
            ]
        )
        calls[-1] += ["--json", str(tmp_path / f"{name}.json")]
        calls[-1] += ["--judge-replies", str(replies)] if OFFICIAL[name].replies else []
    done = subprocess.run(
        [sys.executable, "-c", SCORE_ALL, json.dumps(calls)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, official in OFFICIAL.items():
        again, first = (
            json.loads((tmp_path / f"{name}.json").read_text()),
            read_scores(whole / name),
        )
        flat: dict[str, Any] = {}
        for group, value in again["metrics"].items():
            flat |= (
                {f"{group}.{member}": number for member, number in value.items()}
                if isinstance(value, dict)
                else {group: value}
            )
        assert flat == {score["metric"]: score["value"] for score in first["scores"]}, name
        headline = first["scores"][0]
        assert (again["metric"], again["headline"]) == (official.metric, headline["value"])
        assert (again["n"], again["interval"]) == (
            headline["n"],
            [headline["low"], headline["high"]],
        )
        assert (again["protocol"], again["notes"]) == (first["protocol"], first["notes"])
        assert again["tally"] == json.loads((whole / name / "tally.json").read_text())
        assert sorted(again["per_question"]) == sorted(official.scored_ids)


SERVED = [(name, split) for name in NAMES for split in OFFICIAL[name].served]


@pytest.mark.parametrize(("benchmark", "split"), SERVED, ids=[" ".join(case) for case in SERVED])
def test_private_labels_mean_a_complete_upload_or_none(
    benchmark: str,
    split: str,
    checkpoint: Callable[[str], Path],
    official_files: Path,
    tmp_path: Path,
) -> None:
    upload = OFFICIAL[benchmark].served[split]
    file, key, asked = upload.file, upload.key, upload.asked
    arguments = (
        "evaluate",
        checkpoint("gpt_neox"),
        "-b",
        benchmark,
        "--data-root",
        official_files,
        "--split",
        split,
        "-o",
        tmp_path,
    )
    folder = tmp_path / f"{benchmark}-{split}"
    done = mipha(*arguments, "--limit", 1)
    assert done.exit_code == 0 and not (folder / file).exists(), (
        "half an upload is scored as if the rest were wrong"
    )
    assert (
        "no upload file" in done.stdout
        and f"not complete: 1 of {len(asked)} questions" in done.stdout
    )
    done = mipha(*arguments)
    assert done.exit_code == 0 and f"upload {folder / file} to {upload.server}" in done.stdout
    content = read_scores(folder)
    assert content["scores"] == [] and content["complete"] and not (folder / "tally.json").exists()
    texts = {row["question_id"]: row["text"] for row in read_rows(folder / "predictions.jsonl")}
    assert list(texts) == [str(name) for name in asked]
    if upload.content is not None:
        assert json.loads((folder / file).read_text()) == upload.content(texts)
        return
    if file.endswith(".json"):
        # What the m4c processor makes of the four words: "A" is an article.
        processed = {"yes": "yes", "no": "no", "A": "", "B": "b"}
        expected = [{key: name, "answer": processed[texts[str(name)]]} for name in asked] + [
            {key: n, "answer": ""} for n in upload.not_asked
        ]
        assert json.loads((folder / file).read_text()) == expected
        return
    from openpyxl import load_workbook

    header, *lines = load_workbook(folder / file).active.iter_rows(values_only=True)
    assert header == ("index", "question", "A", "B", "C", "D", "prediction", "split")
    assert [(line[0], line[6], line[7]) for line in lines] == [
        (name, texts[str(name)], "test") for name in asked
    ]


def test_a_dry_run_counts_warns_shows_prompts_and_leaves_nothing(
    evaluation: Callable[..., list[object]], tmp_path: Path
) -> None:
    done = mipha(*evaluation(tmp_path / "out", "--dry-run"))
    assert done.exit_code == 0, done.stderr
    said = done.stdout
    for name, official in OFFICIAL.items():
        num = len(official.gold)
        assert f"{name} " in said and f": {num:,} questions, all files are there" in said
        assert f"  warning: {num:,} questions, not the {official.size} of the official" in said
        for prompt in official.prompts:
            assert prompt in said

    # Three prompts of each, nearly all about an image.
    num_shown = sum(official.num_shown for official in OFFICIAL.values())
    num_bare = sum(official.num_bare for official in OFFICIAL.values())
    assert said.count("<|im_start|>user\n") == num_shown == said.count("<|im_start|>assistant\n")
    assert said.count("<|im_start|>user\n    <image>\n") == num_shown - num_bare
    assert not (tmp_path / "out").exists()


def test_a_dry_run_knows_the_wrong_version_of_pope(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    write_pope(tmp_path)
    image = Path(IMAGE).name
    for num_random, warned in ((2910, False), (3000, True)):
        for subset, size in (("adversarial", 3000), ("random", num_random), ("popular", 3000)):
            write_pope_subset(
                tmp_path, subset, ((number, image, "yes") for number in range(1, size + 1))
            )
        done = mipha(
            "evaluate", checkpoint("gpt_neox"), "-b", "pope", "--data-root", tmp_path, "--dry-run"
        )
        assert done.exit_code == 0 and f"pope test: {6000 + num_random:,} questions" in done.stdout
        assert (
            "coco_pope_random.json has 3,000 questions, but published numbers are of its "
            "2,910-line version" in done.stdout
        ) == warned
        assert ("warning" in done.stdout) == warned


def test_two_checkpoints_are_compared_question_by_question(
    evaluation: Callable[..., list[object]], whole: Path, official_files: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert mipha(*evaluation(other, family="llama")).exit_code == 0
    done = mipha("compare", whole, other, "--paired", "--json", tmp_path / "paired.json")
    assert done.exit_code == 0 and "p (Holm)" in done.stdout, done.stderr
    rows = json.loads((tmp_path / "paired.json").read_text())
    found = {(row["benchmark"], row["metric"]): row for row in rows}
    for name in NAMES:
        a, b = (
            {score["metric"]: score for score in read_scores(folder / name)["scores"]}
            for folder in (whole, other)
        )
        defined = {
            metric
            for metric in a
            if metric not in OFFICIAL[name].without_sums
            and None not in (a[metric]["value"], b[metric]["value"])
        }
        assert {metric for benchmark, metric in found if benchmark == name} == defined
        for metric in defined:
            row = found[name, metric]["paired"]
            assert (
                row["difference"] == pytest.approx(a[metric]["value"] - b[metric]["value"])
                and 0 < row["p_value"] <= 1
            )
    headlines = [found[name, official.metric] for name, official in OFFICIAL.items()]
    assert len([row for row in rows if row["p_holm"] is not None]) == len(headlines)
    assert any(row["paired"]["difference"] for row in headlines), (
        "two models that answer alike compare nothing"
    )
    least = 0.0
    for rank, row in enumerate(sorted(headlines, key=lambda row: row["paired"]["p_value"])):
        least = max(least, min(1.0, (len(headlines) - rank) * row["paired"]["p_value"]))
        assert row["p_holm"] == pytest.approx(least)

    for folder, name in ((whole, "a"), (other, "b")):
        predictions = folder / LONGEST / "predictions.jsonl"
        done = mipha(
            "score",
            LONGEST,
            "--annotations",
            official_files / LONGEST,
            "--predictions",
            predictions,
            "--json",
            tmp_path / f"{name}.json",
        )
        assert done.exit_code == 0, done.stderr
    done = mipha(
        "compare",
        tmp_path / "a.json",
        tmp_path / "b.json",
        "--paired",
        "--json",
        tmp_path / "files.json",
    )
    assert done.exit_code == 0, done.stderr
    scored = {
        row["metric"]: row["paired"] for row in json.loads((tmp_path / "files.json").read_text())
    }
    assert scored == {
        metric: row["paired"] for (name, metric), row in found.items() if name == LONGEST
    }
