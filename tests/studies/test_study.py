"""A study file becomes variants, which are recipes; a file that cannot be meant is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from mipha.catalog.full_size import part_config
from mipha.recipe import PARTS, load_recipe
from mipha.studies.study import list_studies, load_study

CLAIM = {"claim": "c", "source": "s"}


@pytest.fixture
def written(tmp_path: Path):
    """Write a study with some keys replaced, and load it."""

    def write(**changes: Any):
        axes = {"tuned": {"projector": ["stages.finetune.tuning.language_model=frozen"], "all": []}}
        scale = {
            "recipe": "easy-vqa-mini",
            "axes": axes,
            "evaluate": [{"benchmark": "easy_vqa", "limit": 4}],
        } | changes.pop("scale", {})
        tree = {
            "name": "own",
            "title": "Own",
            "source": "none",
            "scales": {"mini": scale},
        } | changes
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return load_study(path)

    return write


@pytest.mark.parametrize("name", list_studies())
def test_every_study_of_the_catalog_has_its_variants_at_each_scale(name: str) -> None:
    study = load_study(name)
    assert study.name == name and all(scale.takeaways for scale in study.scales.values())
    names = {
        scale: [variant.name for variant in study.at(scale).variants] for scale in study.scales
    }
    assert set(names) == {"mini", "paper"}
    assert study.scales["mini"].seeds >= 3 and "paper" in study.scales["mini"].note


@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_the_variants_of_lora_change_one_thing_at_a_time(scale: str) -> None:
    variants = load_study("lora").at(scale).variants
    for before, after in itertools.pairwise(variants):
        changed = {
            part
            for part in PARTS
            if before.recipe.stages["finetune"].tuning.of(part)
            != after.recipe.stages["finetune"].tuning.of(part)
        }
        rates = {
            part
            for part in PARTS
            if before.recipe.stages["finetune"].peak_learning_rate(part)
            != after.recipe.stages["finetune"].peak_learning_rate(part)
            and after.recipe.stages["finetune"].tuning.of(part) != "frozen"
        }
        assert len(changed) + len(rates) == 1, (before.name, after.name, changed, rates)
        others = before.recipe.differences(after.recipe).keys()
        assert all("tuning" in key or "learning_rate" in key for key in others)


def test_the_towers_that_are_compared_at_paper_scale_are_of_one_size() -> None:
    configs = [
        part_config(variant.recipe.model.vision_tower)
        for variant in load_study("vision-tower").at("paper").variants
    ]
    assert {(config["hidden_size"], config["num_hidden_layers"]) for config in configs} == {
        (1024, 24)
    }
    sizes = [
        variant.recipe.model.image_size
        for variant in load_study("vision-tower").at("paper").variants
    ]
    tokens = {
        (size // config["patch_size"]) ** 2 for size, config in zip(sizes, configs, strict=True)
    }
    assert tokens == {576}


def test_siglip_is_compared_at_the_sizes_of_figure_6() -> None:
    variants = load_study("siglip-resolution").at("paper").variants
    assert [variant.recipe.model.image_size for variant in variants] == [384, 448]
    assert {variant.recipe.model.vision_tower for variant in variants} == {"siglip-so400m-384"}


def test_variants_are_the_combinations_of_all_axes(written) -> None:
    axes = {
        "tuned": {"projector": ["stages.finetune.tuning.language_model=frozen"], "all": []},
        "rate": {"key": "stages.finetune.learning_rate", "values": [1e-4, 1e-3]},
    }
    variants = written(scale={"axes": axes}).at("mini").variants
    assert [(variant.name, variant.number) for variant in variants] == [
        ("projector-rate=0.0001", 1e-4),
        ("projector-rate=0.001", 1e-3),
        ("all-rate=0.0001", 1e-4),
        ("all-rate=0.001", 1e-3),
    ]
    assert variants[1].recipe.stages["finetune"].learning_rate == 1e-3
    assert variants[1].recipe.stages["finetune"].tuning.language_model == "frozen"
    assert variants[2].with_seed(3).seed == load_recipe("easy-vqa-mini").seed + 3


def test_a_first_stage_is_shared_exactly_where_it_is_the_same() -> None:
    recipe = load_recipe("easy-vqa-mini")
    same = recipe.override("stages.finetune.learning_rate=3e-4", "name=other")
    assert same.stage_digest("pretrain") == recipe.stage_digest("pretrain")
    assert same.stage_digest("finetune") != recipe.stage_digest("finetune")
    for change in (
        "seed=1",
        "precision=float32",
        "model.feature_layer=8",
        "stages.pretrain.learning_rate=1e-3",
    ):
        changed = recipe.override(change)
        assert changed.stage_digest("pretrain") != recipe.stage_digest("pretrain"), change


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"scale": {"axes": {"a": {"x": ["stages.finetune.learning_rte=1"]}}}},
            r"(?s)variant x: .*learning_rte: unknown key; did you mean",
        ),
        (
            {"scale": {"axes": {"a": {"x": [], "y": ["seed=0"]}}}},
            "variants x and y are the same: remove one",
        ),
        (
            {"scale": {"takeaways": [{**CLAIM, "better": "al", "than": "projector"}]}},
            "no variant 'al'; did you mean all",
        ),
        (
            {"scale": {"takeaways": [{**CLAIM, "better": "all", "on_par": ["all", "projector"]}]}},
            "exactly one of better",
        ),
        ({"scale": {"takeaways": [{**CLAIM, "better": "all"}]}}, "`than` goes with better"),
        (
            {"scale": {"beside": {"table": 1, "rows": {"al": "Phi-2-2.7B"}}}},
            "`beside` names no variant 'al'; did you mean all",
        ),
        (
            {"scale": {"beside": {"table": 1, "rows": {"all": "Phi-2"}}}},
            "table 1 of the paper has no row 'Phi-2'; did you mean Phi-2-2.7B",
        ),
        ({"titel": "x"}, "titel: unknown key; did you mean title"),
    ],
)
def test_what_cannot_be_meant_is_refused(written, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        written(**changes).at("mini")


def test_unknown_names_are_told() -> None:
    with pytest.raises(FileNotFoundError, match="no study 'freezin': did you mean freezing"):
        load_study("freezin")
    with pytest.raises(
        ValueError, match="study 'freezing' has no scale 'papr': did you mean paper"
    ):
        load_study("freezing").at("papr")


def test_the_digest_is_of_what_is_trained_and_measured(written) -> None:
    study = written()
    assert written(title="Other words").at("mini").digest() == study.at("mini").digest()
    assert written(scale={"seeds": 5, "note": "n"}).at("mini").digest() == study.at("mini").digest()
    assert (
        written(scale={"overrides": ["stages.finetune.max_steps=3"]}).at("mini").digest()
        != study.at("mini").digest()
    )
    assert (
        written(scale={"evaluate": [{"benchmark": "easy_vqa", "limit": 5}]}).at("mini").digest()
        != study.at("mini").digest()
    )


def test_a_study_is_overridden_like_a_recipe(written) -> None:
    study = written()
    changed = study.override(
        "scales.mini.seeds=5",
        "scales.mini.evaluate.limit=9",
        "scales.mini.axes.tuned.low=[stages.finetune.learning_rate=1e-6]",
    )
    asked = changed.at("mini").asked
    assert (asked.seeds, asked.evaluate[0].limit) == (5, 9)
    assert [variant.name for variant in changed.at("mini").variants] == ["projector", "all", "low"]
    with pytest.raises(ValueError, match=r"scales\.mini\.sedes: unknown key; did you mean seeds"):
        study.override("scales.mini.sedes=5")


def test_an_override_of_a_stage_that_the_base_recipe_lacks_names_its_stages(written) -> None:
    study = written(scale={"overrides": ["stages.fintune.max_steps=3"]})
    with pytest.raises(ValueError, match="no stage 'fintune': did you mean finetune"):
        study.at("mini")
