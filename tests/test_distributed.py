"""Processes that work on one thing: what they gather, sum and share, and that none waits for one that is gone."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxvr
from mlxvr.runtime.distributed import ProcessGroup

CODE = """
import json
import os
import signal
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxvr.runtime import distributed as module
from mlxvr.errors import ConfigError
from mlxvr.runtime.distributed import ProcessGroup


def work(ranks, folder):
    numbers = np.random.default_rng(ranks.rank)
    arrays = {
        "b": mx.array(numbers.standard_normal((3, 5)), dtype=mx.float32),
        "a": mx.array(numbers.standard_normal(1000), dtype=mx.float32),
        "half": mx.array(numbers.standard_normal(7), dtype=mx.bfloat16),
        "one": mx.array(float(ranks.rank), dtype=mx.float32),
    }
    module._MESSAGE_NUMBERS, module._MESSAGE_BYTES = 300, 4  # several messages
    np.savez(folder / f"sum{ranks.rank}.npz", **{name: np.array(one) for name, one in ranks.all_sum(arrays).items()})
    told = [ranks.all_gather(data).__repr__() for data in (b"x" * (3 * ranks.rank), str(ranks.rank).encode(), b"")]
    told.append(repr(ranks.broadcast(b"rank 0 says so" if ranks.rank == 0 else b"nobody listens to this one")))
    told.append(repr(ranks.broadcast(b"")))
    (folder / f"told{ranks.rank}.json").write_text(json.dumps([ranks.rank, ranks.size, told]))


def arrive(ranks, folder):
    time.sleep(0.5 * ranks.rank)
    (folder / f"here{ranks.rank}").touch()
    ranks.barrier()
    sys.exit(0 if (folder / "here0").exists() and (folder / "here1").exists() else 1)


def lose(ranks, folder, how, collective):
    ranks.barrier()
    if ranks.rank == 1:
        time.sleep(0.3 if how == "later" else 0.0)
        os._exit(0) if how == "exit" else os.kill(os.getpid(), signal.SIGKILL)
    collectives = {
        "gather": lambda: ranks.all_gather(b"data"),
        "sum": lambda: ranks.all_sum({"a": mx.ones(100_000)}),
        "wait": ranks.barrier,
    }
    for _ in range(2):  # it stays lost, and nobody waits: MLX's own ring may, in the second
        try:
            collectives[collective]()
        except ConfigError as error:
            print(error)
        else:
            print("nobody noticed")


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    globals()[what](ProcessGroup(), Path(folder), *rest)
"""


def hosts_file(folder, count=2):
    """Where each of so many ranks on this machine is reached.

    The ports lie below those that the system gives to connections: one that is handed out between this and the rank's
    own start would be taken, or a rank would connect to itself.
    """
    listening = []
    while len(listening) < count:
        candidate = socket.socket()
        try:
            candidate.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000)))
        except OSError:
            candidate.close()
        else:
            listening.append(candidate)
    path = folder / "hosts.json"
    path.write_text(json.dumps([[f"127.0.0.1:{taken.getsockname()[1]}"] for taken in listening]))
    for taken in listening:
        taken.close()
    return path


def start(folder, *argv, count=2):
    """So many ranks on one task; what each said and its exit code."""
    script = folder / "script.py"
    script.write_text(CODE)
    package = {"PYTHONPATH": str(Path(mlxvr.__file__).parents[1]), "MLX_HOSTFILE": str(hosts_file(folder, count))}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), argv[0], str(folder), *argv[1:]],
            env={**os.environ, **package, "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        return [(*rank.communicate(timeout=300), rank.returncode) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize("count", [2, 3])
def test_sums_and_bytes_are_the_same_everywhere(tmp_path, count):
    """Of two ranks, a sum has no order: it is exactly NumPy's sum of float32."""
    results = start(tmp_path, "work", count=count)
    assert [code for *_, code in results] == [0] * count, results
    sums = [dict(np.load(tmp_path / f"sum{rank}.npz")) for rank in range(count)]
    expected = {"b": 0.0, "a": 0.0, "half": 0.0, "one": 0.0}
    for rank in range(count):
        numbers = np.random.default_rng(rank)
        expected["b"] += numbers.standard_normal((3, 5)).astype(np.float32).astype(float)
        expected["a"] += numbers.standard_normal(1000).astype(np.float32).astype(float)
        half = mx.array(numbers.standard_normal(7), dtype=mx.bfloat16).astype(mx.float32)
        expected["half"] += np.array(half).astype(float)
        expected["one"] += rank
    for name, value in expected.items():
        assert all(rank_sums[name].tobytes() == sums[0][name].tobytes() for rank_sums in sums), "the same bits"
        assert sums[0][name].dtype == np.float32
        assert sums[0][name].shape == np.shape(value)
        np.testing.assert_allclose(sums[0][name], value, rtol=0, atol=1e-6)
    if count == 2:
        addends = [np.random.default_rng(rank).standard_normal((3, 5)).astype(np.float32) for rank in range(2)]
        assert sums[0]["b"].tobytes() == (addends[0] + addends[1]).tobytes()
    for rank in range(count):
        received = json.loads((tmp_path / f"told{rank}.json").read_text())
        gathered = [
            [b"x" * (3 * sender) for sender in range(count)],
            [str(sender).encode() for sender in range(count)],
            [b""] * count,
        ]
        assert received == [rank, count, [*map(repr, gathered), repr(b"rank 0 says so"), repr(b"")]]


