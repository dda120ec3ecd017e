"""One file a benchmark; what such a file must have is written in `mipha.evaluation.benchmark`."""
