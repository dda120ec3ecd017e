"""MMBench in Chinese: multiple choice with rotated options (CircularEval), dev split of 2023-10-03.

See `mmbench` for the code that both languages share.
"""

from mipha.evaluation.benchmarks.mmbench import CHINESE, make_benchmark

BENCHMARK = make_benchmark(CHINESE)
