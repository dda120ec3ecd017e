"""`mipha score` on all benchmarks, and the errors of bad input before a model is loaded."""

from __future__ import annotations

import base64
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mipha.cli import app
from mipha.data.images import SUFFIXES
from mipha.evaluation.benchmark import load_benchmark
from tests.evaluation.benchmarks.test_pope import write_official as write_pope
from tests.evaluation.judge_server import Server, serving
from tests.evaluation.official import Official, collect

OFFICIAL = collect()
POPE = OFFICIAL["pope"].gold


def mipha(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_lines(path: Path, rows: Iterable[Mapping[str, Any] | str]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def write_predictions(path: Path, texts: Mapping[str, str]) -> Path:
    return write_lines(path, ({"question_id": name, "text": text} for name, text in texts.items()))


def score(benchmark: str, annotations: Path, predictions: Path, out: Path, *more: object) -> Any:
    return mipha(
        "score",
        benchmark,
        "--annotations",
        annotations,
        "--predictions",
        predictions,
        "--json",
        out,
        *more,
    )


def judged(benchmark: str, folder: Path) -> tuple[object, ...]:
    """Options for a benchmark that a judge grades, or may grade."""
    if not OFFICIAL[benchmark].replies:
        return ()
    return ("--judge-replies", write_lines(folder / "replies.jsonl", OFFICIAL[benchmark].replies))


def assert_refused(done: Any, *words: str) -> None:
    """One sentence with these words in it, exit code 2, no traceback."""
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), repr(done.exception)
    assert (
        done.stdout == ""
        and done.stderr.startswith("mipha: ")
        and len(done.stderr.splitlines()) == 1
    ), done.stderr
    for word in words:
        assert word in done.stderr


@pytest.fixture
def folder(official_files: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`folder(benchmark)`: a copy of its official files, to break."""
    return lambda benchmark: shutil.copytree(
        official_files / benchmark, tmp_path / "data" / benchmark
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What looks like a model as long as nobody loads it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not weights")
    return tmp_path / "model"


@pytest.mark.parametrize("benchmark", OFFICIAL)
def test_gold_answers_get_full_marks_in_any_order_and_without_images(
    benchmark: str, folder: Callable, tmp_path: Path
) -> None:
    annotations = folder(benchmark)
    for path in annotations.rglob("*"):
        if path.suffix in SUFFIXES:
            path.unlink()
    official = OFFICIAL[benchmark]
    texts = list(official.gold.items())
    random.Random(0).shuffle(texts)
    predictions = write_predictions(tmp_path / "p.jsonl", dict(texts))
    out = tmp_path / "new" / "out.json"
    done = score(benchmark, annotations, predictions, out, *judged(benchmark, tmp_path))
    assert done.exit_code == 0, done.stderr

    content = json.loads(out.read_text())
    best = pytest.approx(official.best)
    assert (content["metric"], content["unit"]) == (official.metric, official.unit)
    assert content["headline"] == content["metrics"][official.metric] == best
    assert sorted(content["per_question"]) == sorted(official.scored_ids)
    if load_benchmark(benchmark).judge != "required":
        assert set(content["per_question"].values()) == {1.0}
    assert {"parsed", "normalised", "submission"} & content.keys() == set(official.readings)
    for reading in official.readings:
        lacking = set(official.not_parsed if reading == "parsed" else ())
        assert content[reading].keys() == official.gold.keys() - lacking
    assert official.metric in done.stdout


def test_scoring_loads_no_torch(official_files: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from mipha.cli import main\nmain()"
    )
    predictions = write_predictions(tmp_path / "p.jsonl", OFFICIAL["easy_vqa"].gold)
    arguments = [
        "score",
        "easy_vqa",
        "--annotations",
        official_files / "easy_vqa",
        "--predictions",
        predictions,
        "--json",
        tmp_path / "o.json",
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and (tmp_path / "o.json").is_file(), done.stderr


def test_recorded_replies_decide_what_rules_cannot_read(
    official_files: Path, tmp_path: Path
) -> None:
    """Of MMBench's three questions one is right by rules.

    Of the others a judge finds one right, and one like no option.
    """
    texts = OFFICIAL["mmbench"].gold | {"241": "a furry animal", "7": "hm", "1000009": "crimson"}
    predictions = write_predictions(tmp_path / "p.jsonl", texts)
    replies = [
        {"question_id": 241, "text": "A"},
        {"question_id": "7", "text": "Z"},
        {"question_id": "1000009", "text": "The answer is A"},
    ]
    found = {}
    for name, more in (
        ("rules", ()),
        ("judge", ("--judge-replies", write_lines(tmp_path / "r.jsonl", replies))),
    ):
        done = score(
            "mmbench", official_files / "mmbench", predictions, tmp_path / f"{name}.json", *more
        )
        assert done.exit_code == 0, done.stderr
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert (found["rules"]["headline"], found["judge"]["headline"]) == (0, pytest.approx(200 / 3))
    assert "without a judge (exact_matching): 3 of 7" in found["rules"]["notes"][0]
    assert "the judge was asked about 3 of 7" in found["judge"]["notes"][0]
    assert [found["judge"]["parsed"][name] for name in ("241", "7", "1000009")] == ["A", "Z", "A"]
    lacking = write_lines(tmp_path / "r.jsonl", replies[:1])
    done = score(
        "mmbench",
        official_files / "mmbench",
        predictions,
        tmp_path / "out.json",
        "--judge-replies",
        lacking,
    )
    assert_refused(done, "r.jsonl has no reply for question 7")
    assert not (tmp_path / "out.json").exists()


def test_no_judge_no_score_of_mmvet(official_files: Path, model: Path, tmp_path: Path) -> None:
    predictions = write_predictions(tmp_path / "p.jsonl", OFFICIAL["mmvet"].gold)
    assert_refused(
        score("mmvet", official_files / "mmvet", predictions, tmp_path / "out.json"),
        "graded by a judge",
        "--judge-replies FILE",
    )
    done = mipha(
        "evaluate", model, "-b", "mmvet", "--data-root", official_files, "-o", tmp_path / "out"
    )
    assert_refused(done, "mmvet is graded by a judge")
    replies = ("--judge-replies", write_lines(tmp_path / "r.jsonl", OFFICIAL["mmvet"].replies))
    predictions = write_predictions(tmp_path / "p.jsonl", POPE)
    assert_refused(
        score("pope", official_files / "pope", predictions, tmp_path / "out.json", *replies),
        "by rules alone: leave the judge out",
    )
    both = ("--judge", "http://localhost:1/v1")
    assert_refused(
        score(
            "mmvet", official_files / "mmvet", predictions, tmp_path / "out.json", *replies, *both
        ),
        "two judges: give one",
    )
    assert_refused(
        score("mmvet", official_files / "mmvet", predictions, tmp_path / "out.json", *both),
        "needs --judge-model",
    )
    assert not (tmp_path / "out.json").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("benchmark", OFFICIAL)
def test_a_prediction_too_few_or_too_many_is_named(
    benchmark: str, official_files: Path, tmp_path: Path
) -> None:
    names = list(OFFICIAL[benchmark].gold)
    number = len(names)
    out = tmp_path / "out" / "o.json"
    lacking = write_predictions(tmp_path / "p.jsonl", {name: "yes" for name in names[:-1]})
    done = score(benchmark, official_files / benchmark, lacking, out, *judged(benchmark, tmp_path))
    assert_refused(done, f"p.jsonl lacks 1 of {number} questions, such as {names[-1]}")
    twice = write_lines(
        tmp_path / "p.jsonl", [{"question_id": name, "text": "yes"} for name in [*names, names[1]]]
    )
    done = score(benchmark, official_files / benchmark, twice, out, *judged(benchmark, tmp_path))
    assert_refused(done, f"p.jsonl line {number + 1}: question_id {names[1]} is also on line 2")
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question_id": "2", "text": "No"', "p.jsonl line 2 is not valid JSON"),
        ('["2", "No"]', "p.jsonl line 2 is not a JSON object"),
        (
            '{"question_id": "2", "reply": "No"}',
            "p.jsonl line 2 has no 'text' or 'prediction', only 'question_id', 'reply': write",
        ),
        (
            '{"question_id": "2", "text": null}',
            "p.jsonl line 2: text None should be a valid string",
        ),
        (
            '{"question_id": 2.5, "text": "No"}',
            "p.jsonl line 2: question_id 2.5 should be a text or a whole number",
        ),
        ('{"question_id": "77", "text": "No"}', "p.jsonl line 2: no question has the id 77"),
        ("\udcff", "p.jsonl line 2 is not valid JSON"),
    ],
)
def test_a_malformed_line_is_named(
    line: str, words: str, official_files: Path, tmp_path: Path
) -> None:
    rows = [json.dumps({"question_id": name, "text": text}) for name, text in POPE.items()]
    rows[1] = line
    (tmp_path / "p.jsonl").write_bytes("\n".join(rows).encode("utf-8", "surrogateescape"))
    assert_refused(
        score("pope", official_files / "pope", tmp_path / "p.jsonl", tmp_path / "out" / "o.json"),
        words,
    )
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named(official_files: Path, tmp_path: Path) -> None:
    out, predictions = (
        tmp_path / "out" / "o.json",
        write_predictions(tmp_path / "p.jsonl", POPE),
    )
    assert_refused(
        score("pope", official_files / "pope", tmp_path / "none.jsonl", out),
        "no file",
        "none.jsonl",
    )
    assert_refused(
        score("pop", official_files / "pope", predictions, out),
        "no benchmark 'pop': did you mean pope",
    )
    replies = ("--judge-replies", tmp_path / "none.jsonl")
    assert_refused(
        score("mmvet", official_files / "mmvet", predictions, out, *replies),
        "no file",
        "none.jsonl",
    )
    for benchmark in OFFICIAL:
        done = score(benchmark, tmp_path / "none", predictions, out, *judged(benchmark, tmp_path))
        assert_refused(done, str(tmp_path / "none"))
    assert not out.parent.exists()


@pytest.mark.parametrize("benchmark", OFFICIAL)
def test_a_label_outside_the_options_is_named(
    benchmark: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    broken = OFFICIAL[benchmark].broken_label
    path = folder(benchmark) / broken.file
    content = path.read_bytes()
    assert broken.old.encode() in content
    path.write_bytes(content.replace(broken.old.encode(), broken.new.encode(), 1))
    predictions = write_predictions(tmp_path / "p.jsonl", OFFICIAL[benchmark].gold)
    data, out = tmp_path / "data" / benchmark, tmp_path / "out" / "o.json"
    done = score(benchmark, data, predictions, out, *judged(benchmark, tmp_path))
    assert_refused(done, *broken.words)
    assert not (tmp_path / "out").exists()


def files_of(official: Official) -> tuple[str, ...]:
    return (official.broken_label.file, *official.other_files)


FILES = [(name, file) for name, official in OFFICIAL.items() for file in files_of(official)]


@pytest.mark.parametrize(("benchmark", "file"), FILES, ids=[file for _, file in FILES])
def test_a_file_that_is_cut_off_or_not_there_is_named(
    benchmark: str, file: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    path = folder(benchmark) / file
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 + 3])
    predictions = write_predictions(tmp_path / "p.jsonl", OFFICIAL[benchmark].gold)
    data, out = tmp_path / "data" / benchmark, tmp_path / "out" / "o.json"
    arguments = (benchmark, data, predictions, out, *judged(benchmark, tmp_path))
    assert_refused(score(*arguments), str(path))
    path.unlink()
    assert_refused(score(*arguments), OFFICIAL[benchmark].without_file or path.name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("benchmark", ["gqa", "mme"])
def test_official_files_without_a_question_are_refused(
    benchmark: str, folder: Callable[[str], Path], model: Path, tmp_path: Path
) -> None:
    data = folder(benchmark)
    if benchmark == "gqa":
        (data / "testdev_balanced_questions.json").write_text("{}")
    for path in data.glob("*.txt"):
        path.unlink()
    predictions = write_predictions(tmp_path / "p.jsonl", OFFICIAL[benchmark].gold)
    assert_refused(
        score(benchmark, data, predictions, tmp_path / "out.json"), str(data), "no question"
    )
    for more in ((), ("--dry-run",)):
        done = mipha(
            "evaluate", model, "-b", benchmark, "--data-root", data, "-o", tmp_path / "out", *more
        )
        assert_refused(done, str(data), "no question")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.json").exists()


IMAGES = {name: official.image for name, official in OFFICIAL.items() if official.image}


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["evaluate", "dry-run"])
@pytest.mark.parametrize(("benchmark", "image"), IMAGES.items(), ids=IMAGES)
def test_a_missing_image_is_found_before_anything_is_asked(
    benchmark: str,
    image: str,
    more: tuple[str, ...],
    folder: Callable[[str], Path],
    model: Path,
    tmp_path: Path,
) -> None:
    (folder(benchmark) / image).unlink()
    replies = judged(benchmark, tmp_path)
    done = mipha(
        "evaluate",
        model,
        "-b",
        benchmark,
        "--data-root",
        tmp_path / "data",
        "-o",
        tmp_path / "out",
        *replies,
        *more,
    )
    assert_refused(done, "no image", Path(image).name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("x" * 65, "mmbench_dev_20230712.tsv line 3: the image is not base64"),
        (
            "",
            "mmbench_dev_20230712.tsv line 3: the image is neither an image in base64 nor the "
            "index of a row with one",
        ),
        ("12", "mmbench_dev_20230712.tsv line 3: the image is neither"),
    ],
)
def test_an_image_in_a_table_that_is_none_is_found_too(
    cell: str, words: str, folder: Callable[[str], Path], model: Path, tmp_path: Path
) -> None:
    path = folder("mmbench") / "mmbench_dev_20230712.tsv"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    cells = lines[2].split("\t")
    number = lines[0].split("\t").index("image")
    assert base64.b64decode(cells[number]).startswith(b"\x89PNG")
    cells[number] = cell
    lines[2] = "\t".join(cells)
    path.write_text("".join(lines), encoding="utf-8", newline="")
    assert_refused(
        mipha(
            "evaluate", model, "-b", "mmbench", "--data-root", path.parent, "-o", tmp_path / "out"
        ),
        words,
    )
    assert not (tmp_path / "out").exists()


def test_other_mistakes_of_an_evaluation(official_files: Path, model: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    for arguments, words in (
        (
            ("-b", "pope,gqq", "--data-root", official_files, *out),
            "no benchmark 'gqq': did you mean gqa",
        ),
        (("-b", ",", "--data-root", official_files, *out), "no benchmark was named"),
        (("-b", "pope,gqa", "--data-root", official_files / "pope", *out), "pope/pope"),
        (("-b", "pope", *out), "pope has no packaged copy: get coco_pope_adversarial.json"),
        (
            ("-b", "pope", "--data-root", official_files, "--split", "val", *out),
            "benchmark pope has no split 'val': choose test",
        ),
        (
            ("-b", "pope", "--data-root", official_files, "--limit", 0, *out),
            "limit is 0: give 1 or more",
        ),
        (
            ("-b", "pope", "--data-root", official_files, "--batch-size", 0, *out),
            "batch_size is 0: give 1 or more",
        ),
        (("-b", "pope", "--data-root", official_files), "has no place for results: give -o"),
    ):
        assert_refused(mipha("evaluate", model, *arguments), words)
    assert_refused(
        mipha("evaluate", tmp_path / "none", "-b", "pope", "--data-root", official_files, *out),
        "no run or model folder",
        "none",
    )
    # The model is named before its benchmark's data are missed.
    for more in (out, ("--dry-run",)):
        done = mipha(
            "evaluate", tmp_path / "none", "-b", "pope", "--data-root", tmp_path / "no-data", *more
        )
        assert_refused(done, "no run or model folder", "none")
    assert not (tmp_path / "out").exists()


def ask_judge(folder: Path, data: Path, served: Server, *more: object) -> Any:
    """Score MM-Vet's gold answers by a judge; recorded replies go beside the predictions."""
    predictions = write_predictions(folder / "p.jsonl", OFFICIAL["mmvet"].gold)
    judge = ("--judge", served.url, "--judge-model", "j")
    data = data / "mmvet"
    arguments = ("score", "mmvet", "--annotations", data, "--predictions", predictions)
    return mipha(*arguments, *judge, *more)


@pytest.mark.parametrize(
    ("reply", "advice"),
    [
        ("<think>\nOkay,", "give it more with --judge-request max_tokens=4096"),
        (None, "give it more with --judge-request max_tokens=4096"),
        ("", "give it more"),
        ("It is right.", "use a judge that follows the prompt"),
    ],
)
def test_a_judge_that_never_gives_a_grade_is_an_error_and_no_score(
    reply: str | None, advice: str, official_files: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores.json"
    with serving() as served:
        served.script = [reply] * 20
        done = ask_judge(tmp_path, official_files, served, "--json", out)
    assert_refused(done, "no answer has a grade", repr(reply or ""), advice)
    assert not out.exists() and served.script == []


@pytest.mark.parametrize("reply", ["Score: 1.0", "1.0\n\nBecause", "**1.0**", " 1.0"])
def test_grades_in_other_words_are_read_and_noted(
    reply: str, official_files: Path, tmp_path: Path
) -> None:
    """Without `--json` the score is printed and the replies stand beside the predictions."""
    with serving() as served:
        served.script = [reply] * 20
        done = ask_judge(tmp_path, official_files, served)
    assert done.exit_code == 0, done.stderr
    assert re.search(r"total +100.0 %", done.stdout)
    assert "20 of 20 grades do not begin the judge's reply" in done.stdout
    assert len((tmp_path / "judge-replies.jsonl").read_text().splitlines()) == 20
    assert {path.name for path in tmp_path.iterdir()} == {"p.jsonl", "judge-replies.jsonl"}


def test_an_answer_without_a_grade_makes_the_score_incomplete(
    official_files: Path, tmp_path: Path
) -> None:
    """The second of four answers; the others are graded in five runs."""
    out = tmp_path / "scores.json"
    with serving() as served:
        served.script = ["1.0", *["hm"] * 5, "0.5", "0.0", *["1.0", "0.5", "0.0"] * 4]
        done = ask_judge(tmp_path, official_files, served, "--json", out)
    assert done.exit_code == 1 and done.stderr == "", done.stderr
    content = json.loads(out.read_text())
    assert content["headline"] == pytest.approx(50) and content["n"] == 3
    assert list(content["failed"]) == ["v1_1"] and "v1_1" not in content["per_question"]
    assert "1 of 4 answers were not judged" in done.stdout and "'hm'" in done.stdout
    assert done.stdout.splitlines()[-1] == "not complete: 1 answers were not judged"


def test_a_judges_request_is_set_and_adapted(official_files: Path, tmp_path: Path) -> None:
    said = json.dumps({"error": {"message": "'temperature' does not support 0.0"}})
    with serving() as served:
        served.script = [(400, said), *["1.0"] * 20]
        request = ("--judge-request", "max_completion_tokens=2048")
        nested = ("--judge-request", "chat_template_kwargs={enable_thinking: false}")
        done = ask_judge(tmp_path, official_files, served, *request, *nested)
    assert done.exit_code == 0, done.stderr
    body = served.requests[-1][2]
    assert body.keys() == {"model", "messages", "max_completion_tokens", "chat_template_kwargs"}
    assert body["max_completion_tokens"] == 2048
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "--judge-request set max_completion_tokens to 2048" in done.stdout
    assert "the judge's server refused temperature: it was left out" in done.stdout

    with serving() as served:
        done = ask_judge(tmp_path, official_files, served, "--judge-request", "max_tokens")
        assert_refused(done, "--judge-request max_tokens has no `=`: write KEY=VALUE, such as max_")
    done = mipha(
        *("score", "mmvet", "--annotations", official_files / "mmvet"),
        *("--predictions", tmp_path / "p.jsonl", "--judge-request", "max_tokens=4"),
    )
    assert_refused(done, "--judge-request is for a judge that is asked")


@pytest.mark.parametrize("form", ["list", "lines"])
@pytest.mark.parametrize(
    ("benchmark", "id_key", "text_key"),
    [
        ("gqa", "questionId", "prediction"),
        ("vqav2", "question_id", "answer"),
        ("vizwiz", "image", "answer"),
        ("textvqa", "question_id", "answer"),
        ("seedbench", "question_id", "prediction"),
        ("mmbench", "index", "prediction"),
    ],
)
def test_a_benchmarks_own_results_file_is_read(
    benchmark: str, id_key: str, text_key: str, form: str, official_files: Path, tmp_path: Path
) -> None:
    official = OFFICIAL[benchmark]
    rows = [{id_key: name, text_key: text} for name, text in official.gold.items()]
    if form == "list":
        path = tmp_path / "p.json"
        path.write_text(json.dumps(rows))
    else:
        path = write_lines(tmp_path / "p.jsonl", rows)
    done = score(benchmark, official_files / benchmark, path, tmp_path / "o.json")
    assert done.exit_code == 0, done.stderr
    headline = json.loads((tmp_path / "o.json").read_text())["headline"]
    assert headline == pytest.approx(official.best)


@pytest.mark.parametrize(
    "benchmark", [name for name in OFFICIAL if (OFFICIAL[name].upload or "").endswith("son")]
)
def test_our_own_upload_is_read_back(benchmark: str, official_files: Path, tmp_path: Path) -> None:
    """Its answers are those that are compared, so they have the same score."""
    official, module = OFFICIAL[benchmark], load_benchmark(benchmark)
    questions = module.questions(official_files / benchmark)
    for name, content in module.submission(questions, official.gold).items():
        (tmp_path / name).write_bytes(content)
        judge = judged(benchmark, tmp_path)
        done = score(
            benchmark, official_files / benchmark, tmp_path / name, tmp_path / "o.json", *judge
        )
        assert done.exit_code == 0, done.stderr
        headline = json.loads((tmp_path / "o.json").read_text())["headline"]
        assert headline == pytest.approx(official.best)


def test_popes_own_ids_are_read_from_a_folder_with_a_file_for_each_subset(
    official_files: Path, tmp_path: Path
) -> None:
    answers = tmp_path / "answers"
    answers.mkdir()
    offsets = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
    own = {
        subset: {int(name) - offset: POPE[name] for name in POPE if 0 < int(name) - offset < 10**7}
        for subset, offset in offsets.items()
    }
    for subset, texts in own.items():
        write_predictions(answers / f"mine_{subset}.jsonl", texts)  # type: ignore[arg-type]
    out = tmp_path / "o.json"
    done = score("pope", official_files / "pope", answers, out)
    assert done.exit_code == 0, done.stderr
    content = json.loads(out.read_text())
    assert content["headline"] == 100 and content["per_question"].keys() == POPE.keys()

    # In one file nobody knows which subset an id belongs to.
    rows = [
        {"question_id": name, "text": text}
        for texts in own.values()
        for name, text in texts.items()
    ]
    done = score("pope", official_files / "pope", write_lines(tmp_path / "p.jsonl", rows), out)
    assert_refused(done, "keep one of the two", "add 10,000,000", "for each subset, named after it")
    write_predictions(answers / "random-2.json", {})
    done = score("pope", official_files / "pope", answers, out)
    assert_refused(done, "has 2 files with random in their names, not one")


def test_mmes_own_results_folder_is_read(official_files: Path, tmp_path: Path) -> None:
    """Image, question, label and answer; the lines stand in another order than the questions."""
    gold, data = OFFICIAL["mme"].gold, official_files / "mme"
    answers = tmp_path / "answers"
    answers.mkdir()
    for path in data.glob("*.txt"):
        lines = path.read_text().rstrip().split("\n")
        named = [f"{line}\t{gold[f'{path.stem}/{place}']}" for place, line in enumerate(lines)]
        (answers / path.name).write_text("\n".join(reversed(named)) + "\n")
    done = score("mme", data, answers, tmp_path / "o.json")
    assert done.exit_code == 0, done.stderr
    content = json.loads((tmp_path / "o.json").read_text())
    assert content["headline"] == OFFICIAL["mme"].best
    assert content["per_question"].keys() == gold.keys()

    # An answer that is empty, a line without one, a line about nothing, a file that is missing.
    path = next(answers.glob("*.txt"))
    whole = path.read_text()
    for text, words in (
        (whole.rstrip("\n").rpartition("\t")[0] + "\t", None),
        (whole.rstrip("\n").rpartition("\t")[0], "has 3 fields, not image, question, label"),
        (whole + whole, "is about no question, or a second time"),
        (None, f"has no answers in {path.name}"),
    ):
        path.unlink() if text is None else path.write_text(text)
        done = score("mme", data, answers, tmp_path / "o.json")
        if words is None:
            assert done.exit_code == 0 and "1 of " in done.stdout, done.stderr
        else:
            assert_refused(done, words)


def test_a_score_of_empty_answers_says_so_on_its_first_line(
    official_files: Path, tmp_path: Path
) -> None:
    """As of a model whose weights are not finite: POPE reads every one of them as a yes."""
    predictions = write_predictions(tmp_path / "p.jsonl", dict.fromkeys(POPE, ""))
    done = score("pope", official_files / "pope", predictions, tmp_path / "o.json")
    first = f"all {len(POPE)} answers are empty, so these numbers say nothing about the model"
    assert done.exit_code == 0 and done.stdout.splitlines()[0].startswith(first)
    content = json.loads((tmp_path / "o.json").read_text())
    assert (
        content["n_empty"] == len(POPE)
        and content["all_empty"]
        and content["notes"][0].startswith(first)
    )
    some = {**POPE, next(iter(POPE)): " \n"}
    done = score(
        "pope", official_files / "pope", write_predictions(predictions, some), tmp_path / "o.json"
    )
    assert f"1 of {len(POPE)} answers are empty and scored as such" in done.stdout
    assert not done.stdout.startswith("1 of")


def test_empty_rotations_do_not_make_all_answers_of_mmbench_empty(
    official_files: Path, tmp_path: Path
) -> None:
    """There are more rows than questions, so as many empty ones as questions are not all."""
    gold = OFFICIAL["mmbench"].gold
    texts = {name: "" if int(name) >= 1_000_000 else text for name, text in gold.items()}
    num = sum(text == "" for text in texts.values())
    assert len(OFFICIAL["mmbench"].scored_ids) <= num < len(texts)
    predictions = write_predictions(tmp_path / "p.jsonl", texts)
    done = score("mmbench", official_files / "mmbench", predictions, tmp_path / "o.json")
    assert done.exit_code == 0 and done.stdout.splitlines()[0].strip().startswith("metric")
    assert json.loads((tmp_path / "o.json").read_text())["all_empty"] is False


def test_a_benchmark_that_is_named_twice_counts_once(
    official_files: Path, model: Path, tmp_path: Path
) -> None:
    """Its own folder will do, as for one; so the next thing that is wrong is the split."""
    done = mipha(
        "evaluate",
        model,
        "-b",
        "pope,gqa",
        "-b",
        "pope",
        "--data-root",
        official_files,
        "--split",
        "x",
    )
    assert_refused(done, "benchmark pope has no split 'x'")
    (tmp_path / "pope").mkdir()
    write_pope(tmp_path / "pope")
    (tmp_path / "pope" / "coco_pope_popular.json").unlink()
    done = mipha(
        "evaluate",
        model,
        "-b",
        "pope,pope",
        "--data-root",
        tmp_path / "pope",
        "-o",
        tmp_path / "out",
    )
    assert_refused(done, f"{tmp_path / 'pope'} has no coco_pope_popular.json")


def test_an_undefined_headline_has_no_p_value_and_no_other_metric_takes_its_place(
    official_files: Path, tmp_path: Path
) -> None:
    """Without a right yes there is no F1; of the adversarial questions two are yes."""
    for name, texts in (("gold", POPE), ("no", dict.fromkeys(POPE, "No"))):
        predictions = write_predictions(tmp_path / "p.jsonl", texts)
        assert (
            score("pope", official_files / "pope", predictions, tmp_path / f"{name}.json").exit_code
            == 0
        )
    assert json.loads((tmp_path / "no.json").read_text())["headline"] is None
    done = mipha(
        "compare",
        tmp_path / "gold.json",
        tmp_path / "no.json",
        "--paired",
        "--json",
        tmp_path / "out.json",
    )
    assert done.exit_code == 0, done.stderr
    rows = {row["metric"]: row for row in json.loads((tmp_path / "out.json").read_text())}
    assert "f1" not in rows and {row["p_holm"] for row in rows.values()} == {None}
    assert rows["adversarial.accuracy"]["paired"]["difference"] == 50


def test_what_cannot_be_compared(official_files: Path, tmp_path: Path) -> None:
    for benchmark in ("pope", "gqa"):
        predictions = write_predictions(tmp_path / "p.jsonl", OFFICIAL[benchmark].gold)
        assert (
            score(
                benchmark, official_files / benchmark, predictions, tmp_path / f"{benchmark}.json"
            ).exit_code
            == 0
        )
    (tmp_path / "other.json").write_text('{"headline": 3}')
    (tmp_path / "cut.json").write_bytes((tmp_path / "pope.json").read_bytes()[:100])
    for other, words in (
        ("gqa.json", "nothing to pair"),
        ("other.json", "other.json is not a file that `mipha score --json` wrote"),
        ("cut.json", "cut.json"),
        ("none.json", "no file or folder"),
    ):
        done = mipha(
            "compare",
            tmp_path / "pope.json",
            tmp_path / other,
            "--paired",
            "--json",
            tmp_path / "out.json",
        )
        assert_refused(done, words)
    assert not (tmp_path / "out.json").exists()
