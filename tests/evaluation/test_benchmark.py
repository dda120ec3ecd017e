from __future__ import annotations

import inspect

import pytest

from mipha.evaluation.benchmark import Metric, list_benchmarks, load_benchmark


@pytest.mark.parametrize("name", list_benchmarks())
def test_every_benchmark_keeps_the_contract(name: str) -> None:
    benchmark = load_benchmark(name)
    assert all(
        isinstance(metric, Metric) and metric.unit and metric.description
        for metric in benchmark.METRICS
    )
    assert len({metric.name for metric in benchmark.METRICS}) == len(benchmark.METRICS)
    assert benchmark.SPLITS and benchmark.PROTOCOL and benchmark.MAX_NEW_TOKENS > 0
    assert all(callable(answer) for answer in benchmark.BASELINES.values())
    assert list(inspect.signature(benchmark.questions).parameters) == ["root", "split"]
    assert benchmark.JUDGE in (None, "optional", "required")
    assert list(inspect.signature(benchmark.score).parameters) == [
        "questions",
        "predictions",
        *(["judge"] if benchmark.JUDGE else []),
    ]
    assert list(inspect.signature(benchmark.annotations).parameters) == ["path"]
    assert list(inspect.signature(benchmark.measure).parameters) == ["totals"]
    assert list(inspect.signature(benchmark.submission).parameters) == ["questions", "predictions"]
    assert list(inspect.signature(benchmark.doubts).parameters) == ["questions", "split"]
    assert set(benchmark.SIZES) == set(benchmark.SPLITS) and set(benchmark.SERVERS) <= set(
        benchmark.SPLITS
    )
    assert benchmark.SOURCE.startswith("get ") and not benchmark.SOURCE.endswith("."), (
        "it stands in the middle of sentences"
    )


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no benchmark 'easyvqa': did you mean easy_vqa"):
        load_benchmark("easyvqa")
    with pytest.raises(ValueError, match="no benchmark"):
        load_benchmark("../benchmark")
