"""Steps are a pure function of their number: the same samples whoever asks, dealt to as many
processes as there are.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaProcessor

from mipha.data.batches import StepDataset, deal
from mipha.data.collate import to_device
from mipha.data.mixture import Mixture
from mipha.data.packing import Row
from mipha.recipe import DataRecipe, StageRecipe

FINETUNE = "stages.finetune."


@pytest.fixture(scope="module")
def processor(tiny_model: Callable) -> LlavaProcessor:
    return tiny_model()[1]


@pytest.fixture(scope="module")
def stage(tiny_run_recipe: Callable) -> Callable[..., StageRecipe]:
    return lambda *changes: tiny_run_recipe(
        "stages.finetune.max_steps=null", *(FINETUNE + change for change in changes)
    ).stages["finetune"]


@pytest.fixture(scope="module")
def mixture(stage: Callable) -> Mixture:
    return Mixture(stage().data)


def supervised(step) -> list[int]:
    """The ids that are trained on, sorted: the same whatever the rows."""
    return sorted(
        label
        for batch in step.micro_batches
        for label in batch["labels"][:, 1:].flatten().tolist()
        if label != -100
    )


def test_an_epoch_holds_every_sample_once(
    mixture: Mixture, processor: LlavaProcessor, stage: Callable
) -> None:
    steps = StepDataset(mixture, processor, stage("epochs=3", "batch_size=5"), seed=0)
    names = [name for step in steps for name in step.ids]
    assert len(steps) == 15 and len(names) == 72
    for epoch in range(3):
        assert len(set(names[24 * epoch : 24 * (epoch + 1)])) == 24
    assert names[:24] != names[24:48], "each epoch has an order of its own"


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps", "samples"),
    [(0.5, "null", 2, 12), (1.4, "null", 6, 34), (2, 3, 3, 18), (0.01, "null", 1, 1)],
)
def test_epochs_and_max_steps(
    mixture: Mixture,
    processor: LlavaProcessor,
    stage: Callable,
    epochs: float,
    max_steps: object,
    steps: int,
    samples: int,
) -> None:
    made = StepDataset(
        mixture, processor, stage(f"epochs={epochs}", f"max_steps={max_steps}"), seed=0
    )
    assert len(made) == steps
    assert sum(len(made[number].ids) for number in range(steps)) == samples
    with pytest.raises(IndexError):
        made[steps]


@pytest.mark.parametrize("batching", ["padded", "packed", "shared-image"])
def test_a_step_does_not_depend_on_the_steps_before(
    mixture: Mixture, processor: LlavaProcessor, stage: Callable, batching: str
) -> None:
    recipe = stage(f"batching={batching}")
    read_through = list(StepDataset(mixture, processor, recipe, seed=3))
    for number in (5, 2):
        alone = StepDataset(mixture, processor, recipe, seed=3)[number]
        assert alone.ids == read_through[number].ids
        for batch, other in zip(
            alone.micro_batches, read_through[number].micro_batches, strict=True
        ):
            assert batch.keys() == other.keys()
            assert batch.pop("spans") == other.pop("spans")
            assert all(torch.equal(batch[key], other[key]) for key in batch)


@pytest.mark.parametrize("batching", ["packed", "shared-image"])
def test_images_are_read_for_their_keys_once_before_workers_begin(
    processor: LlavaProcessor, stage: Callable, batching: str
) -> None:
    """Each worker would read all images of the set again."""
    mixture = Mixture(stage().data)
    StepDataset(mixture, processor, stage(f"batching={batching}"), seed=0)
    assert ("image_keys" in vars(mixture)) == (batching == "shared-image")


def test_another_seed_is_another_order(
    mixture: Mixture, processor: LlavaProcessor, stage: Callable
) -> None:
    assert (
        StepDataset(mixture, processor, stage(), seed=0)[0].ids
        != StepDataset(mixture, processor, stage(), seed=1)[0].ids
    )


@pytest.mark.parametrize("batching", ["padded", "packed", "shared-image"])
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_the_processes_share_out_what_one_would_do(
    mixture: Mixture, processor: LlavaProcessor, stage: Callable, batching: str, world_size: int
) -> None:
    recipe = stage(f"batching={batching}", "micro_batch_rows=2")
    alone = StepDataset(mixture, processor, recipe, seed=0)
    together = [
        StepDataset(mixture, processor, recipe, seed=0, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for number in range(len(alone)):
        one, shares = alone[number], [steps[number] for steps in together]
        assert sorted(label for share in shares for label in supervised(share)) == supervised(one)
        assert one.num_supervised == len(supervised(one))
        assert len({len(share.micro_batches) for share in shares}) == 1, (
            "as many forward passes on each"
        )
        for share in shares:
            assert (share.ids, share.num_tokens, share.num_supervised, share.num_images) == (
                one.ids,
                one.num_tokens,
                one.num_supervised,
                one.num_images,
            )
            assert all("pixel_values" in batch for batch in share.micro_batches), (
                "the tower runs in every pass of every process"
            )


def test_a_step_without_images_gets_one_blank(
    tiny_data: Path, processor: LlavaProcessor, stage: Callable, tmp_path: Path
) -> None:
    """So that the tower's tensors have a gradient, which is zero, on one process as on several."""
    lines = [line for line in tiny_data.read_text().splitlines() if not json.loads(line)["images"]]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    text_only = stage(f"data.root={tmp_path / 'text.jsonl'}").data
    step = StepDataset(
        Mixture(text_only),
        processor,
        stage("batching=padded", "micro_batch_rows=2", "batch_size=6"),
        seed=0,
    )[0]
    assert len(step.micro_batches) == 3
    assert ["pixel_values" in batch for batch in step.micro_batches] == [True, False, False]
    assert step.num_images == 0
    assert (step.micro_batches[0]["labels"][-1] == -100).all(), "nothing is learnt from it"


