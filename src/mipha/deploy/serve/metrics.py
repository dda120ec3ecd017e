"""Counts and times of a server, as Prometheus reads them.

Source: Prometheus text exposition format 0.0.4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from threading import Lock

_HELP = {
    "requests_total": ("counter", "Requests answered, by path and HTTP status."),
    "failed_streams_total": (
        "counter",
        "Streams that ended with an error after they had begun, by its code.",
    ),
    "cancelled_total": ("counter", "Chat requests whose client left before the end."),
    "prompt_tokens_total": ("counter", "Tokens read, those of images included."),
    "completion_tokens_total": ("counter", "Tokens generated."),
    "batches_total": ("counter", "Batches generated."),
    "batch_rows_total": (
        "counter",
        "Requests in them; divided by batches_total: the mean batch size.",
    ),
    "images_encoded_total": ("counter", "Pictures that went through the vision tower."),
    "images_found_total": ("counter", "Pictures whose features were still there."),
    "request_seconds": (
        "summary",
        "From a chat request's arrival to the end of its answer, of those answered whole.",
    ),
    "first_token_seconds": (
        "summary",
        "From a chat request's arrival to the first piece of its answer.",
    ),
    "requests_held": ("gauge", "Chat requests that are read, wait or run now."),
    "requests_waiting": ("gauge", "Chat requests that wait for a batch now."),
    "batch_size": ("gauge", "Requests in the batch that runs now."),
}


class Metrics:
    """What happened so far; may be told from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._values: Counter[tuple[str, str]] = Counter()
        self._gauges: dict[str, Callable[[], float]] = {}

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter."""
        assert _HELP[name][0] == "counter", name
        with self._lock:
            self._values[name, _labels(labels)] += value

    def observe(self, name: str, value: float) -> None:
        """One more value of a summary, seconds."""
        assert _HELP[name][0] == "summary", name
        with self._lock:
            self._values[f"{name}_sum", ""] += value
            self._values[f"{name}_count", ""] += 1

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """A value, or a count kept elsewhere, that is read when it is asked for."""
        assert name in _HELP, name
        self._gauges[name] = read

    def text(self) -> str:
        """All of them, a sample a line."""
        with self._lock:
            values = dict(self._values)
        values |= {(name, ""): read() for name, read in self._gauges.items()}
        lines = []
        for name, (kind, text) in _HELP.items():
            parts = [name] if kind != "summary" else [f"{name}_sum", f"{name}_count"]
            samples = [
                f"mipha_{part}{labels} {value:.10g}"
                for (part, labels), value in sorted(values.items())
                if part in parts
            ]
            lines += (
                [f"# HELP mipha_{name} {text}", f"# TYPE mipha_{name} {kind}", *samples]
                if samples
                else []
            )
        return "\n".join(lines) + "\n"


def _labels(labels: dict[str, str]) -> str:
    inside = ",".join(
        f'{name}="{value}"' for name, value in labels.items()
    )  # our own words: nothing in them to escape
    return f"{{{inside}}}" if inside else ""
