"""The verbs that measure and compare."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mipha.cli.arguments import Adapter, Dtype, parse_pairs, split_names
from mipha.terminal import echo

if TYPE_CHECKING:
    from mipha.evaluation.benchmark import Judge, Plan
    from mipha.evaluation.evaluate import Subject

JudgeUrl = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help="Base URL of an OpenAI-compatible server that grades; key in $MIPHA_JUDGE_KEY.",
    ),
]
JudgeModel = Annotated[str | None, typer.Option(help="Name of the judge's model.")]
JudgeReplies = Annotated[
    Path | None, typer.Option(help="Recorded replies, used instead of a judge.")
]
JudgeRequest = Annotated[
    list[str] | None,
    typer.Option(
        "--judge-request",
        metavar="KEY=VALUE",
        help="A field of the judge's requests, such as max_tokens=4096; null leaves one out.",
    ),
]


ModelOrUrl = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run, a model folder, a GGUF file or export, or the URL of a server: http://.../v1.",
    ),
]
Engine = Annotated[
    str, typer.Option(help="transformers, llama.cpp or vllm; auto: by the kind of model.")
]
ServedModel = Annotated[
    str | None, typer.Option("--model", help="With a URL: name of the model on the server.")
]
KeyEnv = Annotated[
    str | None,
    typer.Option(
        help="With a URL: variable that holds the key; $MIPHA_API_KEY if left out.", metavar="NAME"
    ),
]
Parallel = Annotated[int | None, typer.Option(help="With a URL: requests at a time; default 8.")]
ServerRequest = Annotated[
    list[str] | None,
    typer.Option(
        "--request",
        metavar="KEY=VALUE",
        help="With a URL: a field of the requests, such as seed=7; null leaves one out.",
    ),
]


DataMetric = Annotated[
    str | None,
    typer.Option(
        help="For own data: exact, choice, number, vqa, anls, f1, box, boxes or judge; if left "
        "out, by the right answers."
    ),
]
DataSettings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="For own data: how they are read, such as bbox_format=xywh.",
    ),
]
DataRubric = Annotated[
    Path | None,
    typer.Option(help="For the metric judge: a text with {question}, {gold} and {answer}."),
]
Boxes = Annotated[
    str | None,
    typer.Option(
        metavar="FORM",
        help="How the model writes boxes, where its checkpoint does not say: thousand (default), "
        "unit3, square2, bbox_2d, loc.",
    ),
]
ImageRoot = Annotated[
    list[Path] | None,
    typer.Option(help="For own data: folder that images may lie in, besides the data's own."),
]
Tokens = Annotated[
    int | None, typer.Option(help="For own data: longest answer, in tokens; default 128.")
]


def evaluate(
    model: ModelOrUrl,
    settings: DataSettings = None,
    benchmarks: Annotated[
        list[str] | None,
        typer.Option("-b", "--benchmarks", help="Names, with commas or several -b."),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(help="The benchmark's folder; with several, the folder above them."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions a forward pass.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Ask the first N questions only.")] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Another split than the benchmark's own; of a folder of --data, test."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Where results go, if not into the run.")
    ] = None,
    blind: Annotated[
        bool, typer.Option("--blind", help="Show grey instead of every image.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only check the files, and show three prompts a benchmark."),
    ] = False,
    adapter: Adapter = None,
    judge: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_replies: JudgeReplies = None,
    judge_request: JudgeRequest = None,
    engine: Engine = "auto",
    dtype: Dtype = "auto",
    served_model: ServedModel = None,
    key_env: KeyEnv = None,
    parallel: Parallel = None,
    request: ServerRequest = None,
    data: Annotated[
        str | None,
        typer.Option(help="An own test set, in any format that training reads: ./test.jsonl."),
    ] = None,
    metric: DataMetric = None,
    rubric: DataRubric = None,
    image_root: ImageRoot = None,
    max_new_tokens: Tokens = None,
    boxes: Boxes = None,
) -> None:
    """Measure a model; exit code 1 if a question failed or could not be judged."""
    from mipha.api import evaluate as measure
    from mipha.evaluation.evaluate import box_form, plan_benchmarks
    from mipha.evaluation.tables import print_plan, print_results

    # A model that is missing is named before data that are.
    subject = _subject(model, engine, served_model, key_env, parallel, request, adapter, dtype)
    names = split_names(benchmarks)
    for option, value in (
        ("--metric", metric),
        ("--rubric", rubric),
        ("--image-root", image_root),
        ("--max-new-tokens", max_new_tokens),
    ):
        if value and data is None:
            raise ValueError(f"{option} is for the questions of --data: leave it out")
    if settings and data is None:
        raise ValueError(
            f"{settings[0]} is for the questions of --data: leave it out, and name benchmarks "
            "with -b"
        )
    form = box_form(subject.checkpoint, boxes)
    own = []
    if data is not None:
        own = [_own_plan(data, split, image_root, metric, rubric, max_new_tokens, settings, form)]
    if dry_run:
        official = plan_benchmarks(names, data_root, split, form) if names or not own else []
        print_plan([*official, *own], subject.checkpoint)
        return

    grader = _judge(judge, judge_model, judge_replies, judge_request, out or Path(model))
    results = measure(
        subject,
        names,
        data_root,
        batch_size,
        limit,
        split,
        out,
        blind=blind,
        judge=grader,
        plans=own,
        boxes=boxes,
    )
    print_results(results)
    if any(result.n_failed for result in results):
        raise typer.Exit(1)


def predict(
    model: ModelOrUrl,
    data: Annotated[
        str,
        typer.Argument(
            help="Questions, with or without answers, in any format that training reads: "
            "./questions.jsonl; or with --question a folder of images."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="New file of JSON lines.")],
    settings: DataSettings = None,
    question: Annotated[
        str | None, typer.Option(help="Ask this about every image in the folder DATA.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the data; of a folder, test if left out.")
    ] = None,
    image_root: ImageRoot = None,
    max_new_tokens: Tokens = None,
    batch_size: Annotated[int, typer.Option(help="Questions a forward pass.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Ask the first N questions only.")] = None,
    engine: Engine = "auto",
    served_model: ServedModel = None,
    key_env: KeyEnv = None,
    parallel: Parallel = None,
    request: ServerRequest = None,
    boxes: Boxes = None,
) -> None:
    """Answer questions that need no right answers; exit code 1 if one failed."""
    from mipha.api import predict as answer
    from mipha.evaluation.evaluate import box_form
    from mipha.evaluation.own_data import plan_images

    subject = _subject(model, engine, served_model, key_env, parallel, request)
    if question is not None:
        if split or image_root or settings:
            raise ValueError(
                "--split, --image-root and settings of data have no effect beside --question"
            )
        plan = plan_images(Path(data), question, max_new_tokens or 128)
    else:
        form = box_form(subject.checkpoint, boxes)
        plan = _own_plan(data, split, image_root, None, None, max_new_tokens, settings, form, False)
    for note in plan.doubts:
        echo(note)
    failures = answer(subject, plan, out, batch_size=batch_size, limit=limit)
    echo(f"written: {out}, {len(plan.questions[:limit]) - len(failures):,} answers")
    if failures:
        name, error = next(iter(failures.items()))
        echo(
            f"{len(failures):,} questions failed, such as {name} ({error}): run the same command "
            "again to ask these again",
            err=True,
        )
        raise typer.Exit(1)


def score(
    benchmark: Annotated[
        str,
        typer.Argument(help="A benchmark's name, or an own test set with answers: ./test.jsonl."),
    ],
    predictions: Annotated[
        Path,
        typer.Option(
            help='A line {"question_id": ..., "text": ...} a question, in any order; or the '
            "benchmark's own results file (for POPE and MME, the folder of them)."
        ),
    ],
    settings: DataSettings = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            help="Official annotation file, or the folder with the official files; not needed "
            "where a package has them, as for easy_vqa."
        ),
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the scores to a file too.")
    ] = None,
    judge: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_replies: JudgeReplies = None,
    judge_request: JudgeRequest = None,
    metric: DataMetric = None,
    rubric: DataRubric = None,
    image_root: ImageRoot = None,
    split: Annotated[
        str | None, typer.Option(help="Split of an own test set; of a folder, test.")
    ] = None,
    boxes: Boxes = None,
) -> None:
    """Score any model's predictions, without model or images; exit code 1 if one was not judged."""
    import json

    from mipha.evaluation.benchmark import load_benchmark
    from mipha.evaluation.evaluate import box_form
    from mipha.evaluation.score import score_file
    from mipha.evaluation.tables import print_scored
    from mipha.files import write_whole

    folder = (json_out or predictions).parent
    grader = _judge(judge, judge_model, judge_replies, judge_request, folder)
    form = box_form(None, boxes)
    if "/" in benchmark or "." in benchmark:
        if annotations is not None:
            raise ValueError(f"{benchmark} has its answers in it: leave --annotations out")
        asked = _own_plan(
            benchmark, split, image_root, metric, rubric, None, settings, form
        ).benchmark
        annotations = Path(benchmark)
    else:
        asked = load_benchmark(benchmark)
        if asked.in_form is not None:
            asked = asked.in_form(form)
        if metric or rubric or image_root or split or settings:
            raise ValueError(
                f"--metric, --rubric, --image-root, --split and settings of data are for own "
                f"data, not for {benchmark}: leave them out"
            )
    content = score_file(asked, annotations, predictions, grader)
    if json_out is not None:
        write_whole(json_out, json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
    print_scored(asked, content)
    if content.get("failed"):
        raise typer.Exit(1)


def compare(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN...",
            help="Runs, folders of results, or (paired) files of `mipha score --json`.",
        ),
    ] = None,
    published: Annotated[
        list[str] | None,
        typer.Option(
            help="Published models beside them, with commas: Mipha-3B,SmolVLM-500M; or whole "
            "tables: table-2, small-models."
        ),
    ] = None,
    paired: Annotated[
        bool,
        typer.Option("--paired", help="Two runs, question by question: differences, A minus B."),
    ] = False,
    out: Annotated[
        list[Path] | None,
        typer.Option("-o", "--out", help="Also write .md, .csv, .tex, or a radar as .png or .svg."),
    ] = None,
    json_out: Annotated[
        Path | None,
        typer.Option("--json", help="With --paired: write the comparison to a file too."),
    ] = None,
) -> None:
    """Put runs and published models side by side, or compare two runs question by question."""
    if paired:
        if len(runs or ()) != 2 or published or out:
            raise ValueError(
                "--paired compares two runs and nothing else: give A and B, and --json for a file"
            )
        _compare_paired(runs[0], runs[1], json_out)
        return
    if json_out:
        raise ValueError("--json is for --paired: write a table with -o table.csv")
    from mipha.comparison.tables import compare as side_by_side
    from mipha.comparison.tables import print_comparison

    found = side_by_side(runs or (), split_names(published))
    for path in out or ():
        found.write(path)
    print_comparison(found)


