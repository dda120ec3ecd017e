"""A picture of one alignment step: its loss, and whatever shares it is judged by."""

from __future__ import annotations

import io
import math
from pathlib import Path

from mipha.files import read_lines, write_whole

_SHARES = {
    "accuracy": "pairs ranked right",
    "sign_accuracy": "responses on the right side of zero",
    "token_accuracy": "tokens guessed",
}


def plot_alignment(metrics_jsonl: Path, png: Path, title: str) -> None:
    """Draw loss above and shares below over optimizer steps; held-out rows as dots.

    Args:
        metrics_jsonl: Lines with `step` and any of loss, accuracy, sign_accuracy, token_accuracy and validation_<the same>.
        png: Written whole.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(read_lines(metrics_jsonl))

    def curve(key: str) -> tuple[list[int], list[float]]:
        points = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
        return [step for step, _ in points], [value for _, value in points]

    figure = Figure(figsize=(6.4, 5.2), facecolor="white")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axes, names in ((top, {"loss": "loss"}), (bottom, _SHARES)):
        for number, (key, label) in enumerate(names.items()):
            colour = f"C{number}"
            if curve(key)[0]:
                axes.plot(
                    *curve(key), color=colour, linewidth=1, alpha=0.6, label=f"{label}, in training"
                )
            if curve(f"validation_{key}")[0]:
                axes.plot(
                    *curve(f"validation_{key}"),
                    "o-",
                    color=colour,
                    markersize=4,
                    label=f"{label}, held out",
                )
        axes.grid(axis="y", color="#e4e7eb")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    top.set_ylabel("loss (nats)")
    top.set_title(title, loc="left", fontsize=11, fontweight="bold", parse_math=False)
    bottom.set_ylim(0, 1.02)
    bottom.set_ylabel("share")
    bottom.set_xlabel("optimizer step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    write_whole(png, buffer.getvalue())
