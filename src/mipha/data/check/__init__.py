"""The linter: a whole data set read as training will read it, and everything that is wrong with it, row by row."""
