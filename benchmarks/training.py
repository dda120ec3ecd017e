"""Training throughput against the stock LLaVA, for each lever alone and for all together.

    python benchmarks/training.py [--only stage1 --only stage2 --only shared-image \\
        --only easy-vqa --only levers --only trainer] [--threads 2] [--repeats 3] \\
        [--out benchmarks/results]

All ways train on the same samples. The parts are DINOv2-small and SmolLM2-135M with real weights.
The tower is frozen in both stages and in every way. A frozen part computes no gradient in any way,
because torch itself leaves it out. `full_size.py` measures a full-size model on a GPU.

The losses of the ways in float32 must be equal to 1e-3 relative, before each step and after the
last one; else the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import against_trainer
import torch
from harness import Row, report, side_by_side
from ways import BASELINE, LEVERS, SHARING, STOCK_BFLOAT16, Outcome, Trial, Way, together
from workloads import EASY_VQA, SHARED, SINGLE, Workload, quickstart_parts

from mipha.recipe import ModelRecipe

TOLERANCE = 1e-3
"""Greatest allowed relative difference between the losses of two ways in float32."""


@dataclass(frozen=True)
class Part:
    """Measurements against the stock LLaVA in one report.

    Args:
        title: Title of the report.
        workload: Conversations to train on.
        stage: `pretrain` or `finetune`.
        ways: Ways beside the baseline.
        target: Wanted speed of ours in float32 over the baseline's; None where none was set.
        steps: Number of optimizer steps in a repeat.
    """

    title: str
    workload: Workload
    stage: str
    ways: tuple[Way, ...]
    target: float | None = None
    steps: int = 2


_PACKED = (STOCK_BFLOAT16, together("packed", bf16=False), together("packed", bf16=True))
_SHARED = (
    STOCK_BFLOAT16,
    SHARING,
    together("shared-image", bf16=False),
    together("shared-image", bf16=True),
)
PARTS = {
    "stage1": Part("stage 1", SINGLE, "pretrain", _PACKED, target=2.0),
    "stage2": Part("stage 2", SINGLE, "finetune", _PACKED, target=2.4),
    "shared-image": Part("stage 2", SHARED, "finetune", _SHARED, target=5.0),
    "easy-vqa": Part("stage 2", EASY_VQA, "finetune", _SHARED),
    "levers": Part(
        "stage 2, each lever alone", replace(SINGLE, batch_size=4), "finetune", LEVERS, steps=1
    ),
}


def measure(
    trial: Trial, case: str, ways: Sequence[Way], repeats: int
) -> tuple[list[Row], dict[str, Outcome]]:
    """Return the rows of a case, and the outcome of each way's last round."""
    outcomes: dict[str, Outcome] = {}

    def call(way: Way) -> None:
        # One step is enough to warm up; `side_by_side` times the calls after the first.
        outcomes[way.name] = trial.run(way, num_steps=None if way.name in outcomes else 1)

    calls = {way.name: lambda way=way: call(way) for way in ways}
    rows = side_by_side(case, "samples", sum(map(len, trial.samples)), calls, repeats)
    return rows, outcomes


def unequal(ways: Sequence[Way], outcomes: dict[str, Outcome]) -> list[str]:
    """Return the ways in float32 whose losses differ from the baseline's."""
    wanted = outcomes[ways[0].name].losses
    found = {way.name: outcomes[way.name].losses for way in ways if not way.bf16}
    return [name for name, losses in found.items() if difference(losses, wanted) > TOLERANCE]


def difference(losses: Sequence[float], wanted: Sequence[float]) -> float:
    """Return the greatest relative difference."""
    return max(abs(loss - want) / want for loss, want in zip(losses, wanted, strict=True))


def like_with_like(ways: Sequence[Way], rows: Sequence[Row]) -> dict[str, str]:
    """Return how many times as fast each way is as the stock LLaVA in the same type."""
    rates = {way: row.rate for way, row in zip(ways, rows, strict=True)}
    return {
        f"{way.name}, against {stock.name}": f"{rate / rates[stock]:.2f} times"
        for way, rate in rates.items()
        for stock in (STOCK_BFLOAT16 if way.bf16 else BASELINE,)
        if stock in rates and way != stock
    }


def run_part(name: str, options: argparse.Namespace, parts: ModelRecipe | None = None) -> bool:
    """Measure one part and write its report.

    Args:
        name: Key of `PARTS`.
        options: Options of the command line.
        parts: Parts of the model; default: the quickstart's.

    Returns:
        True if all losses were equal.
    """
    part = PARTS[name]
    workload = replace(part.workload, batch_size=options.batch_size or part.workload.batch_size)
    ways = (BASELINE, *part.ways)
    steps = options.steps or part.steps

    # Measure.
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(
            Path(folder), parts or quickstart_parts(workload), workload, part.stage, steps
        )
        rows, outcomes = measure(trial, part.title, ways, options.repeats)

    # Compare the losses, and report.
    wanted = outcomes[BASELINE.name].losses
    real = trial.num_tokens / sum(map(len, trial.samples))
    wrong = unequal(ways, outcomes)
    facts: dict[str, object] = {
        "repeats": options.repeats,
        "steps": steps,
        "threads": torch.get_num_threads(),
    }
    facts |= {"workload": asdict(workload), "real tokens a sample": round(real, 1)}

    for row in rows:
        found = outcomes[row.way]
        facts[f"{row.way}"] = (
            f"{row.rate * real:.0f} real tokens/s; {found.num_positions} positions computed; "
            f"loss {found.losses[0]:.5f} at the first step and {found.losses[-1]:.5f} after the "
            "last, greatest relative difference from the baseline "
            f"{difference(found.losses, wanted):.1e}"
        )

    facts["losses in float32 equal to 1e-3"] = not wrong
    facts |= like_with_like(ways, rows)
    if part.target:
        facts["target"] = f"{part.target} times the stock LLaVA in the same type"
    report(f"training-{name}", f"Training, {part.title}: {workload.name}", rows, options.out, facts)
    return not wrong


def main() -> None:
    """Run the chosen parts."""
    parts = [*PARTS, "trainer"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=parts,
        help="part to run; repeat it for more; default: all",
    )
    parser.add_argument(
        "--threads", type=int, help="number of threads of torch; default: its own choice"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, help="optimizer steps in a repeat; default: 2, and 1 for single levers"
    )
    parser.add_argument("--batch-size", type=int, help="samples a step; default: the workload's")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()

    if options.threads:
        torch.set_num_threads(options.threads)

    equal = True
    for name in options.only or parts:
        if name == "trainer":
            against_trainer.measure(options)
        else:
            equal &= run_part(name, options)
    sys.exit(not equal)


if __name__ == "__main__":
    main()
