"""Predict what a recipe takes before it runs: parameters, memory, time and cost."""
