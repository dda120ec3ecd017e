"""A model and names of benchmarks -> results: plan, predict, score.

plan      the questions of every benchmark, before a model is loaded
predict   predictions.jsonl, by the model (`evaluation/predict.py`)
score     scores.json, by pure functions (`evaluation/score.py`)
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from mipha.data.images import grey_image
from mipha.data.region_text import DEFAULT, FORMS
from mipha.evaluation.benchmark import Judge, Plan, Question, load_benchmark
from mipha.evaluation.engine_check import check_engine
from mipha.evaluation.predict import Asker, fingerprint, merge, predict
from mipha.evaluation.score import Result, score_predictions
from mipha.files import partial_name, read_json_object, read_lines, write_whole
from mipha.lookup import did_you_mean
from mipha.run import Run, adapter_folder, is_first_process, model_folder


def plan_benchmarks(
    benchmarks: Sequence[str],
    data_root: str | Path | None = None,
    split: str | None = None,
    form: str | None = None,
) -> list[Plan]:
    """Read the questions of all benchmarks, and check that their files and images are there.

    Args:
        benchmarks: Names, see `list_benchmarks`; one that is named twice counts once.
        data_root: With one benchmark its folder; with several a folder that holds one folder for
            each, by name. None: the packaged copies, where there are some.
        split: Name of a split; None: each benchmark's own.
        form: Form in which the model writes boxes, see `box_form`.

    Raises:
        FileNotFoundError: A file or an image is missing.
        ValueError: No such benchmark or split, a malformed file, or no benchmark at all.
    """
    if not benchmarks:
        raise ValueError("no benchmark was named: give at least one with -b")

    plans = []
    names = dict.fromkeys(benchmarks)
    for name in names:
        benchmark = load_benchmark(name)
        if form is not None and benchmark.in_form is not None:
            benchmark = benchmark.in_form(form)
        chosen = split or benchmark.main_split

        # The folder of one benchmark, or the one above it, as for several.
        root = None if data_root is None else Path(data_root)
        if root is not None and (len(names) > 1 or (root / name).is_dir()):
            root /= name
        questions = benchmark.questions(root, chosen)
        if not questions:
            raise ValueError(f"{root} has no question of {name} {chosen}: {benchmark.source}")

        # Signs that these are not the files of the protocol.
        doubts = []
        if len(questions) != (size := benchmark.splits[chosen].size):
            doubts.append(
                f"{len(questions):,} questions, not the {size:,} of the official {chosen} split"
            )
        if benchmark.doubts is not None:
            doubts += benchmark.doubts(questions, chosen)
        plans.append(Plan(benchmark, chosen, questions, tuple(doubts)))
    return plans


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to answer.

    Args:
        asker: The model.
        sha256: Hash of what decides its answers; predictions of another one are never mixed in.
        about: What scores.json says about it: its engine or its endpoint.
    """

    asker: Asker
    sha256: str
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model that is measured, found and not opened yet.

    Args:
        name: Name for messages.
        results: Folder of results by default; None: one must be given.
        open: `open(device, folder)` makes the model ready for as long as the context lasts; the
            folder is that of the results.
        checkpoint: Folder of its checkpoint, where it has one.
        engine: Engine that it runs on, where its answers are to be compared with the checkpoint's
            own in transformers; None: there is nothing to compare.
        is_parallel: Whether several processes of `torchrun` may each open it.
        has_likelihoods: Whether it gives likelihoods of texts.
    """

    name: str
    results: Path | None
    open: Callable[[str | None, Path], AbstractContextManager[OpenModel]]
    checkpoint: Path | None = None
    engine: str | None = None
    is_parallel: bool = False
    has_likelihoods: bool = False


def box_form(checkpoint: Path | None, given: str | None = None) -> str:
    """Return the form in which a model writes boxes and points: its checkpoint's, or a given one.

    Args:
        checkpoint: Folder of the model, where it has one.
        given: One of `region_text.FORMS`; None where the checkpoint decides.

    Raises:
        ValueError: No such form, or not the one that the checkpoint was trained in.
    """
    own = None
    if checkpoint is not None and (file := checkpoint / "processor_config.json").is_file():
        own = read_json_object(file).get("boxes")
    for form in (given, own):
        if form is not None and form not in FORMS:
            raise ValueError(f"no form of boxes {form!r}: {did_you_mean(str(form), FORMS)}")
    if own is not None and given not in (None, own):
        raise ValueError(
            f"{checkpoint} was trained to write boxes as {own}, and not as {given}: leave --boxes "
            "out"
        )
    return given or own or DEFAULT


def checkpoint_subject(
    model: Run | str | Path, adapter: str | Path | None = None, dtype: str = "auto"
) -> Subject:
    """Return the model of a run, or of a folder with an exported model.

    Args:
        model: The run or the folder.
        adapter: Adapter of the model, which is used unmerged. Its results are not those of the run
            below it, so they have no place of their own.
        dtype: Type that it answers in, see `mipha.load`.

    Raises:
        FileNotFoundError: No such model, an unfinished run, or no adapter.
        ValueError: The folder holds something else.
    """
    path = model.folder if isinstance(model, Run) else Path(model)
    checkpoint = model_folder(path)
    own = None if adapter is None else adapter_folder(adapter)

    @contextmanager
    def opened(device: str | None, folder: Path) -> Iterator[OpenModel]:
        from mipha.assistant import load

        sha256, about = fingerprint(checkpoint), {"engine": "transformers"}
        if own is not None:
            both = f"{sha256} {fingerprint(own)}"
            sha256 = hashlib.sha256(both.encode()).hexdigest()
        if dtype != "auto":
            about["dtype"] = dtype
            sha256 = hashlib.sha256(f"{sha256} {dtype}".encode()).hexdigest()
        assistant = load(checkpoint, device=device, dtype=dtype, adapter=own)
        yield OpenModel(assistant, sha256, about)

    name = str(path) if own is None else f"{path} with the adapter {own}"
    results = None if checkpoint == path or own is not None else Run(path).folder / "evaluation"
    return Subject(name, results, opened, checkpoint, is_parallel=True, has_likelihoods=True)


def evaluate(
    model: Subject | Run | str | Path,
    benchmarks: Sequence[str],
    data_root: str | Path | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    split: str | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
    blind: bool = False,
    judge: Judge | None = None,
    plans: Sequence[Plan] = (),
    boxes: str | None = None,
) -> list[Result]:
    """Measure a model on benchmarks; questions that were answered before are not asked again.

    Under `torchrun` every process asks about its share of the images, and the first one scores.

    Args:
        model: A run, a run folder, the folder of an exported model, or another subject.
        benchmarks: Names, see `list_benchmarks`.
        data_root: See `plan_benchmarks`.
        batch_size: Questions per forward pass.
        limit: First N questions only, for a quick look; the result says that it is not complete.
        split: Name of a split; None: each benchmark's own.
        out: Folder for predictions and scores; None: the run's own `evaluation` folder.
        device: Name of a torch device; None: the accelerator if there is one.
        progress: Show a progress bar.
        blind: Show grey instead of every image, to measure what the questions alone give away.
            Results go into `<benchmark>-blind`.
        judge: Grader of the benchmarks that want one.
        plans: Further questions, after the benchmarks'.
        boxes: Form in which the model writes boxes, where its checkpoint does not say; None:
            `thousand`.

    Returns:
        One result per benchmark; nothing in processes other than the first.

    Raises:
        FileNotFoundError: No such model, an unfinished run, or no data.
        ValueError: No such benchmark or split, a number below 1, a judge that is missing, or
            predictions of another model in the way.
    """
    # Check numbers, model, names and data for all benchmarks before a minute is spent on any.
    for name, number in (("batch_size", batch_size), ("limit", limit)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}: give 1 or more")
    subject = model if isinstance(model, Subject) else checkpoint_subject(model)
    form = box_form(subject.checkpoint, boxes)
    official = (
        plan_benchmarks(benchmarks, data_root, split, form) if benchmarks or not plans else []
    )
    plans = [replace(part, limit=limit) for part in (*official, *plans)]
    for part in plans:
        if part.benchmark.judge == "required" and judge is None:
            raise ValueError(
                f"{part.name} is graded by a judge: give one with --judge URL --judge-model NAME, "
                "or --judge-replies FILE"
            )
        if part.benchmark.by_likelihood and not subject.has_likelihoods:
            raise ValueError(
                f"{part.name} is measured by the likelihood of texts, which {subject.name} does "
                "not give: measure a run or a checkpoint, without --engine"
            )
    folder = subject.results if out is None else Path(out)
    if folder is None:
        raise ValueError(f"{subject.name} is no run, so it has no place for results: give -o")
    if blind:
        plans = [replace(part, questions=_show_grey(part.questions), blind=True) for part in plans]

    # Ask, then score, one benchmark after the other.
    results = []
    answered = []
    for part, predictions, about in ask_in_turn(
        subject, plans, folder, batch_size, device, progress
    ):
        own_judge = judge if part.benchmark.judge else None
        results.append(score_predictions(part, predictions, folder / part.key, own_judge, about))
        answered.append((part, predictions))

    # Compare the engine with what it stands in for; the engine's memory is free by now.
    if subject.engine is not None and subject.checkpoint is not None:
        checks = check_engine(
            subject.engine,
            subject.checkpoint,
            answered,
            folder,
            batch_size=batch_size,
            progress=progress,
        )
        results = [
            replace(result, engine_check=check)
            for result, check in zip(results, checks, strict=True)
        ]
        for (part, _), check in zip(answered, checks, strict=True):
            file = folder / part.key / "scores.json"
            content = read_json_object(file) | {"engine_check": asdict(check)}
            write_whole(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return results


def write_predictions(
    model: Subject | Run | str | Path,
    plan: Plan,
    out: Path,
    *,
    batch_size: int = 16,
    limit: int | None = None,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """Answer questions, and write a line for each; run again, it asks only what has no answer.

    A line has the question's id, text and images, and the answer. Until all are answered, the
    answers so far are kept in a hidden folder beside the file.

    Args:
        model: See `evaluate`.
        plan: The questions.
        out: New file of JSON lines.
        batch_size: Questions per forward pass.
        limit: First N questions only.
        device: Name of a torch device; None: the accelerator if there is one.
        progress: Show a progress bar.

    Returns:
        Question id to error, of the questions that failed and are not in the file.

    Raises:
        FileNotFoundError: No such model, or an unfinished run.
        ValueError: The file is there already, a number below 1, or answers of another model are.
    """
    for name, number in (("batch_size", batch_size), ("limit", limit)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}: give 1 or more")
    subject = model if isinstance(model, Subject) else checkpoint_subject(model)
    kept = partial_name(out)
    if out.exists() and not kept.is_dir():
        raise ValueError(f"{out} exists: choose another -o, or remove it")
    plan = replace(plan, limit=limit)

    failures: dict[str, str] = {}
    for part, predictions, _ in ask_in_turn(subject, [plan], kept, batch_size, device, progress):
        folder = kept / part.key
        rows = {row["question_id"]: row for row in read_lines(folder / "predictions.jsonl")}
        answered = [one for one in part.asked if one.id in predictions]
        told = ({**_describe(one), **rows[one.id]} for one in answered)
        write_whole(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in told))

        failures = {row["question_id"]: row["error"] for row in read_lines(folder / "errors.jsonl")}
        if not failures:
            shutil.rmtree(kept)
    return failures


def _describe(question: Question) -> dict[str, Any]:
    """Return what a line of predictions says about its question."""
    images = [
        f"{len(image):,} bytes" if isinstance(image, bytes) else str(image)
        for image in question.images
    ]
    return {"question_id": question.id, "question": question.text, "images": images}


def ask_in_turn(
    subject: Subject,
    plans: Sequence[Plan],
    folder: Path,
    batch_size: int,
    device: str | None,
    progress: bool,
) -> Iterator[tuple[Plan, dict[str, str], Mapping[str, Any]]]:
    """Open a model and ask it one plan after the other, in as many processes as there are.

    Yields:
        Plan, question id to text, and what is to be said about the model; nothing in processes
        other than the first.
    """
    # The processes wait for the slowest, however long its share takes.
    world = None
    if subject.is_parallel:
        from mipha.world import join_world

        world = join_world(patience=timedelta(days=7))
        device = device or (str(world.device) if world.size > 1 else None)
    elif not is_first_process():
        raise ValueError(f"{subject.name} is asked by one process: start it without torchrun")

    with subject.open(device, folder) as model:
        for part in plans:
            predict(
                model.asker,
                part,
                folder / part.key,
                checkpoint_sha256=model.sha256,
                batch_size=batch_size,
                progress=progress,
                rank=world.rank if world else 0,
                num_ranks=world.size if world else 1,
            )
            if world:
                world.barrier()
            if world is None or world.is_first:
                yield part, merge(folder / part.key, part.questions), model.about
        if world:
            world.barrier()


def _show_grey(questions: Sequence[Question]) -> list[Question]:
    grey = grey_image()
    shown = [
        (grey,) * len(question.images) if isinstance(question.image, tuple) else grey
        for question in questions
    ]
    return [
        question if question.image is None else replace(question, image=image)
        for question, image in zip(questions, shown, strict=True)
    ]
