"""A model and names of benchmarks -> results: plan, predict, score.

plan      the questions of every benchmark, before a model is loaded
predict   predictions.jsonl, by the model (`evaluation/predict.py`)
score     scores.json, by pure functions (`evaluation/score.py`)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from mipha.data.images import grey_image
from mipha.evaluation.benchmark import Judge, Plan, Question, load_benchmark
from mipha.evaluation.predict import fingerprint, merge, predict
from mipha.evaluation.score import Result, score_predictions
from mipha.run import Run, adapter_folder, model_folder


def plan_benchmarks(
    benchmarks: Sequence[str], data_root: str | Path | None = None, split: str | None = None
) -> list[Plan]:
    """Read the questions of all benchmarks, and check that their files and images are there.

    Args:
        benchmarks: Names, see `list_benchmarks`; one that is named twice counts once.
        data_root: With one benchmark its folder; with several a folder that holds one folder for
            each, by name. None: the packaged copies, where there are some.
        split: Name of a split; None: each benchmark's own.

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


def evaluate(
    model: Run | str | Path,
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
    adapter: str | Path | None = None,
) -> list[Result]:
    """Measure a model on benchmarks; questions that were answered before are not asked again.

    Under `torchrun` every process asks about its share of the images, and the first one scores.

    Args:
        model: A run, a run folder, or the folder of an exported model.
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
        adapter: Adapter of the model, which is used unmerged; its results need an `out`.

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
    path = model.folder if isinstance(model, Run) else Path(model)
    checkpoint = model_folder(path)
    plans = [replace(part, limit=limit) for part in plan_benchmarks(benchmarks, data_root, split)]
    for part in plans:
        if part.benchmark.judge == "required" and judge is None:
            raise ValueError(
                f"{part.name} is graded by a judge: give one with --judge URL --judge-model NAME, "
                "or --judge-replies FILE"
            )
    if out is None and checkpoint == path:
        raise ValueError(f"{path} is a model, not a run, so it has no place for results: give -o")
    if out is None and adapter is not None:
        raise ValueError("results of an adapter are not those of the run below it: give -o")
    if blind:
        plans = [replace(part, questions=_show_grey(part.questions), blind=True) for part in plans]

    # Load the model. The other processes wait for the slowest, however long its share takes.
    from mipha.assistant import load
    from mipha.world import join_world

    world = join_world(patience=timedelta(days=7))
    device = device or (str(world.device) if world.size > 1 else None)
    assistant = load(checkpoint, device=device, adapter=adapter)
    sha256 = fingerprint(checkpoint)
    if adapter is not None:
        both = f"{sha256} {fingerprint(adapter_folder(adapter))}"
        sha256 = hashlib.sha256(both.encode()).hexdigest()

    # Ask, then score, one benchmark after the other.
    results = []
    for part in plans:
        folder = Run(path).evaluation(part.key) if out is None else Path(out) / part.key
        predict(
            assistant,
            part,
            folder,
            checkpoint_sha256=sha256,
            batch_size=batch_size,
            progress=progress,
            rank=world.rank,
            num_ranks=world.size,
        )
        world.barrier()
        if world.is_first:
            predictions = merge(folder, part.questions)
            own_judge = judge if part.benchmark.judge else None
            results.append(score_predictions(part, predictions, folder, own_judge))
    world.barrier()
    return results


def _show_grey(questions: Sequence[Question]) -> list[Question]:
    grey = grey_image()
    return [
        question if question.image is None else replace(question, image=grey)
        for question in questions
    ]
