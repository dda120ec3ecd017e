"""Pages of 96 pixels with a few digits: `written_page` for models that train in a minute.

Digits are 8 or 16 pixels high, 4 or 8 on a page that is squeezed into a square of 48. They stand in
cells of their own height, so patches of 8 pixels and tiles of 48 cut none in two, and a tower need
not learn to read at every offset.
"""

from mipha.data.datasets.written_page import Layout, data_set

PAGES = Layout(
    "written_page_mini", side=96, aspects=((1, 1),), heights=(8, 16), digits=1, on_grid=True
)

DATASET = data_set(PAGES)
