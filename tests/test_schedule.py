"""The learning rate of every step: by hand, and against transformers' schedules."""

import pytest

from mlxvr.grpo.schedule import learning_rate


@pytest.mark.parametrize(
    ("kind", "warmup", "total", "wanted"),
    [
        ("constant", 0, 3, [8, 8, 8]),
        ("constant", 3, 5, [2, 4, 6, 8, 8]),
        ("cosine", 0, 4, [8, 4 + 2 * 2**0.5, 4, 4 - 2 * 2**0.5]),  # 4 + 4 cos of 0, 45, 90, 135 degrees
        ("cosine", 1, 4, [4, 8, 6, 2]),  # then 0, 60, 120 degrees
        ("cosine", 5, 3, [8 / 6, 16 / 6, 4]),  # a warm-up that is longer than the run
    ],
)
def test_by_hand(kind, warmup, total, wanted):
    found = [learning_rate(step, highest=8.0, kind=kind, warmup=warmup, total=total) for step in range(1, total + 1)]
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize(("kind", "name"), [("constant", "constant_with_warmup"), ("cosine", "cosine")])
@pytest.mark.parametrize("warmup", [0, 7])
def test_after_the_warm_up_as_transformers(kind, name, warmup):
    """Its first step of a warm-up has a rate of 0 and teaches nothing; ours is the first of a part of the highest."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-5)
    schedule = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=50)
    theirs = []
    for _ in range(50):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    ours = [learning_rate(step, highest=3e-5, kind=kind, warmup=warmup, total=50) for step in range(1, 51)]
    assert ours[warmup:] == pytest.approx(theirs[warmup:])
    assert ours[:warmup] == pytest.approx([3e-5 * step / (warmup + 1) for step in range(1, warmup + 1)])
