"""docs/gpu.md and docs/train.sbatch: the job is one that SLURM, torchrun and mipha take."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from mipha.recipe import load_recipe

DOCS = Path(__file__).parents[2] / "docs"
PLANS = Path(__file__).parents[2] / "benchmarks" / "plans.py"
JOB = (DOCS / "train.sbatch").read_text(encoding="utf-8")


def test_the_job_is_a_shell_script() -> None:
    subprocess.run(["bash", "-n", str(DOCS / "train.sbatch")], check=True)
    assert JOB.startswith("#!/bin/bash\n")
    assert "(train.sbatch)" in (DOCS / "gpu.md").read_text(encoding="utf-8")


def test_torchrun_takes_the_command_of_the_job() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", JOB, flags=re.MULTILINE))
    assert (options["nodes"], options["ntasks-per-node"]) == ("2", "1"), "one torchrun a machine"

    (command,) = re.findall(r"^srun torchrun (.*)$", JOB.replace("\\\n", ""), flags=re.MULTILINE)
    words = shlex.split(command.replace("$SLURM_NNODES", options["nodes"]))
    launched = get_args_parser().parse_args(words)
    assert launched.nnodes == options["nodes"]
    assert launched.nproc_per_node == options["gpus-per-node"]
    assert (launched.rdzv_backend, launched.max_restarts) == ("c10d", 3)

    assert (launched.module, launched.training_script) == (True, "mipha")
    verb, recipe, *rest = launched.training_script_args
    assert verb == "train" and rest == ["-o", "$run"]
    load_recipe(recipe)


@pytest.mark.slow
def test_the_table_holds_what_plans_say() -> None:
    """Three recipes on three machines: a minute or two."""
    lines = (DOCS / "gpu.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in runpy.run_path(str(PLANS))["table"]() if line not in lines] == []
