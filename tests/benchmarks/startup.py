"""From nothing to the demo's first answer: import, load, open, ask, each in a fresh process.

python -m tests.benchmarks.startup [--repeats 5]
"""

import argparse
import json
import statistics
import subprocess
import sys

SCRIPT = """
import json, time
started = time.perf_counter()
import mlxvr
from mlxvr.checkpoint.bundled import demo_folder
row = json.loads((demo_folder() / "clips.jsonl").read_text().splitlines()[0])
reasoner = mlxvr.load()
loaded = time.perf_counter()
clip = reasoner.open(demo_folder() / row["video"])
opened = time.perf_counter()
events = clip.stream(row["question"], options=row["options"], mode="direct")
next(events)
answered = time.perf_counter()
events.close()
reasoner.close()
print(json.dumps({"import and load": loaded - started, "read the clip": opened - loaded,
                  "first answer": answered - opened, "in all": answered - started}))
"""


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    runs = []
    for _ in range(repeats + 1):  # the first warms the disk's cache
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    print(f"seconds, median of {repeats} fresh processes")
    for name in runs[0]:
        print(f"  {name:<16} {statistics.median(run[name] for run in runs[1:]):.2f}")


if __name__ == "__main__":
    main()
