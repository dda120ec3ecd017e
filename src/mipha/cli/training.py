"""The verbs that train."""

from __future__ import annotations

import re
from collections.abc import Sequence
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
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe's name, or a .yaml file; with --serve also a run or model."),
    ],
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
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Predict answers on this CPU instead: first token, tokens/s."),
    ] = False,
    image_tokens: Annotated[
        str | None,
        typer.Option(help="With --serve: other numbers of tokens of an image. Default: 196,81,64."),
    ] = None,
    first_token: Annotated[
        float | None,
        typer.Option(min=0.001, help="With --serve: wished seconds; says what to change."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="With --serve: float32 or bfloat16. Default: float32.")
    ] = None,
) -> None:
    """Predict parameters, memory, time and cost of a recipe; exit code 1 if it does not fit."""
    import json

    from mipha.catalog.devices import device_entry
    from mipha.files import write_whole
    from mipha.preflight import check_parts
    from mipha.recipe import load_recipe
    from mipha.run import open_run

    if serve:
        _plan_serving(recipe, overrides or [], device, image_tokens, first_token, dtype, json_out)
        return
    if image_tokens or first_token or dtype:
        raise ValueError("--image-tokens, --first-token and --dtype are about answers: add --serve")

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
    # The metrics of a dpo stage, which TRL writes, hold neither seconds nor memory.
    compared = [
        compare_with_run(stage, open_run(run), wanted, num_devices)
        if stage.name in chosen.supervised_stages
        else None
        for stage in plans
        if run
    ]
    if json_out:
        write_whole(
            json_out,
            json.dumps(as_json(plans, wanted, num_devices, price, compared), indent=2) + "\n",
        )
    print_plan(chosen.name, plans, wanted, num_devices, price, compared)
    if any(stage.fixes for stage in plans):
        raise typer.Exit(1)


def _plan_serving(
    source: str,
    overrides: Sequence[str],
    device: str,
    image_tokens: str | None,
    first_token: float | None,
    dtype: str | None,
    json_out: Path | None,
) -> None:
    import json
    from dataclasses import asdict

    from mipha.files import write_whole
    from mipha.preflight import check_dtype, check_parts
    from mipha.recipe import load_recipe
    from mipha.run import model_folder

    # Check the arguments before torch is imported.
    if device != "cpu":
        raise ValueError(f"--serve measures this machine's CPU: leave --device {device} out")
    counts = None
    if image_tokens is not None:
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", image_tokens):
            raise ValueError(f"--image-tokens {image_tokens}: give numbers, such as 196,81")
        counts = [int(number) for number in image_tokens.split(",")]
    check_dtype(dtype or "float32")
    is_folder = Path(source).is_dir()
    if is_folder:
        folder = model_folder(source)
    else:
        recipe = load_recipe(source).override(*overrides)
        check_parts(recipe.model, reach_hub=False)

    import torch

    from mipha.models.build import skeleton
    from mipha.models.modeling import model_skeleton
    from mipha.planning.serving import plan_serving, print_serving_plan

    model = model_skeleton(folder) if is_folder else skeleton(recipe.model)
    plan = plan_serving(model, getattr(torch, dtype or "float32"), counts)
    if json_out:
        facts = asdict(plan) | {"dtype": dtype or "float32"}
        write_whole(json_out, json.dumps(facts, indent=2) + "\n")
    print_serving_plan(source, plan, first_token)


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
