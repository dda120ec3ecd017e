"""A run that is stopped, or cut into other pieces, ends in the same weights."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mipha.data.batches import StepDataset
from mipha.data.collate import to_device
from mipha.engine.optimizer import set_learning_rates
from mipha.engine.precision import autocast
from mipha.engine.states import StateWriter, list_states, seal_state
from mipha.models.memory import PRODUCTS
from mipha.models.tuning import apply_tuning, part_layers, part_parameters
from mipha.recipe import Recipe
from mipha.run import Run
from mipha.training import loop
from mipha.training.loop import make_optimizer, run_steps
from mipha.training.pipeline import train
from mipha.training.placement import place
from mipha.training.stage import Stage
from mipha.world import World
from tests import forked

STAGES = ("pretrain", "finetune")

LONG = ("stages.finetune.max_steps=12", "stages.finetune.epochs=3", "stages.pretrain.max_steps=3")
TIMED = {
    "seconds",
    "data_wait_seconds",
    "samples_per_second",
    "images_per_second",
    "tokens_per_second",
    "peak_memory_gib",
}
HERE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def uninterrupted(tiny_run_recipe: Callable, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Phi here has dropout, so that a resumed run must draw what it would have drawn."""
    return train(
        tiny_run_recipe(*LONG, family="phi"), tmp_path_factory.mktemp("uninterrupted") / "run"
    )


@pytest.fixture
def launch() -> Callable[[Recipe, Path], BaseProcess]:
    """Training in a process of its own, as good as `mipha train` but for the start-up time."""
    return lambda recipe, folder: forked.start_function(train, recipe, folder)


def run_stage(stage: Stage, model: torch.nn.Module, steps: StepDataset) -> None:
    """Take the steps of a stage with a model whose tuning is applied."""
    place(model, stage)
    run_steps(stage, model, steps)


def wait_for_lines(path: Path, wanted: int, process: BaseProcess) -> None:
    while process.is_alive() and not (path.exists() and path.read_bytes().count(b"\n") >= wanted):
        time.sleep(0.002)


