"""A model and names of benchmarks -> results: ask, then score, each once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mipha.data.images import grey_image
from mipha.evaluation.benchmark import load_benchmark
from mipha.evaluation.predict import fingerprint, predict
from mipha.evaluation.score import Result, score_predictions
from mipha.run import Run, model_folder


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
) -> list[Result]:
    """Measure a model on benchmarks; questions that were answered before are not asked again.

    Args:
        model: A run, a run folder, or the folder of an exported model.
        benchmarks: Names, see `list_benchmarks`.
        data_root: With one benchmark its folder; with several a folder that holds one folder for each, by name.
            None: the packaged copies, where there are some.
        batch_size: Questions a forward pass.
        limit: First N questions only, for a quick look; the result says that it is not complete.
        split: None: each benchmark's own.
        out: Where predictions and scores go; None: the run's own `evaluation` folder.
        device: None: the accelerator if there is one.
        progress: Show a progress bar.
        blind: Show grey in place of every picture: what the questions alone give away. Results go into `<benchmark>-blind`.

    Raises:
        FileNotFoundError: No such model, an unfinished run, or no data.
        ValueError: No such benchmark or split, a number below 1, or predictions of another model in the way.
    """
    for name, number in (("batch_size", batch_size), ("limit", limit)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}: give 1 or more")
    # Names and data are checked for all before the first minute is spent on any.
    plan = []
    for name in dict.fromkeys(benchmarks):
        benchmark = load_benchmark(name)
        chosen = split or benchmark.SPLITS[0]
        root = None if data_root is None else Path(data_root) if len(benchmarks) == 1 else Path(data_root) / name
        questions = benchmark.questions(root, chosen)
        if blind:
            grey = grey_image()
            questions = [question if question.image is None else replace(question, image=grey) for question in questions]
        plan.append((name, benchmark, chosen, questions))
    if not plan:
        raise ValueError("no benchmark was named: give at least one with -b")
    path = model.folder if isinstance(model, Run) else Path(model)
    checkpoint = model_folder(path)
    if out is None and checkpoint == path:
        raise ValueError(f"{path} is a model, not a run, so it has no place for results: give -o")

    from mipha.assistant import load

    assistant = load(checkpoint, device=device)
    results = []
    for name, benchmark, chosen, questions in plan:
        key = name + (f"-{chosen}" if chosen != benchmark.SPLITS[0] else "") + ("-blind" if blind else "")
        folder = Run(path).evaluation(key) if out is None else Path(out) / key
        max_new_tokens, sha256 = benchmark.MAX_NEW_TOKENS, fingerprint(checkpoint)
        predictions = predict(assistant, name, questions, folder, batch_size, max_new_tokens, limit, progress, sha256)
        results.append(score_predictions(benchmark, chosen, questions, predictions, folder, limit, blind))
    return results