def test_the_counts_are_of_what_is_computed(
    mixture: Mixture, processor: LlavaProcessor, stage: Callable
) -> None:
    for changes in (
        ("batching=padded", "micro_batch_rows=3"),
        ("batching=packed",),
        ("batching=shared-image",),
    ):
        for step in StepDataset(mixture, processor, stage(*changes), seed=0):
            computed = sum(batch["input_ids"].numel() for batch in step.micro_batches)
            assert step.num_padded == computed
            assert step.num_tokens <= computed
            assert step.num_images == sum(
                len(batch.get("pixel_values", ())) for batch in step.micro_batches
            )
            assert step.num_truncated == 0


def test_truncated_samples_are_counted(
    mixture: Mixture, processor: LlavaProcessor, stage: Callable
) -> None:
    long = max(
        len(sample)
        for step in range(4)
        for sample in StepDataset(mixture, processor, stage(), seed=0).samples(step)
    )
    steps = StepDataset(mixture, processor, stage(f"row_tokens={long - 1}"), seed=0)
    assert sum(steps[number].num_truncated for number in range(4)) >= 1


def test_deal_gives_each_process_a_row_in_turn_the_one_with_the_least_the_most() -> None:
    rows = [row(length) for length in (9, 7, 6, 5, 4, 2)]
    dealt = deal(rows, 2)
    assert [[len(one) for one in own] for own in dealt] == [[9, 5, 2], [7, 6, 4]]
    assert deal(rows[:1], 3) == [[rows[0]], [], []]
    assert all(len(a) >= len(b) for own in dealt for a, b in pairwise(own)), (
        "longest first, so that padding stays small"
    )
    unsorted = [row(length) for length in (3, 8, 5)]
    assert deal(unsorted, 1) == [unsorted], "the order of one process is that of its rows"


@pytest.mark.parametrize("world_size", [2, 8])
@pytest.mark.parametrize(("spread", "alike"), [(0.15, True), (0.4, True), (0.8, False)])
def test_rows_dealt_by_work_end_sooner_than_rows_dealt_by_tokens(
    spread: float, alike: bool, world_size: int
) -> None:
    """Squares of lengths and images are work too; processes wait for the one with the most."""
    random = np.random.default_rng(0)
    by_tokens, by_work = [], []
    for _ in range(20):
        lengths = sorted(random.lognormal(5.5, spread, 60).astype(int) + 9, reverse=True)
        rows = [row(length, int(random.integers(0, 3))) for length in lengths]
        dealt = deal(rows, world_size, work)

        given = [id(one) for own in dealt for one in own]
        assert sorted(given) == sorted(map(id, rows)), "each row once"
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
        assert dealt == deal(rows, world_size, work), "the same answer on every process"
        by_work.append(waiting(dealt))
        by_tokens.append(waiting(fewest_tokens(rows, world_size)))

    # The time, with a meeting at every row. The most work of a process, too, where rows are alike,
    # as packed ones are; a row of a third of all work has others beside it all the same.
    ours, theirs = np.mean(by_work, axis=0), np.mean(by_tokens, axis=0)
    assert ours[1] < theirs[1]
    assert ours[0] < theirs[0] or not alike


