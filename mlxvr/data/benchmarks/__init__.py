"""Public benchmarks, read from the files of their releases: nothing is downloaded.

    benchmark = read_benchmark("videomme", "/data/Video-MME", subtitles=True)
    benchmark.rows, benchmark.limits, benchmark.missing

Each benchmark has a module, whose docstring lists the files, columns and folders that it expects, with their source.
It yields records in the form of `mlxvr.data.rows`, which checks them like any other; a row that fails is listed in
`skipped`, and a row without its video counts in `missing_rows`. Rows hold only the question and its options: the
instruction to write a box belongs to the prompt (`mlxvr.model.prompt`) and is the same for all benchmarks.
"""

from mlxvr.data.benchmarks.benchmark import Benchmark
from mlxvr.data.benchmarks.benchmark_registry import BENCHMARKS, read_benchmark

__all__ = ["BENCHMARKS", "Benchmark", "read_benchmark"]
