"""A study's folder, and the runs in it.

DIR/study.yaml              the study as it was asked for, and `asked.json`: at which scale
    runs/<variant>/seed-<k> a run folder each
    logs/                   what each run printed
    report.md, report.html  what they say, and `scores.png`
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from mipha.files import write_whole
from mipha.recipe import Recipe
from mipha.run import open_run
from mipha.studies.study import Study, load_study


@dataclass(frozen=True)
class Job:
    """One run of a study.

    Args:
        variant: Its name.
        seed: Which repeat, from 0.
        recipe: With that seed.
        folder: Its run folder.
    """

    variant: str
    seed: int
    recipe: Recipe
    folder: Path


def jobs_of(study: Study, scale: str, out: Path, seeds: int) -> list[Job]:
    """Every run of a study, seed by seed, so that a study that is stopped has compared all variants as often as it could."""
    variants = study.variants(scale)
    return [
        Job(
            variant.name,
            seed,
            variant.with_seed(seed),
            out / "runs" / variant.name / f"seed-{seed}",
        )
        for seed in range(seeds)
        for variant in variants
    ]


def claim(study: Study, scale: str, out: Path) -> None:
    """Mark a folder as this study's.

    Raises:
        ValueError: It is another's, or holds other files.
    """
    path = out / "asked.json"
    if path.is_file():
        # Both are read by today's schema: a digest of another version's would refuse whatever has gained a key with a default since.
        found, at = open_study(out)
        if (found.name, at, found.digest(at)) != (study.name, scale, study.digest(scale)):
            kind = (
                "another version of it"
                if (found.name, at) == (study.name, scale)
                else f"study {study.name} at scale {scale}"
            )
            raise ValueError(
                f"{out} holds study {found.name} at scale {at}, not {kind}: choose another -o"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no study: choose another -o")
    write_whole(
        out / "study.yaml",
        yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, width=120),
    )
    write_whole(path, json.dumps({"study": study.name, "scale": scale}) + "\n")


def open_study(out: Path) -> tuple[Study, str]:
    """The study of a folder, and its scale.

    Raises:
        FileNotFoundError: The folder holds none.
    """
    if not (out / "asked.json").is_file():
        raise FileNotFoundError(
            f"{out} holds no study: make one with `mipha study run NAME -o {out}`"
        )
    return load_study(out / "study.yaml"), json.loads(
        (out / "asked.json").read_text(encoding="utf-8")
    )["scale"]


def runs_in(out: Path) -> list[Job]:
    """The runs that a study's folder holds.

    Raises:
        FileNotFoundError: It holds no study.
    """
    open_study(out)
    return [
        Job(
            path.parent.parent.name,
            int(path.parent.name.removeprefix("seed-")),
            open_run(path.parent).recipe,
            path.parent,
        )
        for path in sorted((out / "runs").glob("*/seed-*/recipe.yaml"))
    ]


def is_trained(job: Job) -> bool:
    """Whether both stages are finished."""
    return open_run(job.folder).is_finished("finetune")
