"""A model and names of benchmarks -> results: ask, then score, each once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from mipha.data.images import grey_image
from mipha.evaluation.benchmark import Benchmark, Judge, Question, load_benchmark
from mipha.evaluation.predict import fingerprint, merge, predict
from mipha.evaluation.score import Result, score_predictions
from mipha.run import Run, model_folder


@dataclass(frozen=True)
class Plan:
    """What is asked of one benchmark.

    Args:
        name: Of the benchmark.
        benchmark: Its module.
        split: Which of its splits.
        questions: All of the split.
        doubts: Signs that these are not the files of the protocol, a sentence each.
    """

    name: str
    benchmark: Benchmark
    split: str
    questions: Sequence[Question]
    doubts: tuple[str, ...]


def plan(
    benchmarks: Sequence[str], data_root: str | Path | None = None, split: str | None = None
) -> list[Plan]:
    """Read the questions of all benchmarks, and check that their files and images are there.

    Args:
        benchmarks: Names, see `list_benchmarks`; one that is named twice counts once.
        data_root: With one benchmark its folder; with several a folder that holds one folder for each, by name.
            None: the packaged copies, where there are some.
        split: None: each benchmark's own.

    Raises:
        FileNotFoundError: A file or an image is missing.
        ValueError: No such benchmark or split, a malformed file, or no benchmark at all.
    """
    if not benchmarks:
        raise ValueError("no benchmark was named: give at least one with -b")
    plans = []
    for name in (names := dict.fromkeys(benchmarks)):
        benchmark = load_benchmark(name)
        chosen = split or benchmark.SPLITS[0]
        root = None if data_root is None else Path(data_root)
        # The folder of one benchmark, or the one above it, as it lies for several.
        if root is not None and (len(names) > 1 or (root / name).is_dir()):
            root /= name
        questions = benchmark.questions(root, chosen)
        if not questions:
            raise ValueError(f"{root} has no question of {name} {chosen}: {benchmark.SOURCE}")
        doubts = benchmark.doubts(questions, chosen)
        if len(questions) != benchmark.SIZES[chosen]:
            doubts = [
                f"{len(questions):,} questions, not the {benchmark.SIZES[chosen]:,} of the official {chosen} split",
                *doubts,
            ]
        plans.append(Plan(name, benchmark, chosen, questions, tuple(doubts)))
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
) -> list[Result]:
    """Measure a model on benchmarks; questions that were answered before are not asked again.

    Under `torchrun` every process asks about its share of the images, and the first one scores.

    Args:
        model: A run, a run folder, or the folder of an exported model.
        benchmarks: Names, see `list_benchmarks`.
        data_root: See `plan`.
        batch_size: Questions a forward pass.
        limit: First N questions only, for a quick look; the result says that it is not complete.
        split: None: each benchmark's own.
        out: Where predictions and scores go; None: the run's own `evaluation` folder.
        device: None: the accelerator if there is one.
        progress: Show a progress bar.
        blind: Show grey in place of every picture: what the questions alone give away. Results go into `<benchmark>-blind`.
        judge: Grades answers of the benchmarks that want one.

    Returns:
        A result a benchmark; nothing in processes other than the first.

    Raises:
        FileNotFoundError: No such model, an unfinished run, or no data.
        ValueError: No such benchmark or split, a number below 1, a judge that is missing, or predictions of another model in the way.
    """
    for name, number in (("batch_size", batch_size), ("limit", limit)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}: give 1 or more")
    # Names and data are checked for all before the first minute is spent on any.
    plans = plan(benchmarks, data_root, split)
    for part in plans:
        if part.benchmark.JUDGE == "required" and judge is None:
            raise ValueError(
                f"{part.name} is graded by a judge: give one with --judge URL --judge-model NAME, or --judge-replies FILE"
            )
    path = model.folder if isinstance(model, Run) else Path(model)
    checkpoint = model_folder(path)
    if out is None and checkpoint == path:
        raise ValueError(f"{path} is a model, not a run, so it has no place for results: give -o")

    from mipha.assistant import load
    from mipha.world import join_world

    world = join_world(
        patience=timedelta(days=7)
    )  # the others wait for the slowest, however long its share takes
    assistant = load(checkpoint, device=device or (str(world.device) if world.size > 1 else None))
    sha256 = fingerprint(checkpoint)
    results = []
    for part in plans:
        key = (
            part.name
            + (f"-{part.split}" if part.split != part.benchmark.SPLITS[0] else "")
            + ("-blind" if blind else "")
        )
        folder = Run(path).evaluation(key) if out is None else Path(out) / key
        questions = _greyed(part.questions) if blind else part.questions
        max_new_tokens = part.benchmark.MAX_NEW_TOKENS
        predict(
            assistant,
            part.name,
            questions,
            folder,
            batch_size,
            max_new_tokens,
            limit,
            progress,
            sha256,
            world.rank,
            world.size,
        )
        world.barrier()
        if world.is_first:
            predictions = merge(folder, questions)
            wants = judge if part.benchmark.JUDGE else None
            results.append(
                score_predictions(
                    part.benchmark, part.split, questions, predictions, folder, limit, blind, wants
                )
            )
    world.barrier()
    return results


def _greyed(questions: Sequence[Question]) -> list[Question]:
    grey = grey_image()
    return [
        question if question.image is None else replace(question, image=grey)
        for question in questions
    ]
