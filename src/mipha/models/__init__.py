"""The model: knows tensors, not question files."""
