"""Written pages of 96 pixels, for the smallest models; see `written_page`."""

from mipha.data.datasets.written_page_mini import PAGES
from mipha.evaluation.benchmarks.written_page import make_benchmark

BENCHMARK = make_benchmark(PAGES)
