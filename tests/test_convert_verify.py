"""`convert --verify`: what is close enough is kept with its figures, what is not is refused and nothing is lost."""

import dataclasses
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_checkpoint
from recipes import write_plain

from mlxvr.conversion import card
from mlxvr.conversion.measure import probes as bundle
from mlxvr.convert import convert, main
from mlxvr.errors import VerificationError
from mlxvr.model.loading import load_model

STRICT = """
family = "qwen3_vl"
threshold = 0.9
[[verification]]
bits = 2
kl = 1e-9
[[verification]]
bits = 16
kl = 0.1
top1 = 0.5
"""


LIMITS = """
[[verification]]
bits = 3
top1 = 0.8
"""


@pytest.fixture(autouse=True)
def few_probes(request, monkeypatch):
    """A picture and two texts instead of thirty probes, for all but the slow."""
    if request.node.get_closest_marker("slow"):
        return
    chosen = [probe for probe in bundle.bundled() if probe.name in ("disc", "text-0", "text-1")]
    assert len(chosen) == 3
    monkeypatch.setattr("mlxvr.conversion.measure.verify.bundled", lambda: chosen)
    clips = [probe for probe in bundle.bundled() if probe.name in ("clip01-0", "clip01-1")]
    monkeypatch.setattr("mlxvr.conversion.measure.mixed_precision.bundled", lambda: clips)


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "source", "qwen3_vl")


@pytest.fixture
def strict(tmp_path):
    path = tmp_path / "strict.toml"
    path.write_text(STRICT)
    return path


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "mlxvr.json").read_text())


def test_figures_travel_with_the_weights(source, tmp_path):
    report = convert(source, tmp_path / "out", recipe=write_plain(tmp_path), bits=8, verify=True)
    found = report.verification
    assert found is not None
    assert report.shortfalls == ()
    kept = settings_of(tmp_path / "out")["verification"]
    assert kept["kl"] == pytest.approx(found.kl)
    assert kept["confidence_drift"] == pytest.approx(found.confidence_drift)
    assert len(kept["probes"]) == 3
    assert kept["shortfalls"] == []
    assert str(tmp_path) not in json.dumps(settings_of(tmp_path / "out"))  # no path of this machine
    assert {"seconds", "peak_memory"} & kept.keys() == set()
    shown = (tmp_path / "out" / "README.md").read_text()
    assert "| Verified | measured on 3 probe prompts against the source: the most likely token agrees on " in shown
    assert kept["limits"] == dataclasses.asdict(report.limits)
    assert kept["passed"] is None, "this recipe has no limits"
    assert report.table().endswith("\nno verdict: the recipe sets no limits")
    assert report.to_dict()["verification"]["limits"] == kept["limits"]
    convert(source, tmp_path / "again", recipe=write_plain(tmp_path), bits=8, verify=True)
    assert settings_of(tmp_path / "again") == settings_of(tmp_path / "out")


def test_the_card_has_three_figures_with_their_limits():
    figures = {
        "probes": [1, 2],
        "top1": 0.984,
        "tokens": 500,
        "confidence_drift": 0.0344,
        "decisions": 24,
        "flipped": 1,
    }
    limits = {"bits": 4, "top1": 0.9, "confidence_drift": 0.08, "flipped_exits": 0.1, "kl": None}
    rows = card._verified({**figures, "limits": limits, "passed": True, "shortfalls": []})
    assert rows == {
        "Verified": "passed on 2 probe prompts against the source: the most likely token agrees on 98.4% of 500 tokens "
        "(limit 90.0%); confidence moves by 0.034 (limit 0.08) on average; 1 of 24 exit decisions flip (limit 10%)"
    }
    failed = {"limits": {"bits": 4}, "passed": False, "shortfalls": ["KL is 1, the limit is 0.1"], "decisions": 0}
    rows = card._verified({**figures, **failed})
    assert rows == {
        "Verified": "fell short on 2 probe prompts against the source: the most likely token agrees on 98.4% of 500 "
        "tokens; confidence moves by 0.034 on average",
        "Falls short": "KL is 1, the limit is 0.1",
    }


def test_without_verification_nothing_is_claimed(source, tmp_path):
    assert convert(source, tmp_path / "out").verification is None
    assert "verification" not in settings_of(tmp_path / "out")
    assert "Verified" not in (tmp_path / "out" / "README.md").read_text()