def assert_same(run: Run, other: Run, weights: Callable, metrics: Callable) -> None:
    for stage in STAGES:
        mine, theirs = weights(run.checkpoint(stage)), weights(other.checkpoint(stage))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), stage
        rows, others = metrics(run.metrics(stage)), metrics(other.metrics(stage))
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        assert [{k: v for k, v in row.items() if k not in TIMED} for row in rows] == [
            {k: v for k, v in row.items() if k not in TIMED} for row in others
        ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_saves_and_goes_on(
    number: signal.Signals,
    uninterrupted: Run,
    launch: Callable,
    tmp_path: Path,
    weights: Callable,
    metrics: Callable,
) -> None:
    recipe, run = uninterrupted.recipe, Run(tmp_path / "run")
    recipe = recipe.override(
        "stages.finetune.checkpoint_every=1000"
    )  # so that the only state is the one that stopping made
    process = launch(recipe, run.folder)
    wait_for_lines(run.metrics("finetune"), 3, process)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 1  # KeyboardInterrupt; the command line makes 130 of it
    done = len(metrics(run.metrics("finetune")))
    assert 3 <= done < 12
    assert [path.name for path in list_states(run.states("finetune"))] == [f"step-{done:08d}"]
    assert_same(train(recipe, run.folder), uninterrupted, weights, metrics)


def test_a_second_run_changes_nothing(uninterrupted: Run) -> None:
    before = {
        path: path.stat().st_mtime_ns for path in uninterrupted.folder.rglob("*") if path.is_file()
    }
    train(uninterrupted.recipe, uninterrupted.folder)
    assert {
        path: path.stat().st_mtime_ns for path in uninterrupted.folder.rglob("*") if path.is_file()
    } == before


def test_it_learns(uninterrupted: Run, metrics: Callable) -> None:
    losses = [row["loss"] for row in metrics(uninterrupted.metrics("finetune"))]
    assert losses[-1] < 0.8 * losses[0]


def test_a_loss_that_is_no_number_stops_the_run(
    tiny_run_recipe: Callable, tmp_path: Path, metrics: Callable
) -> None:
    recipe = tiny_run_recipe(
        "stages.finetune.learning_rate=1e30", "stages.finetune.checkpoint_every=1"
    )
    with pytest.raises(
        FloatingPointError, match=r"step 2: loss nan.* 6 samples are in .*nonfinite\.json"
    ):
        train(recipe, tmp_path / "run")
    run = Run(tmp_path / "run")
    report = json.loads((run.stage("finetune") / "nonfinite.json").read_text())
    assert report["step"] == 2
    assert len(report["samples"]) == 6 and all(
        name.startswith("messages/train/") for name in report["samples"]
    )
    assert [path.name for path in list_states(run.states("finetune"))] == ["step-00000001"]
    assert len(metrics(run.metrics("finetune"))) == 1
    assert not run.is_finished("finetune")


def test_weights_stay_where_the_loss_is_not_finite_and_its_gradient_is(
    tiny_model: Callable, tiny_run_recipe: Callable, mixture: Any, tmp_path: Path
) -> None:
    recipe = tiny_run_recipe()
    stage = Stage(Run(tmp_path), recipe, "finetune", HERE)
    model, processor = tiny_model()
    apply_tuning(model, stage.settings.tuning)
    steps = StepDataset(mixture, processor, stage.settings, recipe.seed)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}

    # An infinite constant has no gradient.
    def add_infinity(module: Any, inputs: Any, output: Any) -> Any:
        return replace(output, loss_sum=output.loss_sum + math.inf)

    model.register_forward_hook(add_infinity)
    with pytest.raises(FloatingPointError, match="step 1: loss inf"):
        run_stage(stage, model, steps)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_in_a_mean_of_means_each_micro_batch_weighs_the_same(
    tiny_model: Callable, tiny_run_recipe: Callable, mixture: Any, tmp_path: Path, metrics: Callable
) -> None:
    """Source: transformers 4.38, Trainer.training_step, which upstream trains with."""
    changes = ("batching=padded", "micro_batch_rows=1", "max_steps=1", "upstream=[mean_of_means]")
    recipe = tiny_run_recipe(*(f"stages.finetune.{change}" for change in changes))
    stage = Stage(Run(tmp_path), recipe, "finetune", HERE)
    model, processor = tiny_model()
    apply_tuning(model, stage.settings.tuning)
    steps = StepDataset(mixture, processor, stage.settings, recipe.seed)
    with torch.no_grad():
        found = [model(**to_device(batch, "cpu")) for batch in steps[0].micro_batches]
    of_means = sum(output.loss for output in found) / len(found)
    of_tokens = sum(output.loss_sum for output in found) / steps[0].num_supervised
    run_stage(stage, model, steps)
    (row,) = metrics(stage.run.metrics("finetune"))
    assert row["loss"] == pytest.approx(of_means.item(), rel=1e-5)
    assert row["loss"] != pytest.approx(of_tokens.item(), rel=1e-5)


