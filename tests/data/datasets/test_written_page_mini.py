"""The layout of the mini pages; what holds of all drawn pages is in test_written_page.py."""

from mipha.data.datasets.written_page_mini import DATASET, PAGES


def test_the_module_is_the_data_set_of_its_layout() -> None:
    assert DATASET.name == PAGES.name == "written_page_mini"
    assert (PAGES.side, PAGES.digits, PAGES.on_grid) == (96, 1, True)
