"""Public benchmarks, read from the files of their releases: nothing is downloaded.

    benchmark = read_benchmark("videomme", "/data/Video-MME", subtitles=True)
    benchmark.rows, benchmark.budgets["qwen3_vl"], benchmark.missing

One module a benchmark: its docstring says which files, columns and folders it expects, and where that is known from.
Each yields rows in the form of `mlxvr.data.rows`, which checks them as it checks everybody's; a row that fails is
listed in `skipped`, a row without its video counts in `missing_rows`. Rows carry question and options only: the words
that ask for a box are the prompt's (`mlxvr.model.prompt`), the same for all of them.
"""

from mlxvr.data.benchmarks.benchmark import Benchmark
from mlxvr.data.benchmarks.benchmark_registry import BENCHMARKS, read_benchmark

__all__ = ["BENCHMARKS", "Benchmark", "read_benchmark"]
