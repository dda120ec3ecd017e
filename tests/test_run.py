from __future__ import annotations

import json
from pathlib import Path

import pytest

from mipha.recipe import Recipe
from mipha.run import Run, create_run, model_folder, open_run


def make_recipe(**changes: object) -> Recipe:
    stage = {
        "data": {"dataset": "easy_vqa"},
        "tuning": {"vision_tower": "frozen", "projector": "full", "language_model": "frozen"},
        "learning_rate": 1e-3,
        "batch_size": 4,
        "batching": "shared-image",
    }
    tree = {
        "name": "tiny",
        "model": {"vision_tower": "dinov2-small", "language_model": "smollm2-135m"},
        "stages": {"pretrain": stage, "finetune": {**stage, **changes}},
    }
    return Recipe.parse(tree, "tiny")


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_new_run_says_what_it_was_made_from_and_with(tmp_path: Path) -> None:
    recipe = make_recipe()
    run = create_run(tmp_path / "a" / "b", recipe)
    assert open_run(run.folder) == run
    assert run.recipe == recipe
    made_with = json.loads((run.folder / "provenance.json").read_text())
    assert set(made_with) == {
        "created",
        "mipha-vlm",
        "commit",
        "python",
        "torch",
        "transformers",
        "peft",
        "trl",
        "platform",
        "cpus",
    }
    assert made_with["python"].startswith("3.") and made_with["torch"].startswith("2.")
    assert set(contents(run.folder)) == {"recipe.yaml", "provenance.json"}


@pytest.mark.parametrize("batching", ["padded", "packed", "shared-image"])
def test_the_recipe_of_a_run_can_be_read_back(tmp_path: Path, batching: str) -> None:
    recipe = make_recipe(batching=batching)
    assert create_run(tmp_path, recipe).recipe == recipe


def test_the_same_recipe_reopens_the_run_unchanged_whatever_its_name(tmp_path: Path) -> None:
    create_run(tmp_path, make_recipe())
    before = contents(tmp_path)
    create_run(
        tmp_path, make_recipe().override("name=other", "description=the same in other words")
    )
    assert contents(tmp_path) == before


def test_another_recipe_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    create_run(tmp_path, make_recipe()).stage("pretrain").mkdir()
    before = contents(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"stages\.finetune\.learning_rate is 0\.001 there and 0\.002 here.*choose another -o",
    ) as caught:
        create_run(tmp_path, make_recipe(learning_rate=2e-3))
    assert "pretrain" not in str(caught.value)
    assert contents(tmp_path) == before


def test_a_run_that_never_trained_takes_another_recipe(tmp_path: Path) -> None:
    create_run(tmp_path, make_recipe())
    assert create_run(tmp_path, make_recipe(learning_rate=2e-3)).recipe == make_recipe(
        learning_rate=2e-3
    )


def test_a_folder_with_other_files_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not lose me")
    with pytest.raises(ValueError, match="not empty and not a run"):
        create_run(tmp_path, make_recipe())
    assert contents(tmp_path) == {"thesis.tex": b"do not lose me"}


def test_a_run_that_was_stopped_before_its_first_file_can_start_again(tmp_path: Path) -> None:
    (tmp_path / ".recipe.yaml.123.tmp").write_text("name: ti")
    assert create_run(tmp_path, make_recipe()).recipe == make_recipe()


def test_opening_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run folder"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no recipe\.yaml"):
        open_run(tmp_path)


def test_a_model_folder_that_is_not_whole_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        model_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds pickled weights .*convert them first, with"):
        model_folder(tmp_path)


def test_a_stage_is_finished_when_its_model_is_whole(tmp_path: Path) -> None:
    run = create_run(tmp_path, make_recipe())
    assert not run.is_finished("finetune")
    with pytest.raises(FileNotFoundError, match="has not finished finetune"):
        run.final_checkpoint()
    folder = make_model(run.checkpoint("finetune"))
    assert run.is_finished("finetune") and not run.is_finished("pretrain")
    assert run.final_checkpoint() == model_folder(tmp_path) == model_folder(folder) == folder
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not run.is_finished("finetune")
    (folder / "model-2.safetensors").write_bytes(b"")
    assert run.is_finished("finetune")


def test_every_path_lies_in_the_run_and_none_twice(tmp_path: Path) -> None:
    run = create_run(tmp_path, make_recipe())
    paths = [
        getattr(run, kind)(stage)
        for kind in ("stage", "checkpoint", "metrics", "states")
        for stage in ("pretrain", "finetune")
    ]
    paths.append(run.evaluation("easy_vqa"))
    assert len(set(paths)) == len(paths) and all(path.is_relative_to(tmp_path) for path in paths)
    with pytest.raises(ValueError, match="no stage 'finetuning': did you mean finetune"):
        run.recipe.stage("finetuning")


@pytest.mark.parametrize("names", [("finetune",), ("pretrain", "finetune", "more")])
def test_a_run_is_trained_when_its_last_stage_is_finished(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    stage = make_recipe().stages["finetune"]
    recipe = make_recipe().model_copy(update={"stages": dict.fromkeys(names, stage)})
    run = create_run(tmp_path, recipe)
    for name in names:
        assert not run.is_trained
        with pytest.raises(FileNotFoundError, match=f"has not finished {names[-1]}: run the same"):
            run.final_checkpoint()
        make_model(run.checkpoint(name))
    assert run.is_trained and run.final_checkpoint() == tmp_path / names[-1] / "checkpoint"
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        create_run(tmp_path, make_recipe(learning_rate=2e-3))


def test_what_a_stage_is_trained_on_is_kept_and_cannot_change_once_it_began(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", make_recipe())
    run.record_data("pretrain", {"samples": 3, "sha256": "a"})
    run.record_data("pretrain", {"samples": 4, "sha256": "b"})  # nothing was trained yet
    assert json.loads((run.folder / "provenance.json").read_text())["data"] == {
        "pretrain": {"samples": 4, "sha256": "b"}
    }
    run.states("pretrain").mkdir(parents=True)
    run.record_data("pretrain", {"samples": 4, "sha256": "b"})
    with pytest.raises(
        ValueError,
        match=r"the data of pretrain changed since .* \(4 samples then, 5 now\): "
        r"put the old data back",
    ):
        run.record_data("pretrain", {"samples": 5, "sha256": "c"})


@pytest.mark.parametrize(
    "data", [[], 5, None, {"pretrain": 5}, {"pretrain": []}, {"pretrain": {"sha256": "x"}}]
)
def test_facts_about_data_that_are_none_are_a_sentence(tmp_path: Path, data: object) -> None:
    run = create_run(tmp_path / "run", make_recipe())
    run.states("pretrain").mkdir(parents=True)
    (run.folder / "provenance.json").write_text(json.dumps({"data": data}))
    sentence = r"provenance\.json holds data that are no facts about stages: delete it"
    with pytest.raises(ValueError, match=sentence):
        run.commits("pretrain")
    with pytest.raises(ValueError, match=sentence):
        run.record_data("pretrain", {"samples": 5, "sha256": "c"})


def test_a_run_keeps_the_commits_of_its_data(tmp_path: Path) -> None:
    run = create_run(tmp_path / "run", make_recipe())
    assert run.commits("pretrain") == Run(tmp_path / "none").commits("pretrain") == {}
    run.record_data("pretrain", {"samples": 1, "sha256": "0"})
    assert run.commits("pretrain") == {}
    commits = {"hf://datasets/a/b": "a" * 40}
    run.record_data("finetune", {"samples": 1, "sha256": "0", "commits": commits})
    assert run.commits("finetune") == commits
