"""RefCOCO+: RefCOCO's question with expressions that name no place in the image; see `refcoco`."""

from mipha.evaluation.benchmarks.refcoco import Collection, make_benchmark

BENCHMARK = make_benchmark(
    Collection("refcoco_plus", "RefCOCOplus", {"val": 10_758, "testA": 5_726, "testB": 4_889})
)
