"""RefCOCOg: RefCOCO's question with longer expressions, split by images (UMD); see `refcoco`."""

from mipha.evaluation.benchmarks.refcoco import Collection, make_benchmark

BENCHMARK = make_benchmark(Collection("refcocog", "RefCOCOg", {"val": 4_896, "test": 9_602}))
