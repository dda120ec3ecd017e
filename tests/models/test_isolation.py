"""Samples of one row never see one another: each sample of a packed row computes the same alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlavaProcessor

from mipha.data.collate import collate
from mipha.data.encode import encode
from mipha.data.packing import Row, make_rows
from mipha.data.sample import IMAGE, Message, Sample
from mipha.models.attention import SEGMENTS, dense_mask
from mipha.models.modeling import LlavaForConditionalGeneration

ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager", SEGMENTS])
BATCHING = pytest.mark.parametrize("batching", ["padded", "packed", "shared-image"])


@pytest.fixture
def samples(tiny_data: Path) -> list[Sample]:
    """Three questions about one image, one about another, one without: of different lengths."""
    first, second = tiny_data.parent / "0.png", tiny_data.parent / "1.png"
    about = [
        (first, "Which colour?", "It is red."),
        (first, "Is it a circle, a square or a triangle?", "a square"),
        (None, "yes or no?", "no"),
    ]
    about += [
        (second, "Which shape is it?", "A blue triangle is in the picture."),
        (first, "left or right?", "left"),
    ]
    return [conversation(f"s{number}", *facts) for number, facts in enumerate(about)]


@ATTENTION
@BATCHING
def test_rows_give_what_samples_give_alone(
    tiny_model: Callable, family: str, attention: str, batching: str, samples: list[Sample]
) -> None:
    model, processor = tiny_model(family)
    model.set_attn_implementation({"text_config": attention})
    encoded = [encode(sample, processor, 200) for sample in samples]
    by_one = [make_rows([sample], 200, "padded") for sample in encoded]
    alone, alone_gradients = losses_and_gradients(model, processor, by_one)
    rows = make_rows(encoded, 200, batching)
    assert (sum(map(len, rows)) < sum(map(len, encoded))) == (batching == "shared-image")
    assert (len(rows) < len(samples)) == (batching != "padded")
    together, gradients = losses_and_gradients(model, processor, [rows])
    assert sum(together) == pytest.approx(sum(alone), rel=1e-5)
    typical = torch.stack([gradient.norm() for gradient in alone_gradients.values()]).median()
    for name, gradient in gradients.items():
        # A key's bias has no true gradient, only rounding: so not below a tenth of the typical one.
        difference = (gradient - alone_gradients[name]).norm() / alone_gradients[name].norm().clamp(
            min=0.1 * typical
        )
        assert difference < 1e-5, (name, difference)


def test_the_comparison_sees_a_leak(tiny_model: Callable, samples: list[Sample]) -> None:
    """Without isolation the loss is another one, so the tests above would see it break."""
    model, processor = tiny_model()
    batch = collate(
        make_rows([encode(sample, processor, 200) for sample in samples], 300, "packed"), processor
    )
    right = model(**batch).loss_sum
    leaked = model(
        **{key: value for key, value in batch.items() if key != "spans"} | {"position_ids": None}
    ).loss_sum
    assert abs(right - leaked) / right > 1e-3


@ATTENTION
@pytest.mark.parametrize("batching", ["packed", "shared-image"])
def test_a_sample_does_not_hear_its_neighbour(
    tiny_model: Callable,
    family: str,
    attention: str,
    batching: str,
    samples: list[Sample],
) -> None:
    model, processor = tiny_model(family)
    model.set_attn_implementation({"text_config": attention})
    other = [
        conversation("s0", samples[0].images[0], "grey grey grey?", "It is no red circle."),
        *samples[1:],
    ]
    caches: tuple[dict, ...] = ({}, {"use_cache": True}, {"use_cache": False})
    kept = []
    for version in (samples, other):
        encoded = [encode(sample, processor, 200) for sample in version]
        # Only the neighbours are trained on: what the first says may change nothing.
        encoded[0] = replace(encoded[0], labels=encoded[0].labels * 0 - 100)
        batch = collate(make_rows(encoded, 300, batching), processor)
        assert max(map(len, batch["spans"])) > 1
        with torch.no_grad():
            kept.append([model(**batch, **cache).loss_sum.item() for cache in caches])
    assert kept[0] == pytest.approx(kept[1], rel=1e-5)
    with torch.no_grad():
        rows = [
            make_rows([encode(sample, processor, 200) for sample in version], 300, batching)
            for version in (samples, other)
        ]
        whole = [model(**collate(version, processor)).loss_sum for version in rows]
    assert abs(whole[0] - whole[1]) > 1e-2, "the two versions do differ"


def test_a_shared_image_is_read_once(tiny_model: Callable, samples: list[Sample]) -> None:
    _, processor = tiny_model()
    encoded = [encode(sample, processor, 200) for sample in samples]
    assert len(collate(make_rows(encoded, 300, "packed"), processor)["pixel_values"]) == 4
    assert len(collate(make_rows(encoded, 300, "shared-image"), processor)["pixel_values"]) == 2


def test_the_image_reaches_its_own_sample(
    tiny_model: Callable, samples: list[Sample], tiny_data: Path
) -> None:
    """Another picture for one sample changes that sample's loss and no other's."""
    model, processor = tiny_model()
    changed = [*samples[:3], replace(samples[3], images=(tiny_data.parent / "5.png",)), samples[4]]
    for batching in ("packed", "shared-image"):
        for trained, same in ((3, False), (0, True), (2, True)):
            found = []
            for version in (samples, changed):
                encoded = [encode(sample, processor, 200) for sample in version]
                encoded = [
                    e if i == trained else replace(e, labels=e.labels * 0 - 100)
                    for i, e in enumerate(encoded)
                ]
                with torch.no_grad():
                    found.append(
                        model(
                            **collate(make_rows(encoded, 300, batching), processor)
                        ).loss_sum.item()
                    )
            assert (found[0] == pytest.approx(found[1], rel=1e-5)) == same, (
                batching,
                trained,
                found,
            )


@ATTENTION
def test_isolation_holds_in_bfloat16(
    tiny_model: Callable, attention: str, samples: list[Sample]
) -> None:
    model, processor = tiny_model()
    model.set_attn_implementation({"text_config": attention})
    encoded = [encode(sample, processor, 200) for sample in samples]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = sum(
            losses_and_gradients(
                model, processor, [make_rows([sample], 200, "padded") for sample in encoded]
            )[0]
        )
        together, gradients = losses_and_gradients(
            model, processor, [make_rows(encoded, 200, "packed")]
        )
    assert together[0] == pytest.approx(alone, rel=5e-3)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("labels", [True, False], ids=["loss", "logits"])
def test_a_packed_row_without_its_description_is_refused(
    tiny_model: Callable, family: str, labels: bool, samples: list[Sample]
) -> None:
    model, processor = tiny_model(family)
    encoded = [encode(sample, processor, 200) for sample in samples]
    dropped = {"spans"} if labels else {"spans", "labels"}
    for batching in ("packed", "shared-image"):
        batch = collate(make_rows(encoded, 300, batching), processor)
        bare = {key: value for key, value in batch.items() if key not in dropped}
        ones = torch.ones_like(batch["input_ids"])
        for mask in (None, ones):
            with pytest.raises(
                ValueError, match=r"position_ids restart.*give the model the `spans`"
            ):
                model(**bare, attention_mask=mask)

        # A mask of four axes says it all too; padding in front is no second sample.
        mask = dense_mask(batch["spans"], ones.shape[1])
        model(**bare, attention_mask=mask)
    padded = torch.tensor([[0, 0, 1, 1, 1]])
    model(
        input_ids=torch.tensor([[5, 5, 6, 7, 8]]),
        attention_mask=padded,
        position_ids=torch.tensor([[1, 1, 0, 1, 2]]),
    )


def test_attention_that_cannot_isolate_is_refused(
    tiny_model: Callable, samples: list[Sample]
) -> None:
    model, processor = tiny_model()
    encoded = [encode(sample, processor, 200) for sample in samples]
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2' cannot keep .* apart: choose sdpa"):
        model(**collate(make_rows(encoded, 300, "packed"), processor))


def test_spans_of_another_batch_are_refused(tiny_model: Callable, samples: list[Sample]) -> None:
    model, processor = tiny_model()
    encoded = [encode(sample, processor, 200) for sample in samples]
    batch = collate(make_rows(encoded, 300, "packed"), processor)
    for spans in (batch["spans"] * 2, (((False, 1000),),)):
        with pytest.raises(ValueError, match="give the spans that `collate` made for it"):
            model(**batch | {"spans": spans})


def test_logits_of_a_packed_row_are_those_of_its_samples(
    tiny_model: Callable, family: str, samples: list[Sample]
) -> None:
    model, processor = tiny_model(family)
    model.set_attn_implementation({"text_config": SEGMENTS})
    encoded = [encode(sample, processor, 200) for sample in samples[:2]]
    batch = collate(make_rows(encoded, 300, "packed"), processor)
    del batch["labels"]
    (row,) = batch["spans"]
    with torch.no_grad():
        together = model(**batch).logits[0]
        for start, sample in zip(
            (0, row[0][1]), sorted(encoded, key=len, reverse=True), strict=True
        ):
            own = collate(make_rows([sample], 300, "padded"), processor)
            del own["labels"]
            alone = model(**own).logits[0]
            torch.testing.assert_close(
                together[start : start + len(sample)], alone, rtol=1e-4, atol=1e-4
            )


def conversation(name: str, image: Path | None, question: str, answer: str) -> Sample:
    text = question if image is None else f"{IMAGE}\n{question}"
    return Sample(
        name,
        (Message("user", text), Message("assistant", answer)),
        () if image is None else (image,),
    )


def losses_and_gradients(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    batches: Sequence[Sequence[Row]],
) -> tuple[list[float], dict[str, torch.Tensor]]:
    model.zero_grad()
    losses = []
    for rows in batches:
        output = model(**collate(rows, processor))
        output.loss_sum.backward()
        losses.append(output.loss_sum.item())
    return losses, {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
