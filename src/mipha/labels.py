"""The one label that both sides of training know: `data` writes it and `models` leaves it out."""

IGNORE = -100
"""Label of a token that is not trained on; the default `ignore_index` of torch's cross entropy."""