def test_falling_short_is_an_error_and_force_keeps_it(source, strict, tmp_path):
    with pytest.raises(VerificationError, match=r"too far from its source: .*(kl|KL).*--force") as caught:
        convert(source, tmp_path / "out", recipe=strict, verify=True)
    assert caught.value.report.kl > 1e-9
    assert not (tmp_path / "out").exists()
    report = convert(source, tmp_path / "out", recipe=strict, verify=True, force=True)
    assert report.resumed_shards == report.shards == 1  # the weights were not converted again
    (shortfall,) = report.shortfalls
    assert settings_of(tmp_path / "out")["verification"]["shortfalls"] == [shortfall]
    assert f"| Falls short | {shortfall} |" in (tmp_path / "out" / "README.md").read_text()
    assert f"falls short: {shortfall} (kept because of --force)" in report.table()
    assert report.to_dict()["verification"]["passed"] is False
    assert "| Verified | fell short on " in (tmp_path / "out" / "README.md").read_text()


def test_limits_are_those_of_the_bits(source, strict, tmp_path):
    assert convert(source, tmp_path / "out", recipe=strict, bits=0, verify=True).shortfalls == ()


def test_the_command_line_prints_the_table(source, strict, tmp_path, capsys):
    arguments = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "out"), "--verify"]
    assert main([*arguments, "--recipe", str(strict)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "confidence drift" in captured.err
    assert captured.err.splitlines()[-1].startswith("error: the converted model is too far from its source")
    assert main([*arguments, "--json", "--recipe", str(write_plain(tmp_path))]) == 0
    assert json.loads(capsys.readouterr().out)["verification"]["probes"][0]["name"]


def test_a_broken_conversion_is_found(source, tmp_path, monkeypatch):
    """What verification is for: weights that are wrong although every shape is right."""
    from mlxvr.conversion import stream

    write = stream._write_rows

    def with_a_slip(job, values, first, writer):
        if job.source.key.endswith("layers.1.mlp.down_proj.weight"):
            values = np.ascontiguousarray(values[::-1])
        write(job, values, first, writer)

    good = convert(source, tmp_path / "good", bits=8, verify=True, force=True).verification
    monkeypatch.setattr(stream, "_write_rows", with_a_slip)
    bad = convert(source, tmp_path / "bad", bits=8, verify=True, force=True).verification
    assert bad.kl > 20 * good.kl


def test_sources_of_every_kind(tmp_path, source):
    """Key rules, packed weights: the source is run as it was read."""
    convert(source, tmp_path / "packed", bits=4, dtype="float32")
    exact = convert(tmp_path / "packed", tmp_path / "unpacked", dequantize=True, dtype="float32", verify=True)
    assert exact.verification.logits_error < 1e-5
    tensors = mx.load(str(source / "model.safetensors"))
    mx.save_safetensors(
        str(source / "model.safetensors"), {f"wrapped.{name}": array for name, array in tensors.items()}
    )
    mine = tmp_path / "mine.toml"
    mine.write_text('family = "qwen3_vl"\nthreshold = 0.9\n[[key_rules]]\nprefix = "wrapped."\n')
    report = convert(source, tmp_path / "out", recipe=mine, bits=0, dtype="float32", verify=True)
    assert report.verification.logits_error < 1e-5


@pytest.mark.slow
def test_the_shipped_limits_let_the_bundled_checkpoint_pass(tmp_path):
    from mlxvr.checkpoint.bundled import demo_folder

    source = demo_folder() / "checkpoint"
    report = convert(source, tmp_path / "out", verify=True)
    assert report.shortfalls == ()
    with pytest.raises(VerificationError, match=r"top-1|flipped"):
        convert(source, tmp_path / "two", bits=2, recipe=write_plain(tmp_path, more=LIMITS), verify=True)


def test_bits_that_are_measured_fit_the_size_to_the_byte(source, tmp_path, capsys):
    four = convert(source, tmp_path / "four", bits=4)
    six = convert(source, tmp_path / "six", bits=6)
    target = (four.bytes_after + six.bytes_after) // 2
    arguments = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "out"), "--q-bits", "auto"]
    assert main([*arguments, "--target-gb", str(target / 1e9), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert four.bytes_after < report["bytes_after"] <= target
    assert report["bits"] == "auto"
    settings = settings_of(tmp_path / "out")
    assert settings["quantization"]["bits"] == "auto"
    assert settings["quantization"]["target_bytes"] == target
    assert "bits measured for each module" in (tmp_path / "out" / "README.md").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert len({(one["bits"], one["group_size"]) for one in config.values() if isinstance(one, dict)}) > 1
    assert load_model(tmp_path / "out").folder.settings == settings
    assert main([*arguments, "--target-gb", "1e-6", "--force"]) == 2
    assert "is too small" in capsys.readouterr().err
