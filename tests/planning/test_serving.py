"""What an answer takes: every kind of model is timed, and the layers left out are added."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mipha.models.build import skeleton
from mipha.models.modeling import MODELS, model_skeleton, tile_tokens
from mipha.planning import serving
from mipha.planning.serving import AnswerPlan, ServingPlan, plan_serving

KINDS: dict[str, dict[str, Any]] = {
    "square": {},
    "shuffled": {"image": "tiles", "shuffle": 2},
    "native": {"image": "native", "min_image_tokens": 2, "max_image_tokens": 12},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_timed(tiny_parts, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "measure_reading", lambda: 1e9)  # half a gigabyte else
    monkeypatch.setattr(serving, "_MEASURED_BYTES", 1.0)  # two depths
    model = skeleton(tiny_parts().recipe(**KINDS[kind]))
    plan = plan_serving(model, torch.float32, (3, 70, 3))
    own = tile_tokens(model.config)[1]
    assert [answer.image_tokens for answer in plan.answers] == [own, 70, 3]
    assert plan.memory == 4 * sum(weight.numel() for weight in model.parameters())
    assert all(answer.rate_at_best > 0 and answer.at_best > 0 for answer in plan.answers)
    assert plan.answers[1].at_best > plan.answers[2].at_best, "more tokens are more work"


def of_a_list_of_layers(config: dict[str, Any]) -> None:
    config["vision_feature_layer"] = [-1, -2]


def of_an_odd_table(config: dict[str, Any]) -> None:
    config["vision_config"]["num_patches"] = 49


@pytest.mark.parametrize(
    ("name", "change", "tokens"),
    [
        ("onevision-siglip-llama-cap2", lambda config: None, 16),
        ("next-siglip-qwen2", of_a_list_of_layers, 16),
        ("lfm2vl-llama-native", of_an_odd_table, 9),
    ],
)
def test_checkpoints_of_others_are_timed(
    name: str, change: Any, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "measure_reading", lambda: 1e9)
    source = Path(__file__).parents[1] / "fixtures" / "images" / name
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    plan = plan_serving(model_skeleton(folder), torch.float32, ())
    assert [answer.image_tokens for answer in plan.answers] == [tokens]


def test_a_model_of_another_class_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "smolvlm"}')
    with pytest.raises(ValueError, match="holds a 'smolvlm': give a model of the kinds llava, "):
        model_skeleton(tmp_path)


def test_layers_that_are_left_out_are_added(tiny_parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 1 s and 2 s a layer of text, 0.5 s a layer of the tower; 30 and 12 layers."""
    asked = []

    def times(config, dtype, depth, counts):
        asked.append(depth)
        text, tower = depth["text_config"], depth["vision_config"]
        return serving._Times(
            0.5 * tower, [1 + 2.0 * text] * len(counts), [text / 10] * len(counts)
        )

    config = skeleton(tiny_parts().recipe()).config
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = 30, 12
    with torch.device("meta"):
        model = MODELS["llava"](config)
    monkeypatch.setattr(serving, "_time_answers", times)
    monkeypatch.setattr(serving, "measure_reading", lambda: 1e9)
    monkeypatch.setattr(serving, "_MEASURED_BYTES", serving._num_bytes(model, torch.float32) / 3)
    plan = plan_serving(model, torch.float32, ())
    assert [depth["text_config"] for depth in asked] == [10, 3]
    assert plan.tower == pytest.approx(6.0)
    assert plan.answers[0].first_token == pytest.approx(6 + 61)
    assert plan.answers[0].tokens_per_second == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (9, "as it is"),
        (5, "196 image tokens in place of 729"),
        (2.5, "no number of image tokens"),
        (1, "the vision tower alone takes 2 s"),
    ],
)
def test_a_wished_time_names_the_change(seconds: float, said: str) -> None:
    answers = tuple(
        AnswerPlan(count, first, 1.0, 5.0, 6.0)
        for count, first in ((729, 8.0), (196, 4.0), (81, 3.5), (64, 3.2))
    )
    assert said in ServingPlan(torch.float32, 1, 2.0, 1e9, answers).fewest_changes(seconds)
