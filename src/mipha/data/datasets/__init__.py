"""One module a data set: `load(root, split)` and `to_sample(record, root)`; a name that starts with `_` is no data set."""
