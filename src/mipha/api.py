"""The verbs of the package: what `import mipha` offers and the command line calls.

A verb stands here where it takes more than one room to do all of its work. Torch is imported inside
a verb, so this module is light.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mipha.preflight import check_device, check_parts, check_writable
from mipha.run import Run, adapter_folder, check_run, is_first_process, model_folder, open_run

if TYPE_CHECKING:
    from mipha.evaluation.benchmark import Judge
    from mipha.evaluation.evaluate import Result
    from mipha.recipe import Recipe
    from mipha.studies.runner import JudgeOptions
    from mipha.studies.study import Study


def train(recipe: Recipe, folder: str | Path, track: Sequence[str] = ()) -> Run:
    """Train the stages of a recipe and write the model card; run again, it goes on.

    Args:
        recipe: Recipe of the run.
        folder: New, or the run folder of this same recipe.
        track: Trackers that follow the metrics: wandb, trackio. TensorBoard follows wherever it is
            installed.

    Returns:
        The run, with a standard checkpoint for each stage and the card in the last one.

    Raises:
        ValueError, FileNotFoundError: Something that the user can fix, said before the first step
            where it can be known; also data that changed since the run began.
        OSError: The disk cannot hold the run, or the folder cannot be written to.
    """
    check_training(recipe, folder, track)

    from mipha.deploy.model_card import write_model_card
    from mipha.training.pipeline import train as train_recipe

    run = train_recipe(recipe, folder, track=track)
    if is_first_process():
        write_model_card(run.final_checkpoint(), run)
    return run


def check_training(recipe: Recipe, folder: str | Path, track: Sequence[str] = ()) -> None:
    """Check everything about a training that is known without torch; nothing is created.

    Arguments and errors are those of `train`.
    """
    from mipha.data.dataset import load_dataset
    from mipha.engine.trackers import check_trackers

    check_trackers(track)
    check_run(folder, recipe)
    run = Run(Path(folder))
    unfinished = [name for name in recipe.stages if not run.is_finished(name)]
    if not unfinished:
        return

    # The folder, the data of all stages, and the parts that the first stage starts from.
    check_writable(run.folder)
    for name in unfinished:
        for data in recipe.stages[name].data:
            load_dataset(data.dataset)
            if data.root is not None and not data.root.exists():
                raise FileNotFoundError(f"no data at {data.root}: check the path")
    if recipe.stage_before(unfinished[0]) is None:
        check_parts(recipe.model)


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
    """Measure a model on benchmarks, and write the scores of a run into its model card.

    Questions that were answered before are not asked again. Under `torchrun` every process asks
    about its share of the images, and the first one scores.

    Args:
        model: A run, a run folder, or the folder of an exported model.
        benchmarks: Names, see `mipha list benchmark`.
        data_root: The benchmark's folder; with several, the folder above them. None: the packaged
            data, where there are any.
        batch_size: Questions a forward pass.
        limit: First N questions only, for a quick look; the result says that it is not complete.
        split: None: each benchmark's own.
        out: Where predictions and scores go; None: the run's own `evaluation` folder.
        device: None: the accelerator if there is one.
        progress: Show a progress bar.
        blind: Show grey instead of every image: what the questions alone give away. Results go
            into `<benchmark>-blind`.
        judge: Grades answers of the benchmarks that want one.
        adapter: Adapter of the model, which is used unmerged; its results need an `out`.

    Returns:
        A result a benchmark; nothing in processes other than the first.

    Raises:
        FileNotFoundError: No such model, an unfinished run, or no data.
        ValueError: No such benchmark or split, a number below 1, a judge that is missing, or
            predictions of another model in the way.
    """
    # Check the model, the device and the folder of the results before torch is imported.
    check_device(device)
    path = model.folder if isinstance(model, Run) else Path(model)
    model_folder(path)
    if adapter is not None:
        adapter_folder(adapter)
    check_writable(path if out is None else Path(out))

    from mipha.deploy.model_card import write_model_card
    from mipha.evaluation.evaluate import evaluate as measure

    results = measure(
        model,
        benchmarks,
        data_root,
        batch_size,
        limit,
        split,
        out,
        device=device,
        progress=progress,
        blind=blind,
        judge=judge,
        adapter=adapter,
    )
    if out is None and is_first_process():
        run = model if isinstance(model, Run) else open_run(model)
        write_model_card(run.final_checkpoint(), run)
    return results


def run_study(
    study: Study,
    scale: str,
    out: str | Path,
    seeds: int | None = None,
    slots: int = 1,
    slurm: dict[str, Any] | None = None,
    share: Sequence[str | Path] = (),
    judge: JudgeOptions | None = None,
) -> Path:
    """Train and evaluate the runs of a study that are missing, then write its report.

    Args:
        study: Study to run.
        scale: `mini` or `paper`.
        out: Folder of this study; the same one goes on where it stopped.
        seeds: Repeats of every variant; None: as the study says. More may be asked for later.
        slots: Runs at a time; with several GPUs each run sees one of them.
        slurm: Parameters of a SLURM job for submitit, one job a run, instead of local
            processes.
        share: Folders of other studies. Their runs and first stages of the same recipes are taken
            over instead of trained again.
        judge: Judge of the benchmarks that want one; None: they are left out, which is said before
            anything is trained.

    Returns:
        The folder, with report.md and report.html in it.

    Raises:
        FileNotFoundError: A folder to share from holds no study, or a file of a benchmark or of the
            panel is not there.
        ValueError: The folder holds another study, a run in it was made with another recipe, a
            benchmark has no such metric or split, or there are fewer GPUs than slots.
        RuntimeError: Runs failed; names their logs. The others were finished.
    """
    from mipha.studies.report import write_report
    from mipha.studies.runner import run_missing

    folder, experiment = Path(out), study.at(scale)
    run_missing(experiment, folder, seeds, slots, slurm, share, judge)
    write_report(experiment, folder)
    return folder
