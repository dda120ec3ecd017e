"""The verbs: parse, call one function, print.

Torch is imported inside a verb, so `mipha --help` is instant.
"""

from mipha.cli.program import app, main

__all__ = ["app", "main"]
