"""The benchmarks run, at their smallest, and print what the README quotes from them; what they print is not judged."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RUNS = {
    "answers": (["--tokens", "64", "--repeats", "1"], r"think / early exit +\d+\.\d\d\n.*to the first token +\d"),
    "startup": (["--repeats", "1"], r"in all +\d+\.\d\d"),
    "frames": (["--only", "720p", "--repeats", "1", "--no-peer"], r"120 frames, 120 of 120 right"),
    "grpo": (
        ["--prompts", "512", "--groups", "4", "--tokens", "4", "--repeats", "1", "--peer-completions", "2"],
        r"\| 512 \| 4 \|.* [\d.]+x \|",
    ),
    "quantization": (["--count", "2", "--table", "kept", "--clips", "{folder}"], r"\| last layer 8 \|.*0 of \d"),
}
TOO_LARGE = {
    "conversion": "writes checkpoints of gigabytes",
    "head": "a vocabulary of 152,000 in bfloat16 takes minutes on a CPU",
}


def test_each_benchmark_is_run_here_or_is_too_large():
    scripts = {path.stem for path in (HERE / "benchmarks").glob("*.py") if path.stem != "__init__"}
    assert scripts == RUNS.keys() | TOO_LARGE.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_it_runs(name, tmp_path):
    arguments, printed = RUNS[name]
    command = [sys.executable, "-m", f"tests.benchmarks.{name}"]
    command += [part.format(folder=tmp_path / "clips") for part in arguments]
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=HERE.parent, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert re.search(printed, done.stdout, re.DOTALL), done.stdout


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_is_too_large_can_be_started(name):
    done = subprocess.run(
        [sys.executable, "-m", f"tests.benchmarks.{name}", "--help"], capture_output=True, text=True, cwd=HERE.parent
    )
    assert done.returncode == 0, done.stderr
    assert "--repeats" in done.stdout
