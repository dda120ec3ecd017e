"""Share of computed positions that are padding, on lengths like LLaVA-665K's.

    python benchmarks/lengths.py [--samples 20000] [--batch-size 128] [--processes 8] \\
        [--out benchmarks/results]

It compares random micro-batches, micro-batches grouped by length, and packed rows. It runs no model
and reads no data set: `draw_lengths` draws the lengths. Training's own rules put a step of
`--batch-size` samples (upstream's stage 2) into rows. Packed rows have three figures: the padding
to the longest row of a micro-batch, the empty part of rows, and the time for which processes wait
for the one with the most tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mipha.data.batches import deal
from mipha.data.encode import Encoded
from mipha.data.packing import Row, make_rows
from mipha.files import write_whole
from mipha.run import provenance

IMAGE_TOKENS = 729
"""Tokens of an image: SigLIP at 384 pixels, patches of 14."""

LONGEST = 2048
"""Greatest length. Source: `model_max_length` of upstream's finetune.sh."""

WITH_IMAGE = 0.94
"""Share of samples with an image.

Source: about 40 thousand of LLaVA-665K's 665 thousand conversations have text only."""

MICRO_BATCH = 16
SAMPLES_A_MEGABATCH = 50
"""Micro-batches that length grouping sorts at a time.

Source: `get_length_grouped_indices` of transformers, which LLaVA's sampler follows."""


def draw_lengths(number: int, seed: int = 0) -> np.ndarray:
    """Draw lengths in tokens, `(number,)`: mean 1,022, 95 % under 1,521, none over 2,048.

    The mix is made up to resemble LLaVA-665K, because no copy of it was available. 94 % of the
    samples have 729 image tokens and 291 tokens of text in the mean, log-normal; the others are
    longer and have text alone. The mean and the 95th percentile are those of an earlier made-up mix
    that lost 37 % to padding in random micro-batches of 16.
    """
    random = np.random.default_rng(seed)
    spread = 0.68
    text = random.lognormal(np.log(291) - spread**2 / 2, spread, number)
    alone = random.lognormal(np.log(1000), 0.8, number)
    lengths = np.where(random.random(number) < WITH_IMAGE, IMAGE_TOKENS + text, alone)
    return np.clip(np.round(lengths), 16, LONGEST).astype(np.int64)


def padding(widths: Sequence[int], size: int) -> float:
    """Return the % of padding when every `size` rows in turn are padded to their longest."""
    chunks = [widths[start : start + size] for start in range(0, len(widths), size)]
    return 100 * (1 - sum(widths) / sum(len(chunk) * max(chunk) for chunk in chunks))


def length_grouped(lengths: np.ndarray, size: int) -> np.ndarray:
    """Sort the lengths within each megabatch, as LLaVA's sampler does after it has shuffled them.

    The order of the micro-batches does not matter here: they waste the same in any order.
    """
    mega = size * SAMPLES_A_MEGABATCH
    return np.concatenate(
        [np.sort(lengths[start : start + mega])[::-1] for start in range(0, len(lengths), mega)]
    )


def packed_steps(
    lengths: np.ndarray, batch_size: int, row_tokens: int, processes: int
) -> Iterator[list[Row]]:
    """Return the rows of each whole step."""
    for start in range(0, len(lengths) - batch_size + 1, batch_size):
        samples = [_stand_in(int(length)) for length in lengths[start : start + batch_size]]
        yield make_rows(samples, row_tokens, "packed", processes)


def packed_figures(
    lengths: np.ndarray, batch_size: int, row_tokens: int, processes: int
) -> dict[str, float]:
    """Return the % of padding for 1 and 4 rows a micro-batch, of empty rows, and of waiting."""
    tokens = rows = waiting = 0
    positions = {1: 0, 4: 0}
    for step in packed_steps(lengths, batch_size, row_tokens, processes):
        widths = [len(row) for row in step]
        tokens += sum(widths)
        rows += len(widths)
        for size in positions:
            positions[size] += sum(
                len(widths[i : i + size]) * widths[i] for i in range(0, len(widths), size)
            )
        waiting += processes * max(sum(map(len, own)) for own in deal(step, processes))

    return {
        "padding, 1 row a micro-batch": 100 * (1 - tokens / positions[1]),
        "padding, 4 rows a micro-batch": 100 * (1 - tokens / positions[4]),
        "empty part of rows": 100 * (1 - tokens / (rows * row_tokens)),
        f"{processes} processes waiting for the fullest": 100 * (1 - tokens / waiting),
    }


def _stand_in(length: int) -> Encoded:
    ids = np.zeros(length, dtype=np.int64)
    return Encoded("", ids, ids, ())


def measure(num_samples: int, batch_size: int, processes: int) -> dict[str, float]:
    """Return the % of padding by name of the way."""
    lengths = draw_lengths(num_samples)
    found = {
        f"padded to {LONGEST}": 100 * (1 - lengths.mean() / LONGEST),
        f"padded, random micro-batches of {MICRO_BATCH}": padding(lengths.tolist(), MICRO_BATCH),
        f"padded, length-grouped micro-batches of {MICRO_BATCH}": padding(
            length_grouped(lengths, MICRO_BATCH).tolist(), MICRO_BATCH
        ),
    }
    for row_tokens in (2048, 4096):
        for name, value in packed_figures(lengths, batch_size, row_tokens, processes).items():
            found[f"packed to {row_tokens}: {name}"] = value
    return found


def main() -> None:
    """Draw lengths, put them into rows, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()

    found = measure(options.samples, options.batch_size, options.processes)
    lengths = draw_lengths(options.samples)
    about = provenance() | {"samples": options.samples, "samples a step": options.batch_size}
    about |= {
        "mean length": round(float(lengths.mean()), 1),
        "95th percentile": float(np.percentile(lengths, 95)),
    }

    write_whole(
        options.out / "lengths.json",
        json.dumps({"about": about, "percent": found}, indent=2) + "\n",
    )

    lines = [
        "# Positions computed for nothing, lengths like LLaVA-665K's",
        "",
        "| way | % |",
        "|---|---|",
    ]
    lines += [f"| {name} | {value:.1f} |" for name, value in found.items()]
    lines += ["", *(f"- {key}: {value}" for key, value in about.items())]
    write_whole(options.out / "lengths.md", "\n".join(lines) + "\n")
    _plot(found, options.out / "lengths.png")
    print("\n".join(lines))


def _plot(found: dict[str, float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.4 * len(found) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        list(found),
        list(found.values()),
        color=["#3465a4" if name.startswith("packed") else "#bbbbbb" for name in found],
    )
    for place, value in enumerate(found.values()):
        axes.text(value, place, f" {value:.1f} %", va="center", fontsize=8)

    axes.invert_yaxis()
    axes.set_xlabel("% of positions")
    axes.set_title("Computed for nothing, lengths like LLaVA-665K's", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
