from mipha.data.datasets.written_page_mini import PAGES
from mipha.evaluation.benchmark import load_benchmark


def test_it_is_asked_about_its_own_pages() -> None:
    benchmark = load_benchmark("written_page_mini")
    assert benchmark.name == PAGES.name
    names = [metric.name for metric in benchmark.metrics]
    assert [name for name in names if name.startswith("height_")] == ["height_8", "height_16"]


OFFICIAL = None  # drawn: there are no files that could be missing or wrong