@pytest.mark.parametrize("kept", [False, True])
def test_a_frozen_language_model_has_dropout_only_where_upstreams_is_asked_for(
    kept: bool, tiny_model: Callable, tiny_run_recipe: Callable, tmp_path: Path
) -> None:
    changes = ["stages.pretrain.upstream=[frozen_dropout]"] if kept else []
    stage = Stage(Run(tmp_path), tiny_run_recipe(*changes, family="phi"), "pretrain", HERE)
    model, _ = tiny_model("phi")
    apply_tuning(model, stage.settings.tuning)
    place(model, stage)
    dropouts = [m for m in model.model.language_model.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts and {module.training for module in dropouts} == {kept}


def test_each_step_draws_its_own_dropout(
    tiny_model: Callable, tiny_run_recipe: Callable, mixture: Any, tmp_path: Path
) -> None:
    recipe = tiny_run_recipe("stages.finetune.max_steps=3")
    stage = Stage(Run(tmp_path), recipe, "finetune", HERE)
    model, processor = tiny_model()
    apply_tuning(model, stage.settings.tuning)
    steps = StepDataset(mixture, processor, stage.settings, recipe.seed)
    seeds = []
    model.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
    run_stage(stage, model, steps)
    assert len(set(seeds)) == 3


@pytest.mark.parametrize(
    "change",
    [
        ("stages.finetune.batching=padded", "stages.finetune.micro_batch_rows=1"),
        ("stages.finetune.batching=padded", "stages.finetune.micro_batch_rows=2"),
        ("stages.finetune.batching=padded", "stages.finetune.micro_batch_rows=4"),
        (
            "stages.finetune.batching=packed",
            "stages.finetune.micro_batch_rows=2",
            "stages.finetune.row_tokens=120",
        ),
        ("stages.finetune.batching=packed", "stages.finetune.activation_checkpointing=true"),
        ("stages.finetune.batching=packed", "stages.finetune.activation_checkpointing=selective"),
    ],
    ids=lambda change: " ".join(assignment.partition("finetune.")[2] for assignment in change),
)
def test_how_rows_are_cut_does_not_matter(
    change: tuple[str, ...], smooth: Recipe, one_row: Run, tmp_path: Path, weights: Callable
) -> None:
    run = train(smooth.override(*change), tmp_path / "run")
    mine, theirs = weights(run.final_checkpoint()), weights(one_row.final_checkpoint())
    for name in theirs:
        assert (mine[name] - theirs[name]).abs().max() < 1e-5, name
    started = weights(run.checkpoint("pretrain"))
    assert max((theirs[name] - started[name]).abs().max() for name in theirs) > 1e-2, (
        "weights that hardly move test nothing"
    )


@pytest.fixture(scope="module")
def smooth(tiny_run_recipe: Callable) -> Recipe:
    """With this epsilon, Adam does not blow up the rounding error of a gradient that is truly 0."""
    return tiny_run_recipe(
        "stages.finetune.adam_eps=1e-2",
        "stages.finetune.learning_rate=3e-2",
        "stages.finetune.max_grad_norm=0",
    )


@pytest.fixture(scope="module")
def one_row(smooth: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All samples of a step in one row."""
    return train(
        smooth.override("stages.finetune.row_tokens=400"),
        tmp_path_factory.mktemp("one row") / "run",
    )


@pytest.mark.slow
def test_compiled_layers_train_the_same(
    smooth: Recipe, one_row: Run, tmp_path: Path, weights: Callable
) -> None:
    """Over rows of ever new lengths, with and without a mask."""
    run = train(
        smooth.override(
            "compile=true", "stages.finetune.row_tokens=120", "stages.finetune.max_steps=6"
        ),
        tmp_path / "run",
    )
    mine, theirs = weights(run.final_checkpoint()), weights(one_row.final_checkpoint())
    assert mine.keys() == theirs.keys()
    for name in theirs:
        assert (mine[name] - theirs[name]).abs().max() < 1e-5, name


def test_clipping_bounds_the_gradient(
    smooth: Recipe, one_row: Run, tmp_path: Path, weights: Callable
) -> None:
    """With plain SGD-like steps (a huge epsilon) a clipped run moves less, in proportion."""
    run = train(
        smooth.override("stages.finetune.row_tokens=400", "stages.finetune.max_grad_norm=0.1"),
        tmp_path / "run",
    )
    started = weights(run.checkpoint("pretrain"))

    def moved(folder: Path) -> float:
        return (
            sum(
                (value - started[name]).norm().item() ** 2
                for name, value in weights(folder).items()
            )
            ** 0.5
        )

    assert moved(run.final_checkpoint()) < 0.5 * moved(one_row.final_checkpoint())


def test_activation_checkpointing_of_one_part_leaves_the_other(
    tiny_model: Callable, tiny_run_recipe: Callable, mixture: object, tmp_path: Path
) -> None:
    for part, expected in (("vision_tower", (2, 1)), ("language_model", (1, 2))):
        model, processor = tiny_model()
        recipe = tiny_run_recipe(
            f"stages.finetune.activation_checkpointing=[{part}]", "stages.finetune.max_steps=1"
        )
        stage = recipe.stages["finetune"]
        apply_tuning(model, stage.tuning)
        calls = [0, 0]
        for number, name in enumerate(("vision_tower", "language_model")):
            mlp = part_layers(model, name)[0].mlp
            mlp.register_forward_pre_hook(
                lambda *_, number=number, calls=calls: calls.__setitem__(number, calls[number] + 1)
            )
        steps = StepDataset(mixture, processor, stage, seed=0)
        run_stage(Stage(Run(tmp_path / part), recipe, "finetune", HERE), model, steps)
        assert tuple(count / len(steps[0].micro_batches) for count in calls) == expected, part


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_selective_checkpointing_computes_norms_again_and_no_product(
    precision: str, tiny_model: Callable, tiny_run_recipe: Callable, mixture: Any, tmp_path: Path
) -> None:
    """Its gradients are those of no checkpointing, to the bit."""
    found, gradients = {}, {}
    for wanted in ("false", "selective", "true"):
        model, processor = tiny_model()
        recipe = tiny_run_recipe(
            f"precision={precision}", f"stages.finetune.activation_checkpointing={wanted}"
        )
        stage = Stage(Run(tmp_path), recipe, "finetune", HERE)
        apply_tuning(model, stage.settings.tuning)
        place(model, stage)
        batch = StepDataset(mixture, processor, stage.settings, seed=0)[0].micro_batches[0]
        with CountCalls() as calls:
            with autocast(HERE.device, stage.autocast):
                loss = model(**to_device(batch, "cpu")).loss_sum
            loss.backward()
        found[wanted] = calls.counts
        weights = model.named_parameters()
        gradients[wanted] = {name: w.grad for name, w in weights if w.grad is not None}

    products, others = (
        {name: sum(counts[kind] for kind in kinds) for name, counts in found.items()}
        for kinds in (PRODUCTS, [torch.ops.aten.rsqrt.default, torch.ops.aten.silu.default])
    )
    assert products["false"] == products["selective"] < products["true"]
    assert others["false"] < others["selective"] == others["true"]
    assert gradients["false"].keys() == gradients["selective"].keys()
    for name, gradient in gradients["false"].items():
        assert torch.equal(gradient, gradients["selective"][name]), name


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_step_rounds_each_trained_weight_once(
    checkpointing: str,
    tiny_model: Callable,
    tiny_run_recipe: Callable,
    mixture: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And ends in the same bits as where every micro-batch rounds them again."""
    recipe = tiny_run_recipe(
        "precision=bfloat16", f"stages.finetune.activation_checkpointing={checkpointing}"
    )
    stage, casts, weights = Stage(Run(tmp_path), recipe, "finetune", HERE), {}, {}
    for once in (True, False):
        model, processor = tiny_model()
        apply_tuning(model, stage.settings.tuning)
        place(model, stage)
        step = StepDataset(mixture, processor, stage.settings, seed=0)[0]
        linears = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
        trained = [w for part in linears for w in part.parameters() if w.requires_grad]
        if not once:
            monkeypatch.setattr(loop, "_rounded_once", lambda stage, number: nullcontext())
        with CountCasts() as counts:
            loop._optimize(stage, model, make_optimizer(model, stage.settings), step, True)
        casts[once] = Counter(counts.by_storage[weight.data_ptr()] for weight in trained)
        weights[once] = model.state_dict()

    assert len(step.micro_batches) == 2 and len(trained) > 10
    assert set(casts[True]) == {1} and min(casts[False]) == 2
    for name, weight in weights[True].items():
        assert torch.equal(weight, weights[False][name]), name


class CountCasts(TorchDispatchMode):
    """Counts how often each tensor is brought to another type."""

    def __init__(self) -> None:
        super().__init__()
        self.by_storage: Counter[int] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        if function is torch.ops.aten._to_copy.default:
            self.by_storage[arguments[0].data_ptr()] += 1
        return function(*arguments, **(options or {}))


class CountCalls(TorchDispatchMode):
    """Counts the calls of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any, options: Any) -> Any:
        self.counts[function] += 1
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("stage", STAGES)
def test_activation_checkpointing_recomputes_every_layer_that_gradients_pass(
    stage: str, tiny_model: Callable, tiny_run_recipe: Callable, mixture: object, tmp_path: Path
) -> None:
    """The projector's gradient passes the frozen language model, where most memory is used."""
    calls = {}
    for wanted in (False, True):
        model, processor = tiny_model()
        recipe = tiny_run_recipe(
            f"stages.{stage}.activation_checkpointing={wanted}", f"stages.{stage}.max_steps=1"
        )
        apply_tuning(model, recipe.stages[stage].tuning)
        counts = calls[wanted] = [0, 0]
        for index, layer in enumerate(model.model.language_model.layers):
            layer.mlp.register_forward_pre_hook(
                lambda *_, index=index, counts=counts: counts.__setitem__(index, counts[index] + 1)
            )
        steps = StepDataset(mixture, processor, recipe.stages[stage], seed=0)
        run_stage(Stage(Run(tmp_path / f"{wanted}"), recipe, stage, HERE), model, steps)
    assert calls[True] == [2 * count for count in calls[False]]
    assert calls[False] == [2, 2]  # micro-batches


def test_a_frozen_part_has_no_dropout(
    tiny_model: Callable, tiny_run_recipe: Callable, mixture: object, tmp_path: Path
) -> None:
    for stage, drops in (("pretrain", False), ("finetune", True)):
        model, processor = tiny_model("phi")
        recipe = tiny_run_recipe(f"stages.{stage}.max_steps=1")
        wish = recipe.stages[stage]
        apply_tuning(model, wish.tuning)
        steps = StepDataset(mixture, processor, wish, seed=0)
        run_stage(Stage(Run(tmp_path), recipe, stage, HERE), model, steps)
        dropouts = [
            module
            for module in model.model.language_model.modules()
            if isinstance(module, torch.nn.Dropout) and module.p
        ]
        assert dropouts and all(module.training == drops for module in dropouts)


def test_frozen_layers_of_a_tuned_part_have_no_dropout(
    tiny_model: Callable, tiny_run_recipe: Callable, mixture: object, tmp_path: Path
) -> None:
    model, processor = tiny_model("phi")
    recipe = tiny_run_recipe(
        "stages.finetune.max_steps=1", "stages.finetune.tuning.language_model=last-1"
    )
    stage = recipe.stages["finetune"]
    apply_tuning(model, stage.tuning)
    steps = StepDataset(mixture, processor, stage, seed=0)
    run_stage(Stage(Run(tmp_path), recipe, "finetune", HERE), model, steps)
    drops = [layer.resid_dropout.training for layer in model.model.language_model.layers]
    assert drops == [False, True]


@pytest.fixture(scope="module")
def mixture(tiny_run_recipe: Callable) -> object:
    from mipha.data.mixture import Mixture

    return Mixture(tiny_run_recipe().stages["finetune"].data)


def test_a_run_whose_newest_state_is_torn_ends_in_the_same_weights(
    tiny_run_recipe: Callable,
    tmp_path: Path,
    weights: Callable,
    metrics: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe: Recipe = tiny_run_recipe("stages.finetune.checkpoint_every=1")
    whole = train(recipe, tmp_path / "whole")
    saves = []

    def stop_after_four(self: StateWriter, step: int, *state) -> None:
        save(self, step, *state)
        saves.append(step)
        if len(saves) == 1 + 4:  # pretrain saves after its second and last step
            os.kill(os.getpid(), signal.SIGTERM)

    save = StateWriter.save
    monkeypatch.setattr(StateWriter, "save", stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "torn")
    monkeypatch.undo()
    run = Run(tmp_path / "torn")
    *_, before, newest = list_states(run.states("finetune"))

    # A state of a step that the stage does not have is no finished stage.
    (newest / "position.json").write_text('{"step": 99, "seed": 0}')
    (newest / "manifest.json").unlink()
    seal_state(newest)
    with pytest.raises(ValueError, match=r"is of step 99, and this stage has 6: delete"):
        train(recipe, run.folder)

    for path in newest.glob("*.distcp"):
        os.truncate(path, path.stat().st_size - 1)
    assert list_states(run.states("finetune"))[-1] == before
    train(recipe, run.folder)
    mine, theirs = weights(run.final_checkpoint()), weights(whole.final_checkpoint())
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert [row["step"] for row in metrics(run.metrics("finetune"))] == [1, 2, 3, 4, 5, 6]


def test_each_part_has_its_own_rate(tiny_model: Callable, tiny_run_recipe: Callable) -> None:
    model, _ = tiny_model()
    rates = ("part_learning_rates={vision_tower: 2e-6}", "learning_rate=1e-3")
    stage = tiny_run_recipe(*(f"stages.finetune.{rate}" for rate in rates)).stages["finetune"]
    apply_tuning(model, stage.tuning)
    optimizer = make_optimizer(model, stage)
    set_learning_rates(optimizer, 0.5)
    assert {group["part"]: group["lr"] for group in optimizer.param_groups} == {
        "vision_tower": pytest.approx(1e-6),
        "projector": pytest.approx(5e-4),
        "language_model": pytest.approx(5e-4),
    }
    set_learning_rates(optimizer, 1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-6), "the peak is remembered"


def test_a_part_moves_at_its_own_rate(tiny_model: Callable, tiny_run_recipe: Callable) -> None:
    """Adam's first step is the learning rate in every weight that has a gradient."""
    model, _ = tiny_model()
    rates = ("part_learning_rates={projector: 1e-2}", "learning_rate=1e-4")
    stage = tiny_run_recipe(*(f"stages.finetune.{rate}" for rate in rates)).stages["finetune"]
    apply_tuning(model, stage.tuning)
    optimizer = make_optimizer(model, stage)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for part, rate in (("vision_tower", 1e-4), ("projector", 1e-2), ("language_model", 1e-4)):
        for name, parameter in part_parameters(model, part).items():
            if parameter.requires_grad:
                moved = (before[name] - parameter.detach()).flatten()
                assert torch.allclose(moved, torch.full_like(moved, rate), rtol=0.02), name


def test_only_what_trains_is_in_the_optimizer(
    tiny_model: Callable, tiny_run_recipe: Callable
) -> None:
    model, _ = tiny_model("qwen2")
    stage = tiny_run_recipe().stages["pretrain"]
    apply_tuning(model, stage.tuning)
    groups = make_optimizer(model, stage).param_groups
    assert [group["part"] for group in groups] == ["projector"]
    assert set(map(id, groups[0]["params"])) == set(
        map(id, model.model.multi_modal_projector.parameters())
    )


def test_the_settings_reach_adam(tiny_model: Callable, tiny_run_recipe: Callable) -> None:
    model, _ = tiny_model()
    changes = ("adam_betas=[0.8, 0.95]", "adam_eps=1e-5", "weight_decay=0.1")
    stage = tiny_run_recipe(*(f"stages.finetune.{change}" for change in changes)).stages["finetune"]
    apply_tuning(model, stage.tuning)
    for group in make_optimizer(model, stage).param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-5, 0.1)


def test_tensorboard_has_every_step_once_after_a_stop(
    tiny_run_recipe: Callable, tmp_path: Path, metrics: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps behind the last state are made twice, and tracked once."""
    pytest.importorskip("tensorboard")
    recipe = tiny_run_recipe("stages.finetune.checkpoint_every=2", "stages.pretrain.max_steps=1")
    folder = tmp_path / "run"

    def kill_in_the_second(self: StateWriter, step: int, *state: Any) -> None:
        if step == 4:
            raise RuntimeError("killed")
        save(self, step, *state)

    save = StateWriter.save
    monkeypatch.setattr(StateWriter, "save", kill_in_the_second)
    with pytest.raises(RuntimeError, match="killed"):
        train(recipe, folder)
    assert len(metrics(Run(folder).metrics("finetune"))) == 4
    monkeypatch.undo()
    train(recipe, folder)
    rows = metrics(Run(folder).metrics("finetune"))
    for key in ("loss", "learning_rate/projector", "tokens"):
        assert _tensorboard(folder / "finetune", key) == [
            (row["step"], pytest.approx(row[key])) for row in rows
        ], key


def _tensorboard(stage: Path, key: str) -> list[tuple[int, float]]:
    """What is in the event files themselves, in the order of writing."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    events = [
        event
        for path in sorted((stage / "tensorboard").iterdir())
        for event in EventFileLoader(str(path)).Load()
    ]
    return [
        (event.step, value.tensor.float_val[0])
        for event in events
        for value in event.summary.value
        if value.tag == key
    ]
