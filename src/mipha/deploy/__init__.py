"""Publish a checkpoint: verify it in other programs, export it, serve it, and write its card."""
