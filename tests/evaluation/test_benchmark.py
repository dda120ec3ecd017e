from __future__ import annotations

import inspect

import pytest

from mipha.evaluation.benchmark import Metric, Plan, Split, list_benchmarks, load_benchmark


@pytest.mark.parametrize("name", list_benchmarks())
def test_every_benchmark_keeps_the_contract(name: str) -> None:
    benchmark = load_benchmark(name)
    assert benchmark.name == name
    assert all(isinstance(metric, Metric) for metric in benchmark.metrics)
    assert all(metric.unit and metric.description for metric in benchmark.metrics)
    assert len({metric.name for metric in benchmark.metrics}) == len(benchmark.metrics)
    assert benchmark.splits and all(split.size > 0 for split in benchmark.splits.values())
    assert benchmark.protocol and (benchmark.max_new_tokens > 0) != benchmark.by_likelihood
    assert benchmark.source.startswith("get ") and not benchmark.source.endswith("."), (
        "it stands in the middle of sentences"
    )
    private = [name for name, split in benchmark.splits.items() if split.server]
    assert benchmark.submission or not private, "a server takes an upload"
    assert all(callable(answer) for answer in benchmark.baselines.values())
    assert benchmark.judge in (None, "optional", "required")


@pytest.mark.parametrize("name", list_benchmarks())
def test_every_function_is_called_in_one_way(name: str) -> None:
    def parameters(function: object) -> list[str]:
        return list(inspect.signature(function).parameters)  # type: ignore[arg-type]

    benchmark = load_benchmark(name)
    assert parameters(benchmark.read) == ["root", "split"]
    assert parameters(benchmark.read_labels) == ["path"]
    assert parameters(benchmark.score) == ["questions", "predictions", "judge"]
    assert parameters(benchmark.measure) == ["totals"]
    if benchmark.submission:
        assert parameters(benchmark.submission) == ["questions", "predictions"]
    if benchmark.doubts:
        assert parameters(benchmark.doubts) == ["questions", "split"]


def test_answers_are_as_long_as_in_the_protocol() -> None:
    """Sources: LLaVA c121f043 `model_vqa_loader.py` (128), `model_vqa_mmbench.py`,
    `model_vqa_science.py`, `model_vqa.py` (1024); lmms-eval `ai2d.yaml` (16); MathVista's
    `generate_response.py` (512); those of easy-VQA and written
    pages are our own, and likelihoods need none."""
    long = {"mmbench", "mmbench_cn", "mmvet", "scienceqa"}
    wanted = {name: 1024 if name in long else 128 for name in list_benchmarks()}
    wanted |= {"easy_vqa": 32, "ai2d": 16, "mathvista": 512, "arc": 0, "wikitext": 0}
    wanted |= {"written_page": 16, "written_page_mini": 16}
    assert {name: load_benchmark(name).max_new_tokens for name in wanted} == wanted


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no benchmark 'easyvqa': did you mean easy_vqa"):
        load_benchmark("easyvqa")
    with pytest.raises(ValueError, match="no benchmark"):
        load_benchmark("../benchmark")


def test_a_metric_is_found_by_its_name_or_its_group() -> None:
    benchmark = load_benchmark("mme")
    assert benchmark.headline is benchmark.metric("perception") is benchmark.metrics[0]
    assert benchmark.metric("OCR.score").unit == "points"
    assert benchmark.metric("OCR.acc").name == "OCR"
    with pytest.raises(AssertionError, match="the metrics of mme lack humour"):
        benchmark.metric("humour")


def test_results_of_another_split_and_of_grey_images_have_folders_of_their_own() -> None:
    benchmark = load_benchmark("vizwiz")
    assert benchmark.splits["val"] == Split(4319)
    keys = [
        Plan(benchmark, split, [], blind=blind).key
        for split in ("val", "test")
        for blind in (False, True)
    ]
    assert keys == ["vizwiz", "vizwiz-blind", "vizwiz-test", "vizwiz-test-blind"]