def test_waiting_ends_when_all_are_there(tmp_path):
    assert [code for *_, code in start(tmp_path, "arrive")] == [0, 0]


@pytest.mark.parametrize(
    ("how", "collective"),
    [("exit", "wait"), ("kill", "gather"), ("kill", "sum"), ("later", "gather"), ("later", "sum")],
)
def test_a_rank_that_dies_is_an_error_for_the_others(tmp_path, how, collective):
    begun = time.monotonic()
    (output, _, code), (_, _, died) = start(tmp_path, "lose", how, collective)
    assert time.monotonic() - begun < 30
    assert (code, died) == (0, 0 if how == "exit" else -9)
    lines = output.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("another rank is gone (")
        assert line.endswith("start all ranks again; the work continues from where it was last saved")


@pytest.mark.parametrize(
    ("hosts", "rank"), [("no JSON", 0), ('[["999.1.1.1:1"], ["127.0.0.1:2"]]', 0), ('[["127.0.0.1:1"]]', 7)]
)
def test_hosts_that_cannot_be_are_an_error(tmp_path, hosts, rank):
    (tmp_path / "hosts.json").write_text(hosts)
    package = {"PYTHONPATH": str(Path(mlxvr.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", "from mlxvr.runtime.distributed import ProcessGroup\nProcessGroup()"],
        env={**os.environ, **package, "MLX_HOSTFILE": str(tmp_path / "hosts.json"), "MLX_RANK": str(rank)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "ConfigError: the other ranks cannot be reached" in last
    assert last.endswith("check the hosts of the launcher")


def test_alone_nothing_is_sent():
    ranks = ProcessGroup()
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.all_gather(b"mine") == [b"mine"]
    assert ranks.broadcast(b"mine") == b"mine"
    ranks.barrier()
    summed = ranks.all_sum({"a": mx.array([0.1, 2.0], dtype=mx.bfloat16)})["a"]
    assert summed.dtype == mx.float32
    assert summed.tolist() == [0.10009765625, 2.0]


def test_the_launcher_of_mlx_starts_ranks(tmp_path):
    launcher = Path(sys.executable).parent / "mlx.launch"
    if not launcher.exists():
        pytest.skip("mlx.launch is not beside this interpreter")
    script = tmp_path / "script.py"
    script.write_text(CODE)
    port = json.loads(hosts_file(tmp_path).read_text())[0][0].partition(":")[2]
    process = subprocess.Popen(
        [launcher, "-n", "2", "-p", port, "--backend", "ring", "--", sys.executable, script, "work", tmp_path],
        env={**os.environ, "PYTHONPATH": str(Path(mlxvr.__file__).parents[1])},
        stdin=subprocess.PIPE,  # it passes on what it reads there
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        process.wait(timeout=300)
    finally:
        process.kill()
        output = process.communicate()
    sizes = [json.loads((tmp_path / f"told{rank}.json").read_text())[:2] for rank in range(2)]
    assert sizes == [[0, 2], [1, 2]], output
