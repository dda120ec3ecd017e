"""Counts and times of a server, in the format of Prometheus.

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
    "images_encoded_total": ("counter", "Images that went through the vision tower."),
    "images_found_total": ("counter", "Images whose features were still there."),
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
    """Counters, summaries and gauges; any thread may change them."""

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
        """Add a value to a summary, in seconds."""
        assert _HELP[name][0] == "summary", name
        with self._lock:
            self._values[f"{name}_sum", ""] += value
            self._values[f"{name}_count", ""] += 1

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """Set the function that reads a value, or a count that is kept elsewhere."""
        assert name in _HELP, name
        self._gauges[name] = read

    def text(self) -> str:
        """Return all values, one sample a line."""
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
            if samples:
                lines += [f"# HELP mipha_{name} {text}", f"# TYPE mipha_{name} {kind}", *samples]
        return "\n".join(lines) + "\n"


def _labels(labels: dict[str, str]) -> str:
    # The words are our own: there is nothing to escape.
    inside = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""