def _compare_paired(first: Path, second: Path, json_out: Path | None) -> None:
    import json
    from dataclasses import asdict

    from mipha.evaluation.paired import compare_paired
    from mipha.evaluation.tables import print_paired
    from mipha.files import write_whole

    rows = compare_paired(first, second)
    if json_out:
        write_whole(json_out, json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    print_paired(rows)


def _own_plan(
    data: str,
    split: str | None,
    image_root: list[Path] | None,
    metric: str | None,
    rubric: Path | None,
    max_new_tokens: int | None,
    settings: list[str] | None,
    form: str,
    with_answers: bool = True,
) -> Plan:
    """Return the questions of an own test set."""
    from mipha.data.dataset import data_recipe
    from mipha.evaluation.own_data import plan_own_data

    # The one split of a file is called train; of a folder nobody means to ask the training data.
    own = data_recipe(data, None, image_root or (), settings=settings or ())
    is_file = own.root.is_file() if isinstance(own.root, Path) else "." in own.root_name
    recipe = own.model_copy(update={"split": split or ("train" if is_file else "test")})
    tokens = 128 if max_new_tokens is None else max_new_tokens
    return plan_own_data(recipe, metric, rubric, tokens, with_answers, form)


def _subject(
    model: str,
    engine: str,
    served_model: str | None,
    key_env: str | None,
    parallel: int | None,
    request: list[str] | None,
    adapter: Path | None = None,
    dtype: str = "auto",
) -> Subject:
    """Return the model that the options name; nothing is loaded."""
    from mipha.api import find_model

    if key_env is not None and not os.environ.get(key_env):
        raise ValueError(f"--key-env names ${key_env}, which is not set: export it with the key")
    return find_model(
        model,
        engine,
        dtype=dtype,
        name=served_model,
        api_key=os.environ.get(key_env or "MIPHA_API_KEY"),
        parallel=parallel,
        request=parse_pairs(request or (), "--request", "seed=7"),
        adapter=adapter,
    )


def _judge(
    url: str | None,
    model: str | None,
    replies: Path | None,
    request: list[str] | None,
    folder: Path,
) -> Judge | None:
    """Return the judge that the options ask for; its replies are recorded in the folder."""
    from mipha.evaluation.judge import Endpoint, Replay

    if replies is not None and url is not None:
        raise ValueError("--judge-replies and --judge are two judges: give one")
    if request and url is None:
        raise ValueError("--judge-request is for a judge that is asked: give one with --judge")
    if replies is not None:
        return Replay(replies)
    if url is None:
        return None
    if model is None:
        raise ValueError("--judge needs --judge-model, the name of a model that the server has")

    return Endpoint(
        url,
        model,
        os.environ.get("MIPHA_JUDGE_KEY"),
        record=folder / "judge-replies.jsonl",
        request=parse_pairs(request or (), "--judge-request", "max_tokens=4096"),
    )
