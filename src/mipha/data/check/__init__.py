"""The linter: a whole data set read as training will read it, and what is wrong with it.

Read `linter.py` first, then `rows.py` (one row by itself) and `whole_set.py` (rows together).
"""
