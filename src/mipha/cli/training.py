"""The verbs that train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mipha.cli.arguments import Overrides, split_names
from mipha.terminal import echo


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a .yaml file.")],
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", help="Run folder; the same recipe and folder go on where they stopped."
        ),
    ],
    overrides: Overrides = None,
    track: Annotated[
        list[str] | None,
        typer.Option(help="wandb, trackio; TensorBoard follows wherever it is installed."),
    ] = None,
    profile: Annotated[
        int, typer.Option(min=0, help="Trace N steps of each stage: <stage>/profile.json, .txt.")
    ] = 0,
) -> None:
    """Train a recipe, stage by stage."""
    from mipha.api import train as train_recipe
    from mipha.recipe import load_recipe
    from mipha.run import is_first_process

    chosen = load_recipe(recipe).override(*(overrides or ()))
    run = train_recipe(chosen, out, track=split_names(track), profile=profile)
    if is_first_process():
        echo(f"trained {chosen.name}: {run.final_checkpoint()}")


def tune(
    model: Annotated[
        str, typer.Argument(help="A run, a model folder, or a hub id of a standard LLaVA.")
    ],
    data: Annotated[
        str, typer.Argument(help="A file or folder of your own data, or a data set's name.")
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="Run folder; the same command goes on where it stopped."),
    ],
    overrides: Overrides = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Train all weights of the language model, not adapters."),
    ] = False,
    replay: Annotated[
        str | None,
        typer.Option(help="Old data to mix in against forgetting: a path, or a data set's name."),
    ] = None,
    image_root: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that images may lie in, beside the data's own."),
    ] = None,
) -> None:
    """Tune a finished model on your own data: check, plan, train, compare before and after."""
    from mipha.own_data import tune as tune_model
    from mipha.run import is_first_process

    run = tune_model(
        model,
        data,
        out,
        full=full,
        replay=replay,
        image_root=image_root or (),
        overrides=overrides or (),
    )
    if is_first_process():
        echo(f"tuned: {run.final_checkpoint()}")


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a .yaml file.")],
    device: Annotated[
        str, typer.Option(help="h100, a100, rtx4090, ... or cpu: this machine's.")
    ] = "cpu",
    overrides: Overrides = None,
    num_devices: Annotated[int, typer.Option(min=1, help="Devices that train it together.")] = 1,
    price: Annotated[
        float | None, typer.Option(min=0, help="Of one device an hour, in any currency.")
    ] = None,
    efficiency: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="Share of the device's peak that a step reaches."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="A run of this recipe: how far off was the plan?")
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the plan to a file too.")
    ] = None,
) -> None:
    """Predict parameters, memory, time and cost of a recipe; exit code 1 if it does not fit."""
    import json

    from mipha.catalog.devices import device_entry
    from mipha.files import write_whole
    from mipha.preflight import check_parts
    from mipha.recipe import load_recipe
    from mipha.run import open_run

    # Check the names before torch is imported.
    chosen = load_recipe(recipe).override(*(overrides or ()))
    device_entry(device)
    check_parts(chosen.model, reach_hub=False)
    if run is not None:
        open_run(run)

    from mipha.planning.plan import compare_with_run, device_named, plan_training
    from mipha.planning.tables import as_json, print_plan

    wanted = device_named(device, chosen.precision)
    plans = plan_training(chosen, wanted, num_devices, efficiency)
    compared = (
        [compare_with_run(stage, open_run(run), wanted, num_devices) for stage in plans]
        if run
        else []
    )
    if json_out:
        write_whole(
            json_out,
            json.dumps(as_json(plans, wanted, num_devices, price, compared), indent=2) + "\n",
        )
    print_plan(chosen.name, plans, wanted, num_devices, price, compared)
    if any(stage.fixes for stage in plans):
        raise typer.Exit(1)


def quickstart(
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="Run folder; the same one goes on where it stopped. Default: runs/quickstart, "
            "with --photos runs/photos.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Ask the first N test questions only.")] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Also measure it before its last stage, and a model trained on grey images.",
        ),
    ] = False,
    photos: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Train on your own images with captions instead; `tuxpaint`: on those of a "
            "Debian package.",
        ),
    ] = None,
) -> None:
    """Train, measure and try a small assistant on this machine."""
    from mipha.quickstart import photographs
    from mipha.quickstart import quickstart as tour

    if photos is None:
        tour(out or Path("runs/quickstart"), overrides or [], limit, baselines)
        return
    if limit or baselines:
        raise ValueError(
            "--limit and --baselines are for easy-VQA, not for --photos: leave them out"
        )
    photographs(photos, out or Path("runs/photos"), overrides or [])
