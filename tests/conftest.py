"""Settings and fixtures shared by every test: what runs offline, with warnings as errors, and beside other tests."""

import os
import subprocess
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that wants a hub starts its own and says so
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: BLAS need not take all of them in each
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(_name, "1")

TESTS = Path(__file__).parent


@pytest.fixture
def start_process():
    """Start a process that ends with the test, however that ends: `start(command)` gives a `Popen` with text pipes.

    It finds the package and the helpers beside the tests.
    """
    started = []
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])

    def start(command, **environment):
        started.append(
            subprocess.Popen(
                [str(part) for part in command],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path, **environment},
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()  # reads what is left and closes the pipes


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """Folder of a random checkpoint to train on (`small_runs.py`)."""
    from small_runs import write_small_model

    return write_small_model(tmp_path_factory.mktemp("small") / "model")


def pytest_xdist_auto_num_workers(config):
    """A process for each core, four at most; files and tests that are named run in one, without the start of others."""
    if config.args_source is config.ArgsSource.ARGS:
        config.option.dist = "no"
        return 0
    return min(4, os.cpu_count() or 1)
