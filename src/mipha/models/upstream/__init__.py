"""Released Mipha and LLaVA-1.5 checkpoints as standard ones, every tensor accounted for.

config.py    config.json  ->  configs of transformers: language model, tower, image
tensors.py   names and shapes  ->  plan: moved, split, dropped, or refused; then the copying
load.py      the two functions below
"""

from mipha.models.upstream.load import import_upstream, load_upstream

__all__ = ["import_upstream", "load_upstream"]
