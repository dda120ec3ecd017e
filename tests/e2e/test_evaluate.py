"""Every benchmark from official files to scores, as a user types it: killed and resumed, by two processes, mended, compared."""

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
from mipha.evaluation.benchmark import list_benchmarks
from mipha.evaluation.evaluate import plan
from tests.evaluation.official_files import (
    GOLD,
    SCORED,
    write_official_files,
    write_pope,
    write_pope_subset,
)

ALL = ",".join(list_benchmarks())
PICTURE = "val2014/COCO_val2014_000000000139.jpg"
ABOUT_IT = ["3", "4", "10000003", "20000003", "20000004"]
"""POPE's questions about that picture, in the order of its files."""

# Metric, unit and official number of questions. Source: papers and data files, as in LLaVA's docs/Evaluation.md
REPORTED = {
    "easy_vqa": ("accuracy", "%", "9,673"),
    "gqa": ("accuracy", "%", "12,578"),
    "mmbench": ("accuracy", "%", "4,377"),
    "mmbench_cn": ("accuracy", "%", "4,329"),
    "mme": ("perception", "points", "2,374"),
    "mmvet": ("total", "%", "218"),
    "pope": ("f1", "%", "8,910"),
    "scienceqa": ("img_accuracy", "%", "4,241"),
    "seedbench": ("image", "%", "14,233"),
    "textvqa": ("accuracy", "%", "5,000"),
    "vizwiz": ("vizwiz_api", "%", "4,319"),
    "vqav2": ("accuracy", "%", "214,354"),
}
UPLOADS = {
    "gqa": "testdev_balanced_predictions.json",
    "mmbench": "mmbench.xlsx",
    "mmbench_cn": "mmbench_cn.xlsx",
    "mmvet": "mmvet.json",
    "seedbench": "seedbench_predictions.jsonl",
}
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
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official_files(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def replies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a judge said in two runs over MM-Vet, and about any answer to MMBench that the rules cannot read."""
    graded = [
        {"question_id": name, "run": run, "responses": [f"0.{run + 3}"]}
        for name in GOLD["mmvet"]
        for run in range(2)
    ]
    read = [{"question_id": name, "text": "A"} for name in (*GOLD["mmbench"], *GOLD["mmbench_cn"])]
    path = tmp_path_factory.mktemp("judge") / "replies.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in graded + read))
    return path


@pytest.fixture(scope="module")
def checkpoint(
    tiny_model: Callable, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`checkpoint(family)`: random weights, saved in the standard format."""
    root = tmp_path_factory.mktemp("checkpoints")

    def save(family: str) -> Path:
        from mipha.models.build import save_checkpoint

        if not (root / family).is_dir():
            model, processor = tiny_model(family)
            answer_in_one_word(model, processor, data)
            save_checkpoint(model, processor, root / family)
        return root / family

    return save


def answer_in_one_word(model: Any, processor: Any, data: Path) -> None:
    """Make random weights say yes, no, A or B, each about as often, and end their turn; which one, picture and question decide."""
    import torch

    from mipha.assistant import render_prompt
    from mipha.data.images import open_image

    words = [
        processor.tokenizer.encode(word, add_special_tokens=False)[0]
        for word in (" yes", " no", "A", "B")
    ]
    questions = [
        question
        for part in plan(list_benchmarks(), data)
        for question in part.questions[::3]
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
    checkpoint: Callable[[str], Path], data: Path, replies: Path
) -> Callable[..., list[object]]:
    """`evaluation(out)`: the arguments that measure a checkpoint on every benchmark."""

    def arguments(
        out: Path, *more: object, root: Path = data, family: str = "gpt_neox"
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
    assert sorted(path.name for path in whole.iterdir()) == sorted(REPORTED) == list_benchmarks()
    partly_right = []
    for name, (metric, unit, _) in REPORTED.items():
        written = {path.name for path in (whole / name).iterdir()}
        assert written - {UPLOADS.get(name)} == {
            "predictions.meta.json",
            "predictions.jsonl",
            "scores.json",
            "tally.json",
        }
        assert UPLOADS.get(name) in (*written, None)
        rows = read_rows(whole / name / "predictions.jsonl")
        assert [row["question_id"] for row in rows] == list(GOLD[name])
        assert {row["text"] for row in rows} <= {"yes", "no", "A", "B"} and all(
            row["finished"] for row in rows
        )
        content = read_scores(whole / name)
        assert (content["benchmark"], content["complete"], content["n_failed"]) == (name, True, 0)
        assert content["n_asked"] == content["num_questions"] == len(GOLD[name])
        assert (
            content["split"]
            and content["protocol"]
            and len(content["prompts_sha256"]) == len(content["checkpoint_sha256"]) == 64
        )
        headline = content["scores"][0]
        assert (headline["metric"], headline["unit"]) == (metric, unit) and 0 < headline[
            "n"
        ] <= len(GOLD[name])
        assert headline["low"] <= headline["value"] <= headline["high"]
        partly_right.append(0 < headline["value"] < (100 if unit == "%" else 2000))
    assert sum(partly_right) > len(REPORTED) / 2, "scores that are all or nothing test little"
    notes = [note for name in ("mmvet", "mmbench") for note in read_scores(whole / name)["notes"]]
    assert "graded by the judge in 2 runs" in notes[0] and "the judge was asked about" in notes[1]


def test_a_killed_evaluation_goes_on_and_asks_nothing_twice(
    evaluation: Callable[..., list[object]], whole: Path, tmp_path: Path
) -> None:
    typed = command(*evaluation(tmp_path, "--batch-size", 2))
    process = subprocess.Popen(typed, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    watched = tmp_path / "mme" / "predictions.jsonl"  # the fifth of twelve, and the longest
    while process.poll() is None and not (
        watched.is_file() and watched.read_bytes().count(b"\n") >= 2
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, said
    answered = {}
    for path in sorted(tmp_path.glob("*/predictions.jsonl")):
        rows = answered[path.parent.name] = read_rows(path)
        # A row that was written anew would lack the mark.
        path.write_text(
            "".join(json.dumps(row | {"before": True}) + "\n" for row in rows), encoding="utf-8"
        )
    assert set(answered) >= {"gqa", "mme"} and sum(map(len, answered.values())) < sum(
        map(len, GOLD.values())
    )

    done = subprocess.run(typed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in REPORTED:
        rows = read_rows(tmp_path / name / "predictions.jsonl")
        before = {row["question_id"] for row in answered.get(name, ())}
        assert {row["question_id"] for row in rows if row.pop("before", False)} == before, name
        assert rows == read_rows(whole / name / "predictions.jsonl"), name
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / name / "predictions.jsonl").write_text(lines, encoding="utf-8")
    assert contents(tmp_path) == contents(whole)


def test_two_processes_do_what_one_does(
    evaluation: Callable[..., list[object]], data: Path, whole: Path, tmp_path: Path
) -> None:
    """Errors included: one picture of POPE, in the second process's share, is none."""
    root = shutil.copytree(data, tmp_path / "data")
    (root / "pope" / PICTURE).write_bytes(b"not a picture")
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


def test_an_unreadable_picture_is_an_error_until_it_is_mended(
    checkpoint: Callable[[str], Path], whole: Path, tmp_path: Path
) -> None:
    write_pope(tmp_path / "data")
    good = (tmp_path / "data" / PICTURE).read_bytes()
    (tmp_path / "data" / PICTURE).write_bytes(good[:-20])
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
        assert all(Path(PICTURE).name in row["error"] for row in errors)
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
    (tmp_path / "data" / PICTURE).write_bytes(good)
    done = mipha(*arguments)
    assert done.exit_code == 0 and "not complete" not in done.stdout and "failed" not in done.stdout
    assert contents(out) == contents(whole / "pope")


def test_scoring_the_predictions_again_gives_the_same_numbers_without_torch(
    whole: Path, data: Path, replies: Path, tmp_path: Path
) -> None:
    calls = []
    for name in REPORTED:
        calls.append(
            [
                "score",
                name,
                "--annotations",
                str(data / name),
                "--predictions",
                str(whole / name / "predictions.jsonl"),
            ]
        )
        calls[-1] += ["--json", str(tmp_path / f"{name}.json")]
        calls[-1] += (
            ["--judge-replies", str(replies)] if name in ("mmvet", "mmbench", "mmbench_cn") else []
        )
    done = subprocess.run(
        [sys.executable, "-c", SCORE_ALL, json.dumps(calls)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (metric, _, _) in REPORTED.items():
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
        assert (again["metric"], again["headline"]) == (metric, headline["value"])
        assert (again["n"], again["interval"]) == (
            headline["n"],
            [headline["low"], headline["high"]],
        )
        assert (again["protocol"], again["notes"]) == (first["protocol"], first["notes"])
        assert again["tally"] == json.loads((whole / name / "tally.json").read_text())
        assert sorted(again["per_question"]) == sorted(SCORED[name])


SERVED = {
    # VQAv2 has to list all of test2015, with nothing for what was not asked.
    ("vqav2", "test-dev"): (
        "vqav2_test2015.json",
        "question_id",
        [1000, 1002, 16000],
        [1001, 16001],
        "EvalAI challenge 830",
    ),
    ("vqav2", "test"): (
        "vqav2_test2015.json",
        "question_id",
        [1000, 1001, 1002, 16000, 16001],
        [],
        "EvalAI challenge 830",
    ),
    ("vizwiz", "test"): (
        "vizwiz_test.json",
        "image",
        [f"VizWiz_test_{n:08d}.jpg" for n in range(5)],
        [],
        "EvalAI challenge 2185",
    ),
    ("mmbench", "test"): (
        "mmbench.xlsx",
        "index",
        [int(name) for name in GOLD["mmbench"]],
        [],
        "mmbench.opencompass.org.cn",
    ),
    ("mmbench_cn", "test"): (
        "mmbench_cn.xlsx",
        "index",
        [int(name) for name in GOLD["mmbench_cn"]],
        [],
        "mmbench.opencompass.org.cn",
    ),
}


@pytest.mark.parametrize(("benchmark", "split"), SERVED, ids=[" ".join(case) for case in SERVED])
def test_private_labels_mean_a_complete_upload_or_none(
    benchmark: str, split: str, checkpoint: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    file, key, asked, not_asked, server = SERVED[benchmark, split]
    arguments = (
        "evaluate",
        checkpoint("gpt_neox"),
        "-b",
        benchmark,
        "--data-root",
        data,
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
    assert done.exit_code == 0 and f"upload {folder / file} to {server}" in done.stdout
    content = read_scores(folder)
    assert content["scores"] == [] and content["complete"] and not (folder / "tally.json").exists()
    texts = {row["question_id"]: row["text"] for row in read_rows(folder / "predictions.jsonl")}
    assert list(texts) == [str(name) for name in asked]
    if file.endswith(".json"):
        # What the m4c processor makes of the four words: "A" is an article.
        processed = {"yes": "yes", "no": "no", "A": "", "B": "b"}
        expected = [{key: name, "answer": processed[texts[str(name)]]} for name in asked] + [
            {key: n, "answer": ""} for n in not_asked
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
    for name, (_, _, size) in REPORTED.items():
        assert (
            f"{name} " in said and f": {len(GOLD[name]):,} questions, all files are there" in said
        )
        assert f"  warning: {len(GOLD[name]):,} questions, not the {size} of the official" in said
    assert (
        said.count("<|im_start|>user\n")
        == 3 * len(REPORTED)
        == said.count("<|im_start|>assistant\n")
    )
    # All about a picture, but for one question of ScienceQA's three.
    assert said.count("<|im_start|>user\n    <image>\n") == 3 * len(REPORTED) - 1
    word, letter = (
        "Answer the question using a single word or phrase.",
        "Answer with the option's letter from the given choices directly.",
    )
    for prompt in (
        f"  1\n    <|im_start|>user\n    <image>\n    Is there a adversarial thing, number 1, in the image?\n    {word}<|im_end|>\n",
        f"  4\n    <|im_start|>user\n    Context: Read.\n    Which figure?\n    A. chiasmus\n    B. apostrophe\n    {letter}<|im_end|>\n",
        f"  34602\n    <|im_start|>user\n    <image>\n    Is it red?\n    Reference OCR token: B, STOP\n    {word}<|im_end|>\n",
        "    <image>\n    看图。\n    图中有几只猫？\n    A. 一只\n    B. 两只\n    请直接回答选项字母。<|im_end|>\n",
        f"    <image>\n    Is it existence Yes?\n    {word}<|im_end|>\n",
        "  v1_0\n    <|im_start|>user\n    <image>\n    What is x?<|im_end|>\n",
    ):
        assert prompt in said
    assert not (tmp_path / "out").exists()


def test_a_dry_run_knows_the_wrong_version_of_pope(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    write_pope(tmp_path)
    picture = Path(PICTURE).name
    for num_random, warned in ((2910, False), (3000, True)):
        for subset, size in (("adversarial", 3000), ("random", num_random), ("popular", 3000)):
            write_pope_subset(
                tmp_path, subset, ((number, picture, "yes") for number in range(1, size + 1))
            )
        done = mipha(
            "evaluate", checkpoint("gpt_neox"), "-b", "pope", "--data-root", tmp_path, "--dry-run"
        )
        assert done.exit_code == 0 and f"pope test: {6000 + num_random:,} questions" in done.stdout
        assert (
            "coco_pope_random.json has 3,000 questions, but published numbers are of its 2,910-line version"
            in done.stdout
        ) == warned
        assert ("warning" in done.stdout) == warned


def test_two_checkpoints_are_compared_question_by_question(
    evaluation: Callable[..., list[object]], whole: Path, data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert mipha(*evaluation(other, family="llama")).exit_code == 0
    done = mipha("compare", whole, other, "--paired", "--json", tmp_path / "paired.json")
    assert done.exit_code == 0 and "p (Holm)" in done.stdout, done.stderr
    rows = json.loads((tmp_path / "paired.json").read_text())
    found = {(row["benchmark"], row["metric"]): row for row in rows}
    for name in REPORTED:
        a, b = (
            {score["metric"]: score for score in read_scores(folder / name)["scores"]}
            for folder in (whole, other)
        )
        extra = {
            "distribution",
            "std",
            "runs.0",
            "runs.1",
        }  # no sums over questions, so there is nothing to swap
        defined = {
            metric
            for metric in a
            if metric not in extra and None not in (a[metric]["value"], b[metric]["value"])
        }
        assert {metric for benchmark, metric in found if benchmark == name} == defined
        for metric in defined:
            row = found[name, metric]["paired"]
            assert (
                row["difference"] == pytest.approx(a[metric]["value"] - b[metric]["value"])
                and 0 < row["p_value"] <= 1
            )
    headlines = [found[name, metric] for name, (metric, _, _) in REPORTED.items()]
    assert len([row for row in rows if row["p_holm"] is not None]) == len(headlines) == 12
    assert any(row["paired"]["difference"] for row in headlines), (
        "two models that answer alike compare nothing"
    )
    least = 0.0
    for rank, row in enumerate(sorted(headlines, key=lambda row: row["paired"]["p_value"])):
        least = max(least, min(1.0, (12 - rank) * row["paired"]["p_value"]))
        assert row["p_holm"] == pytest.approx(least)

    for folder, name in ((whole, "a"), (other, "b")):
        predictions = folder / "mme" / "predictions.jsonl"
        done = mipha(
            "score",
            "mme",
            "--annotations",
            data / "mme",
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
        metric: row["paired"] for (name, metric), row in found.items() if name == "mme"
    }
