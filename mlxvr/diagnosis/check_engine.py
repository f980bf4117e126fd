"""Checks of what an app relies on: two models at once, cancelling, and memory that is given back."""

import threading
import time
from collections.abc import Iterator

import mlx.core as mx

import mlxvr
from mlxvr.diagnosis.findings import Finding
from mlxvr.diagnosis.scene import draw_clip
from mlxvr.errors import Cancelled

__all__ = ["check_cancel", "check_memory", "check_two_reasoners"]

_REPORT = "apps cannot rely on this here; please report it with this output"
_QUESTIONS = ("Which color does the moving object have?", "Which shape moves?", "Where does it end?")
_STOPS_WITHIN = 10.0  # seconds, a few forward passes of a slow machine
_MAY_STAY = 4 * 2**20  # bytes


def check_two_reasoners() -> Iterator[Finding]:
    """Two models that are asked from two threads at once give the same answers as one alone."""
    with mlxvr.load() as alone:
        expected = _answers(alone)
    answers: dict[int, list[tuple[int, ...]]] = {}

    def work(number: int) -> None:
        with mlxvr.load() as reasoner:
            answers[number] = _answers(reasoner)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same = [ids == expected for ids in answers.values()]
    right = same == [True, True]
    yield Finding(
        check="two reasoners at once",
        status="green" if right else "red",
        text="the same answers as one alone" if right else f"{2 - sum(same)} of 2 did not answer as one alone",
        advice="" if right else _REPORT,
    )


def check_cancel() -> Iterator[Finding]:
    """A cancelled question ends soon, and the model answers the next one."""
    with mlxvr.load() as reasoner, reasoner.open(draw_clip(128, 160)) as clip:
        expected = clip.ask(_QUESTIONS[0], mode="think").token_ids
        events = clip.stream(_QUESTIONS[0], mode="think")
        next(events)
        reasoner.cancel()
        started, stopped = time.perf_counter(), False
        try:
            for _ in events:
                pass
        except Cancelled:
            stopped = True
        seconds = time.perf_counter() - started
        usable = clip.ask(_QUESTIONS[0], mode="think").token_ids == expected
    right = stopped and usable and seconds < _STOPS_WITHIN
    text = f"stopped after {seconds:.2f} s, and the next answer is right"
    if not right:
        text = "it was not stopped" if not stopped else "the next answer differs" if not usable else f"{seconds:.0f} s"
    yield Finding(check="cancel", status="green" if right else "red", text=text, advice="" if right else _REPORT)


def check_memory() -> Iterator[Finding]:
    """`close` gives back the memory of a model and its clips."""
    active = []
    for _ in range(3):
        reasoner = mlxvr.load()
        clip = reasoner.open(draw_clip(128, 160))
        clip.ask(_QUESTIONS[0], mode="direct")
        reasoner.close()
        active.append(int(mx.get_active_memory()))
    grown = active[-1] - active[0]
    right = grown <= _MAY_STAY
    text = "given back after close" if right else f"{grown / 2**20:.0f} MiB more after each two models"
    yield Finding(
        check="memory", status="green" if right else "red", text=text, measured=float(grown), limit=float(_MAY_STAY),
        advice="" if right else _REPORT,
    )  # fmt: skip


def _answers(reasoner: mlxvr.Reasoner) -> list[tuple[int, ...]]:
    with reasoner.open(draw_clip(128, 160)) as clip:
        return [tuple(clip.ask(question, mode="think", max_tokens=48).token_ids) for question in _QUESTIONS]