def work(row: Row) -> float:
    return 100 * len(row) + row.num_pairs + 20_000 * row.num_tiles


def waiting(dealt: list[list[Row]]) -> tuple[float, float]:
    """Return the largest share of the work, and the time of rows side by side, over the mean."""
    shares = [[work(one) for one in own] for own in dealt]
    mean = sum(map(sum, shares)) / len(shares)
    rounds = [max(turn) for turn in zip_longest(*shares, fillvalue=0.0)]
    return max(map(sum, shares)) / mean, sum(rounds) / mean


def fewest_tokens(rows: list[Row], world_size: int) -> list[list[Row]]:
    """Give each row, longest first, to the process with the fewest tokens so far."""
    dealt: list[list[Row]] = [[] for _ in range(world_size)]
    for one in rows:
        min(dealt, key=lambda own: sum(map(len, own))).append(one)
    return dealt


def row(length: int, tiles: int = 0) -> Row:
    ones = np.ones(length, dtype=np.int64)
    spans = ((False, length),)
    return Row(("a",), ones, ones, np.arange(length), spans, (), (), (), tiles)


def test_micro_batches_are_what_a_model_takes(
    mixture: Mixture, processor: LlavaProcessor, stage: Callable
) -> None:
    batch = StepDataset(mixture, processor, stage(), seed=0)[0].micro_batches[0]
    assert set(batch) <= {
        "input_ids",
        "labels",
        "position_ids",
        "pixel_values",
        "pixel_scaling",
        "spans",
        "supervised",
    }
    assert batch["pixel_values"].dtype == torch.uint8
    assert set(to_device(batch, "cpu")) == set(batch) - {"pixel_scaling"}
    assert all(isinstance(batch[key], Tensor) for key in batch if key != "spans")
    assert all(
        sum(tokens for _, tokens in row) <= batch["input_ids"].shape[1] for row in batch["spans"]
    )


@pytest.mark.gpu
def test_a_gpu_copies_steps_from_pinned_memory(
    mixture: Mixture, processor: LlavaProcessor, stage: Callable
) -> None:
    step = StepDataset(mixture, processor, stage(), seed=0)[0]
    for batch, pinned in zip(step.micro_batches, step.pin_memory().micro_batches, strict=True):
        assert pinned["spans"] == batch["spans"]
        assert all(value.is_pinned() for value in pinned.values() if isinstance(value, Tensor))
        moved, wanted = to_device(pinned, "cuda"), to_device(batch, "cpu")
        assert torch.equal(moved["pixel_values"].cpu(), wanted["pixel_values"])


def test_weights_and_caps_decide_what_an_epoch_shows(
    tiny_data: Path, processor: LlavaProcessor, stage: Callable
) -> None:
    recipe = stage("epochs=2", "batch_size=5", "max_steps=null")
    (data,) = recipe.data
    mixture = Mixture((data.model_copy(update={"weight": 0.5}), data.model_copy(update={"cap": 3})))
    steps = StepDataset(mixture, processor, recipe, seed=0)
    assert mixture.num_per_epoch == 15 and len(steps) == 6
    counts = [step.sources for step in steps]
    assert [sum(of_step.values()) for of_step in counts] == [5] * 6
    first, second = counts[0]
    assert (sum(c[first] for c in counts[:3]), sum(c[second] for c in counts[:3])) == (12, 3)
    halves = [
        {index for number in epoch for index in steps.indices(number) if index < 24}
        for epoch in (range(3), range(3, 6))
    ]
    assert halves[0] | halves[1] == set(range(24)) and not halves[0] & halves[1], (
        "the other half in the next epoch"
    )


def test_rows_with_the_same_picture_inside_share_its_tokens(
    processor: LlavaProcessor, stage: Callable, tmp_path: Path
) -> None:
    """Four rows of a table hold a picture each, and two of the pictures are one."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    pictures = []
    for colour in ("red", "blue", "red", "green"):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), colour).save(buffer, "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    columns = {"image": pictures, "question": list("abcd"), "answer": list("efgh")}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=1)

    mixture = Mixture([DataRecipe(dataset="parquet", root=tmp_path / "a.parquet")])
    keys = mixture.image_keys
    assert keys[0] == keys[2] and len(set(keys.tolist())) == 3
    for batching, num_images in (("packed", 4), ("shared-image", 3)):
        settings = stage(f"batching={batching}", "batch_size=4", "row_tokens=64")
        step = StepDataset(mixture, processor, settings, seed=0)[0]
        assert (step.num_images, len(step.ids)) == (num_images, 4)
