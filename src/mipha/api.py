"""The verbs of the package: what `import mipha` offers and the command line calls.

A verb stands here where it takes more than one room to do all of its work. Torch is imported inside
a verb, so this module is light.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mipha.errors import import_optional
from mipha.lookup import did_you_mean
from mipha.preflight import (
    check_device,
    check_dtype,
    check_parts,
    check_prefers,
    check_writable,
    finished_folder,
)
from mipha.recipe import CheckpointRecipe, DpoStageRecipe
from mipha.run import Run, check_run, is_first_process, open_run

if TYPE_CHECKING:
    from mipha.deploy.serve.engine import Source
    from mipha.evaluation.benchmark import Judge, Plan
    from mipha.evaluation.evaluate import OpenModel, Result, Subject
    from mipha.recipe import Recipe
    from mipha.studies.runner import JudgeOptions
    from mipha.studies.study import Study


def train(recipe: Recipe, folder: str | Path, track: Sequence[str] = (), profile: int = 0) -> Run:
    """Train the stages of a recipe and write the model card; run again, it goes on.

    Args:
        recipe: Recipe of the run.
        folder: New, or the run folder of this same recipe.
        track: Trackers that follow the metrics: wandb, trackio. TensorBoard follows wherever it is
            installed.
        profile: Steps of each stage to trace, after five; written into the stage's folder.

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

    run = train_recipe(recipe, folder, track=track, profile=profile, train_dpo=_train_dpo)
    if is_first_process():
        write_model_card(run.final_checkpoint(), run)
    return run


def _check_dpo(recipe: Recipe, name: str, stage: DpoStageRecipe) -> None:
    """Check a dpo stage without torch: its settings, its pairs, TRL, and that it is alone."""
    from mipha.alignment.recipe import dpo_recipe
    from mipha.data.alignment import load_image_preferences, split_by_prompt

    dpo_recipe(recipe, name, stage, "the stage before")
    if not stage.data.is_file():
        raise FileNotFoundError(f"no data at {stage.data}: check the path")
    for package in ("datasets", "trl"):
        import_optional(package, f"the dpo stage {name!r}", "align")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"stages.{name} is a dpo stage, which trains in one process, and torchrun started "
            "several: start one, or train that stage by a recipe of its own (model.checkpoint)"
        )

    start = recipe.model
    if isinstance(start, CheckpointRecipe) and Path(start.checkpoint).is_dir():
        check_prefers(finished_folder(start.checkpoint))

    # A broken pair ends the run now, and not when the stages before have been trained.
    rows = load_image_preferences(stage.data, [] if stage.skip_empty else None)
    split_by_prompt(rows, stage.held_out, recipe.seed)


def _train_dpo(recipe: Recipe, name: str, start: Path, folder: Path) -> Path:
    """Train a dpo stage as the step of `mipha align` that it is; returns the model's folder."""
    from mipha.alignment import train_step
    from mipha.alignment.recipe import dpo_recipe

    stage = recipe.stages[name]
    assert isinstance(stage, DpoStageRecipe)
    return train_step(dpo_recipe(recipe, name, stage, str(start)), folder)


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
        stage = recipe.stages[name]
        if isinstance(stage, DpoStageRecipe):
            _check_dpo(recipe, name, stage)
            continue
        for data in stage.data:
            load_dataset(data.dataset)
            if isinstance(data.root, Path) and not data.root.exists():
                raise FileNotFoundError(f"no data at {data.root}: check the path")
    if recipe.stage_before(unfinished[0]) is None:
        check_parts(recipe.model)


def find_model(
    model: str | Path,
    engine: str = "auto",
    *,
    dtype: str = "auto",
    name: str | None = None,
    api_key: str | None = None,
    parallel: int | None = None,
    request: Mapping[str, Any] | None = None,
    adapter: str | Path | None = None,
) -> Subject:
    """Find a model to measure, wherever it runs; nothing is loaded and nothing is asked.

    Args:
        model: A run, a model folder, a GGUF file or the folder of an export; or the URL of a
            server that speaks OpenAI's chat completions, such as `http://localhost:8000/v1`.
        engine: `transformers`, `llama.cpp` or `vllm`; `auto`: llama.cpp for GGUF, else
            transformers.
        dtype: Type that transformers answers in, see `mipha.load`.
        name: Name of the model on the server; for a URL only, as all that follow.
        api_key: Key of the server.
        parallel: Requests at a time; None: 8.
        request: Fields of every request, which replace ours; a field that is None is left out.
        adapter: Adapter of a checkpoint, which transformers uses unmerged.

    Returns:
        The model, for `evaluate` and `predict`.

    Raises:
        FileNotFoundError: No such model, or an unfinished run.
        ValueError: Neither a model nor a URL, an option without effect, or an engine that is not
            installed or does not run this model.
    """
    from mipha.evaluation.evaluate import OpenModel, Subject, checkpoint_subject

    check_dtype(dtype)

    # A server.
    if str(model).startswith(("http://", "https://")):
        from mipha.evaluation.endpoint import EndpointModel

        if name is None:
            raise ValueError(f"{model} needs --model, the name of a model that the server has")
        for option, chosen in (("--engine", engine), ("--dtype", dtype)):
            if chosen != "auto":
                raise ValueError(f"{option} {chosen} has no effect on a URL: leave it out")
        if adapter is not None:
            raise ValueError("--adapter has no effect on a URL: give its name on the server")
        endpoint = EndpointModel(
            str(model), name, api_key=api_key, request=request, parallel=parallel or 8
        )
        asked = OpenModel(endpoint, endpoint.sha256, endpoint.about)
        return Subject(str(model), None, lambda device, folder: nullcontext(asked))
    for option, given in (("--model", name), ("--parallel", parallel), ("--request", request)):
        if given:
            raise ValueError(f"{option} is for the URL of a server, not for {model}: leave it out")

    # A file or folder: by its engine.
    if engine not in ("auto", "transformers", "llama.cpp", "vllm"):
        raise ValueError(
            f"no engine {engine!r}: {did_you_mean(engine, ('transformers', 'llama.cpp', 'vllm'))}"
        )
    path = Path(model)
    holds_gguf = path.is_file() or (path.is_dir() and any(path.glob("*.gguf")))
    if engine in ("auto", "transformers") and not holds_gguf:
        return checkpoint_subject(path, adapter, dtype)
    if adapter is not None:
        raise ValueError("--adapter needs transformers: leave out --engine, or merge the adapter")
    if dtype != "auto":
        raise ValueError(f"--dtype {dtype} is for transformers, not for {model}: leave it out")

    from mipha.deploy.serve.engine import choose_engine, find_source

    source = find_source(path)
    if engine == "llama.cpp" or source.gguf:
        import_optional("xllamacpp", "asking llama.cpp", "gguf")
    if engine != "llama.cpp" or source.gguf:
        choose_engine(source, engine)  # type: ignore[arg-type]  # checked above
    results = None if source.gguf else checkpoint_subject(path).results
    opened = _ask_vllm if engine == "vllm" else _ask_llama_cpp
    return Subject(str(path), results, partial(opened, source), source.checkpoint, engine)


