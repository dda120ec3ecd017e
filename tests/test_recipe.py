"""A recipe is strict: unknown, unfitting and ignored settings are errors that name the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mipha.recipe import PARTS, Recipe, list_recipes, load_recipe


def tree() -> dict[str, Any]:
    stage = {
        "data": {"dataset": "messages", "root": "a.jsonl"},
        "learning_rate": 1e-3,
        "batch_size": 8,
    }
    frozen = {"vision_tower": "frozen", "projector": "full", "language_model": "frozen"}
    return {
        "name": "small",
        "model": {
            "vision_tower": "dinov2-small",
            "language_model": "smollm2-135m",
            "chat_template": "chatml",
        },
        "stages": {
            "pretrain": stage | {"tuning": frozen},
            "finetune": stage | {"tuning": dict.fromkeys(frozen, "full")},
        },
    }


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.parse(tree(), "small")


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_of_the_catalog_loads_and_round_trips(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.dump())
    again = load_recipe(path)
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert again.dump() == recipe.dump()


def test_a_dump_writes_every_default_out(recipe: Recipe) -> None:
    written = yaml.safe_load(recipe.dump())
    assert written["stages"]["finetune"]["adam_betas"] == [0.9, 0.98]
    assert written["model"]["feature_layer"] == -2
    assert (
        written["stages"]["pretrain"].keys() == type(recipe.stages["pretrain"]).model_fields.keys()
    )


@pytest.mark.parametrize("batching", ["padded", "packed", "shared-image"])
def test_a_dump_of_any_batching_is_a_valid_recipe(recipe: Recipe, batching: str) -> None:
    """Defaults that are written out are not settings that would be ignored."""
    changed = recipe.override(f"stages.finetune.batching={batching}")
    assert Recipe.parse(yaml.safe_load(changed.dump()), "dumped") == changed
    assert changed.override("seed=3").seed == 3
    assert changed.stages["finetune"].bundle == (8 if batching == "shared-image" else None)


@given(
    seed=st.integers(0, 2**31),
    rate=st.floats(1e-9, 10),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    name=st.text(max_size=20),
    rates=st.dictionaries(st.sampled_from(PARTS), st.floats(1e-9, 1)),
)
def test_any_recipe_round_trips(
    seed: int, rate: float, betas: tuple[float, float], name: str, rates: dict
) -> None:
    plain = tree() | {"seed": seed, "name": name}
    plain["stages"]["finetune"] |= {
        "learning_rate": rate,
        "adam_betas": list(betas),
        "part_learning_rates": rates,
    }
    recipe = Recipe.parse(plain, "drawn")
    assert Recipe.parse(yaml.safe_load(recipe.dump()), "again") == recipe


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("seed=7", 7),
        ("name=other", "other"),
        ("stages.finetune.learning_rate=3e-3", 3e-3),
        ("stages.finetune.learning_rate=2E-4", 2e-4),
        ("stages.finetune.learning_rate=5.e-1", 0.5),
        ("stages.finetune.learning_rate=1", 1.0),
        ("stages.finetune.max_steps=20", 20),
        ("model.chat_template=null", None),
        ("stages.finetune.adam_betas=[0.9, 0.95]", (0.9, 0.95)),
        ("stages.finetune.part_learning_rates={vision_tower: 1e-6}", {"vision_tower": 1e-6}),
        ("stages.finetune.part_learning_rates.vision_tower=1e-6", {"vision_tower": 1e-6}),
        ("model.pad_to_square=false", False),
        ("model.image_size=70", 70),
        (" seed = 9 ", 9),
    ],
)
def test_an_override_replaces_one_value(recipe: Recipe, assignment: str, value: Any) -> None:
    changed = recipe.override(assignment)
    path = assignment.partition("=")[0].strip().split(".")
    found: Any = changed
    for key in path[: 4 if "rates" not in assignment else 3]:
        found = found[key] if isinstance(found, dict) else getattr(found, key)
    assert found == value and type(found) is type(value)
    assert changed.digest() != recipe.digest() or path == ["name"]
    was, now = recipe.model_dump(), changed.model_dump()
    for key in path[:-1]:
        was, now = was[key], now[key]
        if "rates" in key:
            return
    assert {key for key in was if was[key] != now[key]} == {path[-1]}


def test_overrides_apply_in_order_and_leave_the_first_alone(recipe: Recipe) -> None:
    assert recipe.override("seed=1", "seed=2").seed == 2
    assert recipe.seed == 0
    assert recipe.override() == recipe


@pytest.mark.parametrize(
    ("assignment", "dataset", "root"),
    [
        ("data.finetune=./x.jsonl", "auto", Path("x.jsonl")),
        ("data.finetune=/data/x.json", "auto", Path("/data/x.json")),
        ("data.finetune=easy_vqa", "easy_vqa", None),
        ("data.finetune={dataset: messages, root: x.jsonl}", "messages", Path("x.jsonl")),
        ("stages.finetune.data=my/x.jsonl", "auto", Path("my/x.jsonl")),
        ("data.finetune.0.root=y.jsonl", "messages", Path("y.jsonl")),
        ("stages.finetune.data.0.limit=5", "messages", Path("a.jsonl")),
        ("data.finetune.limit=5", "messages", Path("a.jsonl")),
    ],
)
def test_data_has_a_short_form(
    recipe: Recipe, assignment: str, dataset: str, root: Path | None
) -> None:
    changed = recipe.override(assignment)
    (data,) = changed.stages["finetune"].data
    assert (data.dataset, data.root) == (dataset, root)
    assert data.limit == (5 if "limit" in assignment else None)
    assert changed.stages["pretrain"] == recipe.stages["pretrain"]


def test_one_image_root_stands_for_a_list(recipe: Recipe) -> None:
    for text in ("/mnt/pictures", "[/mnt/pictures]"):
        changed = recipe.override(f"data.finetune.image_root={text}")
        assert changed.stages["finetune"].data[0].image_root == (Path("/mnt/pictures"),)
        assert Recipe.parse(yaml.safe_load(changed.dump()), "again") == changed
    assert recipe.stages["finetune"].data[0].image_root == ()
    assert recipe.override("data.finetune.image_root=[a, b]").stages["finetune"].data[
        0
    ].image_root == (Path("a"), Path("b"))


def test_several_data_sets(recipe: Recipe) -> None:
    changed = recipe.override(
        "data.finetune=[{dataset: messages, root: x.jsonl}, {dataset: easy_vqa}]"
    )
    assert [data.dataset for data in changed.stages["finetune"].data] == ["messages", "easy_vqa"]
    assert changed.override("data.finetune.1.limit=3").stages["finetune"].data[1].limit == 3
    with pytest.raises(ValueError, match=r"a list of 2 has no entry '5'"):
        changed.override("data.finetune.5.limit=3")
    with pytest.raises(ValueError, match=r"a list of 2 has no entry 'limit'"):
        changed.override("data.finetune.limit=3")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "override 'seed' has no `=`: write key.path=value, for example seed=7"),
        ("sede=7", "sede: unknown key; did you mean seed?"),
        (
            "stages.finetune.learning_rat=1",
            r"stages\.finetune\.learning_rat: unknown key; did you mean learning_rate",
        ),
        ("model.vision_towr=x", r"model\.vision_towr: unknown key; did you mean vision_tower"),
        (
            "data.finetune.0.rooot=x",
            r"stages\.finetune\.data\.0\.rooot: unknown key; did you mean root",
        ),
        (
            "stages.tuning.language_model=full",
            r"recipe 'small' has no stage 'tuning': known: finetune, pretrain",
        ),
        ("stages.fintune.epochs=2", "has no stage 'fintune': did you mean finetune?"),
        ("data.pretran=x.jsonl", "has no stage 'pretran': did you mean pretrain?"),
        ("stages={}", "stages: .*at least 1"),
        ("stages=null", "stages: "),
        ("model.image_size.deep=3", r"model\.image_size: .*whole number"),
        ("seed=many", r"seed: .*whole number.* \(got 'many'\)"),
        ("seed=-1", r"seed: .*at least 0.* \(got -1\)"),
        (
            "stages.finetune.learning_rate=fast",
            r"stages\.finetune\.learning_rate: .*number.* \(got 'fast'\)",
        ),
        (
            "stages.finetune.learning_rate=-1",
            r"stages\.finetune\.learning_rate: .*greater than 0.* \(got -1\)",
        ),
        (
            "stages.finetune.part_learning_rates={vision_tower: -1}",
            r"part_learning_rates\.vision_tower: .*greater than 0",
        ),
        (
            "stages.finetune.batching=paked",
            r"stages\.finetune\.batching: .*'packed'.* \(got 'paked'\)",
        ),
        (
            "stages.finetune.activation_checkpointing=[projector]",
            r"write true, false, selective, or a list of vision_tower and language_model \(got",
        ),
        (
            "stages.finetune.unreadable_images=skip",
            r"unreadable_images: .*'substitute'.* \(got 'skip'\)",
        ),
        ("keep_states=0", r"keep_states: .*at least 1.* \(got 0\)"),
        ("sharding=zero", r"sharding: .*'hsdp'.* \(got 'zero'\)"),
        ("model.image_size=0", r"model\.image_size: .*at least 1.* \(got 0\)"),
        ("name.deep=3", r"override name\.deep: name is a value, not a group of keys"),
        ("seed.deep=3", r"seed: .*whole number.* \(got {'deep': 3}\)"),
        (
            "data.finetune.weight=0",
            r"stages\.finetune\.data\.0\.weight: .*greater than 0.* \(got 0\)",
        ),
        ("stages.finetune.learning_rate=.inf", r"stages\.finetune\.learning_rate: .*finite"),
        ("stages.finetune.epochs=.inf", r"stages\.finetune\.epochs: .*finite"),
        ("data.finetune.weight=.inf", r"stages\.finetune\.data\.0\.weight: .*finite"),
        ("data.finetune.cap=0", r"stages\.finetune\.data\.0\.cap: .*at least 1"),
        ("data.finetune.x.limit=3", r"stages\.finetune\.data\.0\.x: unknown key"),
        ("seed=[1", r"override 'seed=\[1': the value is not valid YAML"),
        ("name=b\udcc3\udca4r", r"is not UTF-8 text: set LC_ALL=C\.UTF-8"),
        ("model=null", r"model: .*"),
        ("stages.finetune.data=[]", r"stages\.finetune\.data: .*at least 1"),
    ],
)
def test_what_does_not_fit_names_the_key_and_the_value(
    recipe: Recipe, assignment: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        recipe.override(assignment)
    assert "pydantic" not in str(caught.value)


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    plain = tree()
    plain["colour"] = "red"
    del plain["model"]["vision_tower"]
    plain["stages"]["finetune"]["batch_size"] = 0
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(plain, sort_keys=False))
    with pytest.raises(ValueError, match="is not a valid recipe") as caught:
        load_recipe(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert all(
        key in text
        for key in (
            "colour: unknown key",
            "model.vision_tower: is missing",
            "stages.finetune.batch_size:",
        )
    )


@pytest.mark.parametrize(
    ("habit", "sentence"),
    [
        ("eos_holes", "eos_holes and text_limit are not possible with batching=packed"),
        ("text_limit", "eos_holes and text_limit are not possible with batching=packed"),
        ("frozen_dropout", "frozen_dropout has no effect, because the language model trains"),
        ("dummy_image", "must be 'eos_holes', 'text_limit'"),
    ],
)
def test_a_habit_of_upstream_that_cannot_be_is_refused(
    recipe: Recipe, habit: str, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        recipe.override("stages.finetune.batching=packed", f"stages.finetune.upstream=[{habit}]")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "learning_rate=1e-3",
            "did you mean stages.pretrain.learning_rate or stages.finetune.learning_rate?",
        ),
        ("stages.finetune.lr=1e-3", "did you mean learning_rate?"),
        ("stages.finetune.max_steps=ten", r"must be a whole number \(got 'ten'\)"),
    ],
)
def test_a_mistake_names_the_right_key(recipe: Recipe, override: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        recipe.override(override)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_stage_that_would_train_nothing_is_refused(recipe: Recipe, stage: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"stages\.{stage}: every part is frozen, so nothing would be trained: set one part",
    ):
        recipe.override(*(f"stages.{stage}.tuning.{part}=frozen" for part in PARTS))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stages.pretrain.part_learning_rates={vision_tower: 1e-5}"],
            "names vision_tower, which `tuning` keeps frozen",
        ),
        (
            ["stages.finetune.group_by_modality_length=true"],
            "group_by_modality_length has no effect with batching=packed: .* use padded",
        ),
        (
            ["stages.pretrain.activation_checkpointing=[vision_tower]"],
            "of a frozen vision_tower has no effect",
        ),
        (
            ["stages.finetune.samples_per_image=4"],
            "samples_per_image has no effect with batching=packed: remove it or use shared-image",
        ),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(
    recipe: Recipe, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recipe.override(*overrides)


def test_samples_per_image_can_be_taken_back(recipe: Recipe) -> None:
    shared = recipe.override(
        "stages.finetune.batching=shared-image", "stages.finetune.samples_per_image=4"
    )
    assert shared.stages["finetune"].bundle == 4
    packed = shared.override(
        "stages.finetune.batching=packed", "stages.finetune.samples_per_image=null"
    )
    assert packed.stages["finetune"].bundle is None


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no recipe 'quickstrat': did you mean quickstart"):
        load_recipe("quickstrat")
    with pytest.raises(FileNotFoundError, match=r"no recipe '.*mine\.yaml'"):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize("text", ["", "[]", "just words", "a: [1"])
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml is not (a valid recipe|valid YAML)"):
        load_recipe(path)


def test_a_file_reads_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump(tree(), sort_keys=False).replace(
            "learning_rate: 0.001", "learning_rate: 1e-3"
        )
    )
    assert "1e-3" in path.read_text()
    assert load_recipe(path).stages["finetune"].learning_rate == 1e-3


def test_a_digest_names_what_is_trained(recipe: Recipe) -> None:
    assert recipe.override("name=x", "description=y").digest() == recipe.digest()
    assert (
        len(
            {
                recipe.override(change).digest()
                for change in ("seed=0", "seed=1", "model.image_size=70", "precision=float32")
            }
        )
        == 4
    )
    assert len(recipe.digest()) == 12


def test_how_a_run_is_kept_and_spread_is_not_what_it_trains(recipe: Recipe) -> None:
    """So that a run can go on with other processes, or with more states."""
    assert (
        recipe.override("sharding=ddp", "keep_states=5", "async_checkpoints=true").digest()
        == recipe.digest()
    )


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("true", ("vision_tower", "language_model")),
        ("selective", ("vision_tower", "language_model")),
        ("false", ()),
        ("[]", ()),
        ("language_model", ("language_model",)),
        ("[vision_tower]", ("vision_tower",)),
    ],
)
def test_activation_checkpointing_is_for_all_layers_or_for_parts(
    recipe: Recipe, value: str, parts: tuple[str, ...]
) -> None:
    changed = recipe.override(f"stages.finetune.activation_checkpointing={value}")
    assert changed.stages["finetune"].checkpointed == parts
    assert changed.stages["finetune"].keeps_products == (value == "selective")
    assert Recipe.parse(yaml.safe_load(changed.dump()), "again") == changed


def test_products_of_compiled_layers_cannot_be_kept(recipe: Recipe) -> None:
    selective = "stages.finetune.activation_checkpointing=selective"
    with pytest.raises(ValueError, match="selective cannot be had with compile=true"):
        recipe.override("compile=true", selective)


def test_a_recipe_cannot_be_changed_in_place(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


def staged(*names: str) -> dict[str, Any]:
    """A recipe of these stages, each the finetune stage of `tree`."""
    plain = tree()
    return plain | {"stages": {name: plain["stages"]["finetune"] for name in names}}


@pytest.mark.parametrize(
    "names",
    [("finetune",), ("pretrain", "finetune", "polish-2"), ("zero", "alpha", "middle_1")],
)
def test_stages_are_any_and_keep_their_order(names: tuple[str, ...]) -> None:
    recipe = Recipe.parse(staged(*names), "staged")
    assert tuple(recipe.stages) == names
    assert tuple(yaml.safe_load(recipe.dump())["stages"]) == names
    assert Recipe.parse(yaml.safe_load(recipe.dump()), "again") == recipe
    assert tuple(recipe.override(f"stages.{names[-1]}.epochs=2").stages) == names
    assert recipe.override(f"data.{names[0]}=x.jsonl").stages[names[0]].data[0].root == Path(
        "x.jsonl"
    )
    assert [recipe.stage_before(name) for name in names] == [None, *names[:-1]]
    assert recipe.last_stage == names[-1]


def test_stages_can_be_replaced_as_a_whole_and_then_overridden(recipe: Recipe) -> None:
    alone = yaml.safe_dump({"only": tree()["stages"]["finetune"]}, default_flow_style=True)
    changed = recipe.override(f"stages={alone}", "stages.only.epochs=2", "data.only=x.jsonl")
    assert list(changed.stages) == ["only"] and changed.stages["only"].epochs == 2
    with pytest.raises(ValueError, match="no stage 'finetune': known: only"):
        recipe.override(f"stages={alone}", "stages.finetune.epochs=2")


def test_the_order_of_stages_is_part_of_what_a_recipe_trains() -> None:
    one, other = (Recipe.parse(staged(*names), "x") for names in (("a", "b"), ("b", "a")))
    assert one.digest() != other.digest()
    assert one.differences(other)


@pytest.mark.parametrize("name", ["Finetune", "2nd", "fine tune", "../up", "", "evaluation"])
def test_a_stage_is_a_folder_of_the_run(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"stages\..*: a (stage's name|run has a folder)"
    ) as caught:
        Recipe.parse(staged("pretrain", name), "staged")
    assert "[key]" not in str(caught.value)


def test_a_group_that_was_null_can_be_filled(recipe: Recipe) -> None:
    lora = ("stages.finetune.tuning.lora=null", "stages.finetune.tuning.lora.rank=4")
    changed = recipe.override("stages.finetune.tuning.language_model=lora", *lora)
    assert changed.stages["finetune"].tuning.lora.rank == 4


def test_a_file_whose_keys_were_sorted_is_not_trained_backwards(tmp_path: Path) -> None:
    path = tmp_path / "sorted.yaml"
    path.write_text(yaml.safe_dump(tree()))
    with pytest.raises(ValueError, match="pretrain stands after finetune: put pretrain first"):
        load_recipe(path)
