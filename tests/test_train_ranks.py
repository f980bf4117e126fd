"""Training on two ranks: as on one, and what happens when one of them is lost, stopped or given something else.

The ranks are processes on this machine that meet over the ring. Each has an output folder of its own, as on two
machines that share no disk. They note what they sampled and the bits of their adapter after each step.
"""

import json
import os
import subprocess

import mlx.core as mx
import numpy as np
import pytest
from small_runs import EQUAL, command, make_settings
from test_distributed import hosts_file

from mlxvr.checkpoint.bundled import demo_folder
from mlxvr.errors import ConfigError
from mlxvr.grpo.data_order import batches
from mlxvr.grpo.shared_state import check_same, have_same_bits, shared_state
from mlxvr.grpo.train_state import state_file
from mlxvr.runtime.distributed import ProcessGroup

# Two orders of adding up the same float32 gradients differ in the last bits of a sum. AdamW divides by the gradient's
# own size, so that the weights differ by a share of the learning rate: 5e-4 of it was found, and this is allowed.
RATE = 1e-3
TOLERANCE = 1e-2 * RATE

ROWS = 5
BATCH = 4
STEPS = 3  # four rows; one row, so that rank 1 has none; four rows of the second epoch
TESTS = os.path.dirname(__file__)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with rows to train on."""
    folder = tmp_path_factory.mktemp("ranks")
    records = [json.loads(line) for line in (demo_folder() / "clips.jsonl").read_text().splitlines()[: 2 * ROWS : 2]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def start(place, small_model):
    """Train on so many ranks: (stderr, exit code) of each. Signals and flags are by rank.

    In the last step nothing can be learned from the rows of rank 1.
    """
    ids = [json.loads(line)["id"] for line in (place / "rows.jsonl").read_text().splitlines()]
    last = batches(ROWS, batch_size=BATCH, seed=0, epoch=1, rank=1, ranks=2)[0]
    equal = json.dumps({STEPS: [ids[index] for index in last]})

    def start(name, *, count=2, signals=None, flags=None):
        hosts = {} if count == 1 else {"MLX_HOSTFILE": str(hosts_file(place, count))}
        path = os.pathsep.join([os.path.dirname(TESTS), TESTS])
        ranks = []
        for rank in range(count):
            settings = make_settings(
                small_model,
                place / f"{name}{rank}",
                data=place / "rows.jsonl",
                media_root=demo_folder(),
                steps=STEPS,
                epochs=2,
                batch_size=BATCH,
                learning_rate=RATE,
                save_every=1,
            )
            stop, at = (signals or {}).get(rank, ("SIGINT", 0))
            more = (flags or {}).get(rank, [])
            argv = command(place / f"{name}{rank}.notes", settings, *more, stop=stop, at=at)
            ranks.append(
                subprocess.Popen(
                    [str(part) for part in argv],
                    env={**os.environ, "PYTHONPATH": path, EQUAL: equal, **hosts, "MLX_RANK": str(rank)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    cwd=place,
                )
            )
        try:
            said = [rank.communicate(timeout=300) for rank in ranks]
        except subprocess.TimeoutExpired:
            for rank in ranks:
                rank.kill()
            pytest.fail(f"a rank waits for ever; what they said: {[rank.communicate()[1] for rank in ranks]}")
        finally:  # nothing goes on behind the test, and no pipe stays open
            for rank in ranks:
                rank.kill()
                rank.communicate()
        return [(err, rank.returncode) for (_, err), rank in zip(said, ranks)]

    return start


def notes(place, name):
    return [json.loads(line) for line in (place / f"{name}.notes").read_text().splitlines()]


def entries(place, name):
    return [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]


def weights(place, name):
    return {key: np.array(array) for key, array in mx.load(str(place / name / "adapters.safetensors")).items()}


def differ(one, other):
    """The largest difference of two adapters."""
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def errors(stderr):
    return [line for line in stderr.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def alone(start):
    said = start("alone", count=1)
    assert said[0][1] == 0, said
    return "alone0"


@pytest.fixture(scope="module")
def together(start):
    said = start("together")
    assert [code for _, code in said] == [0, 0], said
    assert not any("no longer the same" in err for err, _ in said)
    return "together0"


def test_ranks_share_the_rows_and_sample_the_same(place, alone, together):
    whole, shares = notes(place, alone), [notes(place, f"together{rank}") for rank in range(2)]
    assert [len(step["texts"]) for step in whole] == [4, 1, 4]
    assert [[len(step["texts"]) for step in share] for share in shares] == [[2, 1, 2], [2, 0, 2]]
    for one, first, second in zip(whole, *shares):
        assert one["texts"].keys() == first["texts"].keys() | second["texts"].keys()
    assert whole[0]["texts"] == shares[0][0]["texts"] | shares[1][0]["texts"]
    assert len({text for group in whole[0]["texts"].values() for text in group}) > 4, "completions vary"
    assert len(whole[0]["varied"]) > 2, "the order of the sum is another one"
    assert shares[0][2]["varied"], "rank 0 learns in the last step"
    assert shares[1][2]["varied"] == [], "and rank 1 has nothing to learn from"


def test_the_trajectory_is_that_of_one_rank(place, alone, together):
    one, two = entries(place, alone), entries(place, together)
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two] == [1, 2, 3]
    timed = {"tokens_per_second", "rollout_seconds", "update_seconds", "peak_memory"}
    for ours, theirs in zip(one, two):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - timed:
            expected = None if ours[name] is None else pytest.approx(ours[name], rel=1e-3, abs=1e-6)
            assert theirs[name] == expected, (ours["step"], name)
    lengths = {f"completions/{name}" for name in ("mean_length", "max_length", "clipped_ratio")}
    sampled = {"reward", "reward_std", *lengths, "frac_reward_zero_std", "entropy", "rows"}
    assert {name: one[0][name] for name in sampled} == {name: two[0][name] for name in sampled}
    assert all(entry["grad_norm"] > 0 for entry in one), "every step changes something"
    found = weights(place, alone)
    assert max(float(np.abs(array).max()) for name, array in found.items() if name.endswith("lora_b")) > RATE / 2
    assert differ(found, weights(place, together)) <= TOLERANCE


def test_ranks_end_with_the_same_bits(place, together):
    shares = [notes(place, f"together{rank}") for rank in range(2)]
    assert [step["bits"] for step in shares[0]] == [step["bits"] for step in shares[1]]
    assert len({step["bits"] for step in shares[0]}) == STEPS


def test_only_rank_0_writes(place, together):
    found = {path.name for path in (place / "together0").iterdir()}
    assert {"adapters.safetensors", "adapter_config.json", "metrics.jsonl", "state", "train_config.toml"} <= found
    assert not (place / "together1").exists()


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_leaves_a_run_that_goes_on(start, place, alone, lost):
    """A rank is killed when both have sampled for step 2; one process goes on to the end."""
    name = f"killed{lost}"
    said = start(name, signals={lost: ("SIGKILL", 2)})
    (err, code), (_, died) = said[1 - lost], said[lost]
    assert (code, died) == (2, -9)
    assert len(errors(err)) == 1, err
    assert errors(err)[0].startswith("error: another rank is gone (")
    assert "Traceback" not in err
    assert [entry["step"] for entry in entries(place, f"{name}0")] == [1]
    assert state_file(place / f"{name}0").is_file()
    said = start(name, count=1, flags={0: ["--resume"]})
    assert said[0][1] == 0, said
    assert [entry["step"] for entry in entries(place, f"{name}0")] == [1, 2, 3]
    assert differ(weights(place, alone), weights(place, f"{name}0")) <= TOLERANCE


@pytest.mark.slow
def test_ctrl_c_of_one_rank_stops_all_after_the_same_step(start, place, together):
    """Both end with 130, and both go on: rank 1 with the state of rank 0, to the bits of a run without a stop."""
    said = start("stopped", signals={1: ("SIGINT", 1)})
    assert [code for _, code in said] == [130, 130], said
    assert [len(notes(place, f"stopped{rank}")) for rank in range(2)] == [1, 1]
    assert [entry["step"] for entry in entries(place, "stopped0")] == [1]
    assert "stopping after this step" in said[1][0]
    said = start("stopped", flags={0: ["--resume"], 1: ["--resume"]})
    assert [code for _, code in said] == [0, 0], said
    assert not (place / "stopped1").exists()
    bits = [[step["bits"] for step in notes(place, f"stopped{rank}")] for rank in range(2)]
    assert bits[0] == bits[1] == [step["bits"] for step in notes(place, together)]
    assert differ(weights(place, together), weights(place, "stopped0")) == 0.0


def test_ranks_with_different_settings_refuse_to_start(start, place):
    said = start("different", flags={1: ["--learning-rate", "0.5"]})
    assert [code for _, code in said] == [2, 2], said
    for err, _ in said:
        assert errors(err) == [
            "error: rank 1 has learning_rate 0.5, and rank 0 has 0.001: give all ranks the same model, data, settings "
            "and versions"
        ]
    assert not state_file(place / "different0").exists()


@pytest.mark.slow
def test_a_rank_that_cannot_start_is_no_riddle_for_the_others(start, place):
    said = start("missing", flags={1: ["--data", place / "nowhere.jsonl"]})
    assert [code for _, code in said] == [2, 2], said
    assert "nowhere.jsonl" in errors(said[1][0])[0]
    assert errors(said[0][0])[0].startswith("error: another rank is gone (")


def test_filtering_is_for_one_process(start):
    said = start("filtered", flags={rank: ["--filter-only"] for rank in range(2)})
    assert [code for _, code in said] == [2, 2], said
    assert all("filter_only is for one process" in errors(err)[0] for err, _ in said)


class Several(ProcessGroup):
    """This rank among others that say what the test wants."""

    def __init__(self, rank, change):
        super().__init__()
        self.rank, self.size, self._change = rank, 2, change

    def all_gather(self, data):
        other = self._change(data)
        return [data, other] if self.rank == 0 else [other, data]

    def broadcast(self, data):
        return b"state of rank 0"


def test_what_is_the_same_is_no_error():
    check_same(Several(0, lambda data: data), {"seed": 1})
    assert have_same_bits(Several(0, lambda data: data), {"a": mx.array([1.0, 2.0])})


def test_what_one_rank_alone_has_is_named():
    with pytest.raises(ConfigError, match=r"rank 1 has more 1, and rank 0 has None: give all ranks"):
        check_same(Several(0, lambda data: b'{"more": 1}'), {})


def test_adapters_that_drift_apart_are_noticed():
    arrays = {"a": mx.array([1.0, 2.0]), "b": mx.zeros((2, 2))}
    drifted = {**arrays, "a": mx.array([1.0, float(np.nextafter(np.float32(2.0), np.float32(3.0)))])}
    seen = []
    have_same_bits(Several(1, lambda data: seen.append(data) or data), drifted)
    assert not have_same_bits(Several(0, lambda data: seen[0]), arrays)
    assert have_same_bits(Several(0, lambda data: seen[0]), drifted)


def test_the_state_of_rank_0_comes_to_others_in_a_folder_that_goes_away(tmp_path):
    with shared_state(Several(1, bytes), tmp_path / "nothing") as folder:
        assert state_file(folder).read_bytes() == b"state of rank 0"
    assert not folder.exists()
    with pytest.raises(ConfigError, match="cannot be read"), shared_state(Several(0, bytes), tmp_path / "nothing"):
        pass
    with shared_state(ProcessGroup(), tmp_path) as folder:
        assert folder == tmp_path
