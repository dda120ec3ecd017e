"""What a policy wrote, where it ends, and that padding changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mipha.alignment.rollout import Sampler, mark_responses

END, PAD = 2, 0


@pytest.mark.parametrize("pad", [PAD, END], ids=["own padding", "padding is the end"])
def test_a_response_ends_with_its_first_end_or_at_the_last_column(pad: int) -> None:
    ids = torch.tensor(
        [
            [pad, 5, 7, 8, END, pad, pad],
            [5, 6, 7, 8, 9, 7, 8],
            [5, 6, 7, END, pad, pad, pad],
            [5, 6, 7, 8, 9, 9, END],
        ]
    )
    attention = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
    rollout = mark_responses(ids, attention, {END})
    assert rollout.prompt_ids() == [[5, 7], [5, 6, 7], [5, 6, 7], [5, 6, 7]]
    assert rollout.response_ids() == [[8, END], [8, 9, 7, 8], [END], [8, 9, 9, END]]
    assert rollout.ended.tolist() == [True, False, True, True]
    assert rollout.attention.sum(1).tolist() == [4, 7, 4, 7]
    assert rollout.positions[0].tolist()[:4] == [0, 0, 1, 2]


@pytest.fixture(scope="module")
def model(tiny_parts: Callable):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_parts("llama").language_model).eval()


def test_a_prompt_is_continued_the_same_beside_a_longer_one(model) -> None:
    short, long = [11, 12], [20, 21, 22, 23, 24, 25]
    sampler = Sampler(model, 5, {END}, END, temperature=None)
    alone = sampler.sample([short])
    beside = sampler.sample([short, long])
    assert alone.response_ids()[0] == beside.response_ids()[0]
    assert beside.prompt_ids() == [short, long]
    hidden = [
        model.base_model(
            r.ids, attention_mask=r.attention, position_ids=r.positions
        ).last_hidden_state
        for r in (alone, beside)
    ]
    tokens = alone.mask[0].sum()
    torch.testing.assert_close(
        alone.before(hidden[0])[0, :tokens],
        beside.before(hidden[1])[0, :tokens],
        atol=1e-4,
        rtol=1e-4,
    )
    greedy = model.get_output_embeddings()(beside.before(hidden[1])).argmax(-1)
    assert (
        greedy[beside.mask].tolist() == beside.responses[beside.mask].tolist()
    )  # each state is the one before its token


def test_the_seed_decides_and_a_checkpoints_own_settings_do_not(model) -> None:
    def written() -> list[list[int]]:
        torch.manual_seed(3)
        return Sampler(model, 8, {END}, PAD).sample([[11, 12], [13]]).response_ids()

    first = written()
    model.generation_config.update(
        top_k=1, repetition_penalty=5.0, do_sample=False, max_new_tokens=1
    )
    assert written() == first
    assert model.generation_config.top_k == 1  # and they are as they were
