"""`mlxvr.doctor`: green where numbers are right, red where a kernel is wrong, hangs or takes the process down."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxvr
from mlxvr import doctor
from mlxvr.diagnosis import check_logits, check_speed, check_training, environment, reference
from mlxvr.diagnosis.checks import CHECKS, find
from mlxvr.diagnosis.findings import Finding, judge, worst
from mlxvr.diagnosis.supervisor import CHILD, run_checks


def statuses(name: str) -> set[str]:
    return {finding.status for finding in find(name)()}


class TestFindings:
    @pytest.mark.parametrize(
        ("error", "status"), [(0.0, "green"), (0.1, "green"), (0.11, "yellow"), (0.2, "red"), (float("nan"), "red")]
    )
    def test_limits(self, error, status):
        found = judge("x", error, green=0.1, red=0.2, what="error", advice="do this")
        assert found.status == status
        assert found.advice == ("" if status == "green" else "do this")
        assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["check"] == "x"

    def test_the_worst_counts(self):
        made = [Finding(check="a", status=status, text="") for status in ("green", "yellow", "red", "green")]
        assert [worst(made[:count]) for count in (0, 1, 2, 3, 4)] == ["green", "green", "yellow", "red", "red"]

    def test_every_check_exists(self):
        assert all(callable(find(name)) for name in CHECKS)


def test_unpacking_by_hand():
    """Eight 4-bit numbers of a word, the lowest first: 1, 2, .., 8; scale 2, bias 10."""
    word = sum(number << (4 * place) for place, number in enumerate(range(1, 9)))
    found = reference.unpack(np.array([[word]], np.uint32), np.array([[2.0]], np.float32), np.array([[10.0]]), 4)
    assert found.tolist() == [[12.0, 14.0, 16.0, 18.0, 20.0, 22.0, 24.0, 26.0]]


def test_packing_by_hand():
    """From -1 to 14 in steps of one: the numbers 0 to 15, four groups of which fill a group of 64."""
    weight = np.tile(np.arange(-1.0, 15.0, dtype=np.float32), 4)[None]
    packed, step, least = reference.pack(weight)
    assert (step.tolist(), least.tolist()) == ([[1.0]], [[-1.0]])
    assert [hex(word) for word in packed[0, :2].tolist()] == ["0x76543210", "0xfedcba98"]
    assert np.array_equal(reference.unpack(packed, step, least, 4), weight)


class TestRightNumbers:
    @pytest.mark.parametrize("name", ["frames", "chunks", "packing", "gradient", "cancel"])
    def test_green_here(self, name):
        found = list(find(name)())
        assert found
        assert {finding.status for finding in found} <= {"green"}, found

    @pytest.mark.slow  # the checks that take longest
    @pytest.mark.parametrize(
        "name", ["answer", "logits", "products", "follow-up", "rollout", "repeats", "reasoners", "memory"]
    )
    def test_all_else_is_green_here(self, name):
        found = list(find(name)())
        assert {finding.status for finding in found} <= {"green"}, found


class TestWrongKernels:
    """Each is wrong by some percent, as a real fault might be, and must not pass."""

    @pytest.mark.parametrize(
        ("module", "kernel", "way"),
        [
            (mx.fast, "scaled_dot_product_attention", ("float32", None, None)),
            (mx.fast, "rms_norm", ("bfloat16", None, None)),
            (mx, "quantized_matmul", ("float32", 4, None)),
            (mx, "quantized_matmul", ("float32", None, 8)),
        ],
    )
    def test_logits_are_red(self, monkeypatch, module, kernel, way):
        right = getattr(module, kernel)
        monkeypatch.setattr(module, kernel, lambda *arrays, **options: right(*arrays, **options) * 1.2)
        monkeypatch.setattr(check_logits, "_WAYS", {way: check_logits._WAYS[way]})
        assert "red" in statuses("logits")

    def test_quantized_products_are_red(self, monkeypatch):
        """Wrong from two rows on, as one backend is for groups as long as the row."""
        right = mx.quantized_matmul

        def wrong(inputs, *arguments, **options):
            found = right(inputs, *arguments, **options)
            return found if inputs.shape[0] < 2 else found[::-1]

        monkeypatch.setattr(mx, "quantized_matmul", wrong)
        assert statuses("products") == {"red"}

    @pytest.mark.slow
    def test_a_rounded_product_is_yellow(self, monkeypatch):
        """TF32 keeps 10 bits of a mantissa: worth a word, and no reason to distrust answers."""
        right = mx.quantized_matmul

        def rounded(inputs, *arguments, **options):
            bits = np.array(inputs).view(np.uint32) & np.uint32(0xFFFFE000)
            return right(mx.array(bits.view(np.float32)), *arguments, **options)

        monkeypatch.setattr(mx, "quantized_matmul", rounded)
        assert statuses("products") == {"yellow"}

    def test_gradients_that_vary_are_yellow(self, monkeypatch):
        calls = iter(range(10))
        right = check_training._gradient

        def varying(kind):
            number = next(calls)
            return {name: array + 1e-6 * number for name, array in right(kind).items()}

        monkeypatch.setattr(check_training, "_gradient", varying)
        assert statuses("repeats") == {"yellow"}

    def test_a_wrong_gradient_is_red(self, monkeypatch):
        right = check_training._gradient
        monkeypatch.setattr(check_training, "_gradient", lambda kind: {n: a * 1.1 for n, a in right(kind).items()})
        assert statuses("gradient") == {"red"}


class TestProcess:
    """What a crash or a hang of the checking process becomes."""

    def child(self, tmp_path: Path, body: str) -> list[str]:
        script = tmp_path / "child.py"
        script.write_text(
            "import os, sys, time\nfrom mlxvr.diagnosis import checks, child\nfrom mlxvr.diagnosis.findings import "
            "Finding\ndef fine():\n    yield Finding(check='fine', status='green', text='ok')\n"
            + textwrap.dedent(body)
            + "\nchild.find = {'machine': fine, 'chunks': bad, 'cancel': fine}.get"
            + "\nchild.main(sys.argv[1:], sys.stdout)\n",
            encoding="utf-8",
        )
        return [sys.executable, str(script)]

    def run(self, tmp_path, body, **options):
        return list(run_checks(["machine", "chunks", "cancel"], command=self.child(tmp_path, body), **options))

    def test_an_abort_is_one_red_line_and_the_rest_runs(self, tmp_path):
        body = """
        def bad():
            print("[METAL] Command buffer execution failed: Insufficient Memory", file=sys.stderr, flush=True)
            os.abort()
            yield
        """
        first, crashed, last = self.run(tmp_path, body)
        assert (first.status, crashed.status, last.status) == ("green", "red", "green")
        assert crashed.check == "chunks"
        assert "SIGABRT" in crashed.text
        assert "Insufficient Memory" in crashed.text

    def test_a_hang_is_one_red_line_and_the_rest_runs(self, tmp_path):
        body = "def bad():\n    time.sleep(600)\n    yield\n"
        first, hung, last = self.run(tmp_path, body, seconds_per_check=5.0)
        assert (first.status, hung.status, last.status) == ("green", "red", "green")
        assert "no result within 5 s" in hung.text

    def test_an_error_is_one_red_line_and_the_rest_runs(self, tmp_path):
        body = "def bad():\n    raise ImportError('no module named mlx_vlm')\n    yield\n"
        first, failed, last = self.run(tmp_path, body)
        assert (first.status, failed.status, last.status) == ("green", "red", "green")
        assert failed.text == "ImportError: no module named mlx_vlm"

    def test_a_python_that_does_not_start(self):
        found = list(run_checks(["machine"], command=[sys.executable, "-c", "import sys; sys.exit('broken')"]))
        assert [finding.status for finding in found] == ["red"]
        assert "broken" in found[0].text


class TestCommandLine:
    def run(self, monkeypatch, capsys, found, *arguments):
        monkeypatch.setattr("mlxvr.diagnosis.supervisor.run_checks", lambda names, **_: iter(found))
        code = doctor.main(list(arguments))
        return code, capsys.readouterr().out

    @pytest.mark.parametrize(("status", "code"), [("green", 0), ("yellow", 0), ("red", 1)])
    def test_exit_code_and_words(self, monkeypatch, capsys, status, code):
        made = [Finding(check="logits", status=status, text="found", advice="" if status == "green" else "do this")]
        returned, out = self.run(monkeypatch, capsys, made)
        assert returned == code
        assert f"{status:<6}  logits: found\n" in out
        assert ("do this" in out) == (status != "green")
        assert "\033" not in out, "no colors in a pipe"

    def test_json(self, monkeypatch, capsys):
        made = [Finding(check="logits", status="yellow", text="found", measured=0.5, limit=0.1, advice="do this")]
        code, out = self.run(monkeypatch, capsys, made, "--json")
        report = json.loads(out)
        assert code == 0
        assert report["status"] == "yellow"
        assert report["version"] == mlxvr.__version__
        assert report["findings"] == [made[0].to_dict()]

    def test_speed_can_be_left_out(self, monkeypatch):
        asked = []
        monkeypatch.setattr("mlxvr.diagnosis.supervisor.run_checks", lambda names, **_: asked.extend(names) or [])
        doctor.main(["--no-speed"])
        assert asked == [name for name in CHECKS if name != "speed"]

    def test_the_real_thing(self):
        """The child as it is, on its cheapest checks."""
        found = list(run_checks(["machine", "versions"], command=CHILD))
        assert {"machine", "backend", "Python", "packages"} <= {finding.check for finding in found}

    @pytest.mark.slow
    def test_all_of_it(self):
        command = [sys.executable, "-m", "mlxvr.doctor", "--json", "--no-speed"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=800)
        report = json.loads(done.stdout)
        not_green = [finding for finding in report["findings"] if finding["status"] == "red"]
        assert (done.returncode, not_green) == (0, [])
        assert len(report["findings"]) > 30


class TestVersions:
    def test_newer_than_tested_is_yellow_and_missing_is_red(self, monkeypatch):
        monkeypatch.setattr(environment, "NEWEST_TESTED", {"numpy": "1.0.0", "no-such-package": "1.0"})
        monkeypatch.setattr(environment, "NEWEST_TESTED_PYTHON", (3, 1))
        found = {finding.check: finding.status for finding in environment.check_versions()}
        assert found == {"Python": "yellow", "no-such-package": "red", "packages": "yellow"}

    def test_a_later_patch_counts_as_tested(self, monkeypatch):
        monkeypatch.setattr(environment, "NEWEST_TESTED", {"numpy": ".".join(np.__version__.split(".")[:2]) + ".0"})
        assert [f.status for f in environment.check_versions() if f.check == "packages"] == ["green"]


class TestSpeed:
    def test_the_prediction_by_hand(self):
        """36 layers, 27 blocks, 6,100 tokens of which 5,760 are 23,040 patches."""
        timings = check_speed.Timings(token=1e-6, context=1e-9, step=1e-4, head=2e-3, patch=1e-6, around=3e-6)
        found = check_speed.predict(timings)
        assert found.prompt_tokens == 6100
        assert found.vision_seconds == pytest.approx(30 * 23_040e-6)
        assert found.prefill_seconds == pytest.approx(36 * 6100 * (1e-6 + 1e-9 * 3050) + 2e-3)
        assert found.token_seconds == pytest.approx(36e-4 + 2e-3)
        assert found.direct_seconds == pytest.approx(found.vision_seconds + found.prefill_seconds + 8 * 5.6e-3)
        assert found.peak_bytes == pytest.approx(5.76e9 + 147_456 * 6144, rel=0.25)  # and a step of the prompt
        assert found.peak_bytes > 5.76e9 + 147_456 * 6144

    def test_a_machine_that_is_too_small_or_slow_is_yellow(self, monkeypatch):
        quick = check_speed.Timings(token=1e-6, context=0.0, step=1e-4, head=1e-3, patch=1e-6, around=0.0)
        monkeypatch.setattr(check_speed, "measure", lambda: quick)
        monkeypatch.setattr(check_speed, "usable_memory", lambda: 64e9)
        assert statuses("speed") == {"green"}
        monkeypatch.setattr(check_speed, "usable_memory", lambda: 4e9)
        assert statuses("speed") == {"yellow"}
        monkeypatch.setattr(check_speed, "usable_memory", lambda: 64e9)
        slow = check_speed.Timings(token=1.0, context=0.0, step=1.0, head=1.0, patch=1.0, around=0.0)
        monkeypatch.setattr(check_speed, "measure", lambda: slow)
        assert statuses("speed") == {"yellow"}

    @pytest.mark.slow
    def test_layers_are_timed(self, monkeypatch):
        monkeypatch.setattr(check_speed, "_ENOUGH", 0.0)  # the smallest sizes
        found = check_speed.measure()
        assert found.token > 0.0
        assert found.step > 0.0
        assert found.head > 0.0


@pytest.mark.slow
@pytest.mark.parity
class TestCommittedNumbers:
    """They are transformers', computed again here."""

    def test_logits(self):
        pytest.importorskip("torch")
        from hardware import make_reference as making

        truth = reference.load().arrays
        for name in reference.MODELS:
            for bits in (None, 4):
                for key, array in making.logits_of(name, bits).items():
                    np.testing.assert_allclose(truth[key], array, atol=1e-5 * np.abs(array).max(), err_msg=key)

    def test_gradient(self):
        pytest.importorskip("torch")
        from hardware import make_reference as making

        for kind in ("float32", "4bit"):
            expected = making.gradients(kind)
            found = reference.load().gradient(kind)
            assert found.keys() == expected.keys()
            for name, array in expected.items():
                np.testing.assert_allclose(found[name], array, atol=1e-6 * np.abs(array).max(), err_msg=name)
