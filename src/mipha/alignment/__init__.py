"""Aligning a language model before it meets images: fine-tuning, reward and cost models, preference optimisation, RLHF."""
