"""The data sets: every file here is one, and declares `DATASET` (`data/dataset.py`).

The four modules with an underscore are tools to write one with: `_records` indexes JSON, tables
and the files of a split, `_images` follows the images that a record names, `_columns` reads Arrow
columns, `_shapes` tells apart what a record of own data is.
"""