@contextmanager
def _ask_llama_cpp(source: Source, device: str | None, folder: Path) -> Iterator[OpenModel]:
    """Open a model in llama.cpp; a checkpoint is exported into the folder of results before."""
    from mipha.deploy.llama_cpp import LlamaCpp
    from mipha.deploy.serve.engine import find_source
    from mipha.evaluation.evaluate import OpenModel
    from mipha.evaluation.predict import files_hash, fingerprint

    if device not in (None, "cpu"):
        raise ValueError(f"--device {device} has no effect on llama.cpp here: leave it out")
    if source.checkpoint is not None:
        from mipha.deploy.gguf.export import export_gguf

        exported = folder / f"gguf-f16-{fingerprint(source.checkpoint)[:8]}"
        if not exported.is_dir():
            export_gguf(source.checkpoint, exported)
        source = find_source(exported)

    assert source.gguf is not None
    files = [file for file in (source.gguf, source.mmproj) if file is not None]
    with LlamaCpp(source.gguf, source.mmproj) as runtime:
        about = {"engine": "llama.cpp", "quantization": runtime.quantization}
        yield OpenModel(runtime, files_hash(files), about | {"file": source.gguf.name})


@contextmanager
def _ask_vllm(source: Source, device: str | None, folder: Path) -> Iterator[OpenModel]:
    """Serve a checkpoint with vLLM on a port of this machine, and ask it there."""
    from mipha.deploy.serve.engine import launch
    from mipha.evaluation.endpoint import EndpointModel
    from mipha.evaluation.evaluate import OpenModel
    from mipha.evaluation.predict import fingerprint

    if device is not None:
        raise ValueError(f"--device {device} has no effect on vLLM here: set CUDA_VISIBLE_DEVICES")
    assert source.checkpoint is not None
    with asyncio.Runner() as runner:
        child = launch(source, "vllm")
        runner.run(child.start())
        try:
            asker = EndpointModel(child.url, source.name, api_key=child.key, parallel=64)
            yield OpenModel(asker, fingerprint(source.checkpoint), {"engine": "vllm"})
        finally:
            runner.run(child.close())


def evaluate(
    model: Subject | Run | str | Path,
    benchmarks: Sequence[str] = (),
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
    adapter: str | Path | None = None,
    boxes: str | None = None,
) -> list[Result]:
    """Measure a model on benchmarks, and write the scores of a run into its model card.

    Questions that were answered before are not asked again. Under `torchrun` every process asks
    about its share of the images, and the first one scores.

    Args:
        model: A run, a run folder, the folder of an exported model, or the URL of `endpoint`.
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
        plans: Further questions, such as those of `plan_own_data`.
        adapter: Adapter of a checkpoint, which is used unmerged; its results need an `out`.
        boxes: Form in which the model writes boxes, such as `bbox_2d`, where its checkpoint does
            not say; None: `thousand`.

    Returns:
        A result a benchmark; nothing in processes other than the first.

    Raises:
        FileNotFoundError: No such model, an unfinished run, or no data.
        ValueError: No such benchmark or split, a number below 1, a judge that is missing, or
            predictions of another model in the way.
    """
    # Check the model, the device and the folder of the results before torch is imported.
    from mipha.evaluation.evaluate import Subject, checkpoint_subject
    from mipha.evaluation.evaluate import evaluate as measure

    check_device(device)
    subject = model if isinstance(model, Subject) else checkpoint_subject(model, adapter)
    folder = subject.results if out is None else Path(out)
    if folder is not None:
        check_writable(folder)

    results = measure(
        subject,
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
        plans=plans,
        boxes=boxes,
    )
    if out is None and is_first_process():
        from mipha.deploy.model_card import write_model_card

        assert subject.results is not None
        run = open_run(subject.results.parent)
        write_model_card(run.final_checkpoint(), run)
    return results


def predict(
    model: Subject | Run | str | Path,
    plan: Plan,
    out: str | Path,
    *,
    batch_size: int = 16,
    limit: int | None = None,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """Answer questions without scoring them; see `mipha.evaluation.evaluate.write_predictions`."""
    from mipha.evaluation.evaluate import write_predictions

    check_device(device)
    check_writable(Path(out).parent)
    return write_predictions(
        model,
        plan,
        Path(out),
        batch_size=batch_size,
        limit=limit,
        device=device,
        progress=progress,
    )


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
