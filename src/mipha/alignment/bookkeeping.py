"""What is written down while a trainer of the host runs: metrics in our names, and which training states are whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback, TrainerState

from mipha.alignment.folder import mark_complete
from mipha.files import append_line

_OUR_NAMES = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "accuracy": "accuracy",
    "sign_accuracy": "sign_accuracy",
    "margin": "margin",
    "mean_token_accuracy": "token_accuracy",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
}
"""The host's names of metrics, and ours; what it logs beside them is left out."""


class Bar(ProgressCallback):
    """The host's progress bar, without what it logs."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        return None


class Bookkeeping(TrainerCallback):
    """Metrics in our names, a stop at what is not finite, and a mark on every training state that is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        row: dict[str, Any] = {"step": state.global_step}
        for key, value in (logs or {}).items():
            name = _OUR_NAMES.get(key.removeprefix("eval_"))
            if name is not None:
                row[f"validation_{name}" if key.startswith("eval_") else name] = float(value)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(row.get(name, 0.0)):
                raise FloatingPointError(
                    f"step {state.global_step}: the {name} is {row[name]}; training stopped, and its states up to the step before are "
                    f"intact in {self.folder / 'checkpoints'}: lower the learning_rate, or look at the data of this step"
                )
        if len(row) > 1:
            append_line(self.folder / "metrics.jsonl", row)

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")
