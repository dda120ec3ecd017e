"""Adapters for other programs; each is imported by that program, never by ours."""
