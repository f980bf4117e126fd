"""What a user writes around the public API, with types; `test_user_script` has it checked and runs it."""

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Unpack

import mlxvr
from mlxvr.convert import ConversionReport, convert
from mlxvr.eval import EvalConfig, EvalReport, evaluate
from mlxvr.train import TrainConfig, train


def load(model: str | None = None, **options: Unpack[mlxvr.LoadKeywords]) -> mlxvr.Reasoner:
    """A wrapper that passes options on, checked by name and type."""
    return mlxvr.load(model, **options)


def report(stage: str, done: int, total: int) -> None:
    """Show progress."""
    print(stage, done, total, file=sys.stderr)


def first_words(clip: mlxvr.Clip, question: str, **options: Unpack[mlxvr.AskKeywords]) -> Iterator[str]:
    """The direct answer, and the pieces of the reasoning; the work stops with the first piece."""
    with closing(clip.stream(question, **options)) as events:
        for event in events:
            match event:
                case mlxvr.FirstAnswer():
                    yield event.text
                case mlxvr.ReasoningDelta():
                    yield event.text
                    return
                case mlxvr.Answer():
                    return


def is_sure(event: mlxvr.Event) -> bool:
    """Whether a direct answer stands."""
    return isinstance(event, mlxvr.FirstAnswer) and not event.reasons


def ask(video: Path, folder: Path) -> mlxvr.Answer:
    """Each way to ask."""
    kind: mlxvr.Kind = "qa"
    mode: mlxvr.Mode = "direct"
    options: mlxvr.AskKeywords = {"kind": kind, "mode": mode, "max_tokens": 24, "temperature": 0.0, "seed": None}
    request = mlxvr.AskRequest("Which colour?", ["red", "blue"], kind=kind, mode=mode, max_tokens=8)
    frames: mlxvr.FrameKeywords = {"fps": 1.0, "max_frames": 8, "start": 0.0}
    with load(dtype="float32", prefill_step_size=1024) as reasoner:
        reasoner.threshold = 0.9
        with reasoner.open(video, progress=report, **frames) as clip:
            words = list(first_words(clip, "What happens?", max_tokens=24))
            events: list[mlxvr.Event] = list(clip.stream_with(request))
            clip.save(folder / "clip.safetensors")
            answer = clip.ask(
                "What happens?", options=("it moves", "it stands"), threshold=0.5, mode=mode, max_tokens=8
            )
            option: mlxvr.Option | None = answer.option
            usage: mlxvr.Usage = answer.usage
            seconds: float = usage.media_seconds + usage.total_seconds
        with reasoner.restore(folder / "clip.safetensors") as again:
            assert again.ask("What happens?", **options).token_ids
        once = reasoner.ask(video, "What happens?", fps=1.0, end=2.5, video_tokens=400, mode=mode, max_tokens=8)
        try:
            reasoner.ask(folder / "missing.mp4", "What?")
        except mlxvr.MediaError as error:
            print("refused:", error)
    assert words
    assert isinstance(events[-1], mlxvr.Answer)
    assert is_sure(events[0]) or not isinstance(events[0], mlxvr.FirstAnswer)
    assert option is None or option.letter in "AB"
    assert seconds > 0
    return once


def work(folder: Path) -> tuple[ConversionReport, EvalReport]:
    """Convert and evaluate."""
    demo = Path(mlxvr.__file__).parent / "demo"
    converted = convert(demo / "checkpoint", folder / "converted", bits=8, group_size=64, progress=report)
    config = EvalConfig(model=converted.path, output=folder / "report", limit=1, max_tokens=24, fps=1.0, resamples=0)
    return converted, evaluate(config, progress=report)


def learn(folder: Path) -> None:
    """Train for one step."""
    demo = Path(mlxvr.__file__).parent / "demo"
    config = TrainConfig(
        data=demo / "clips.jsonl",
        output=folder / "run",
        steps=1,
        batch_size=1,
        group_size=2,
        max_completion_tokens=4,
        max_frames=2,
        limit=1,
    )
    train(config, progress=report)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    print(ask(Path(mlxvr.__file__).parent / "demo" / "clips" / "clip00.mp4", target).text)
    _, evaluated = work(target)
    print(evaluated.summary.threshold)
    learn(target)
