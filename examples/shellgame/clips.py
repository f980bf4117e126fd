"""Clips on disk: scenes drawn and encoded as H.264, and the seeded sets of clips with their questions.

    python -m shellgame.clips ../mlxvr/demo                                    # the bundled clips
    python -m shellgame.clips rows --set training --count 400 --seed 1        # clips to fine-tune on

Every clip of a set has its own frame rate, size, quality, keyframe distance and look. Some sizes are what the model was
trained on, others are larger and reach it through the processor's token budget.
"""

import argparse
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import av

from .drawing import Painter, frame_times, make_look
from .questions import KEPT_BACK, PERCEPTION, REWORDED, Example, make_example, make_question
from .world import TRAINED_SWAPS, Clock, Scene, most_swaps

SIZES = ((128, 128), (256, 256), (128, 160), (160, 128), (256, 320), (320, 256), (240, 320), (360, 640))
QUALITIES = (20, 23, 26, 29, 32)


@dataclass(frozen=True)
class ClipSpec:
    """Everything that decides one file."""

    scene: Scene
    clock: Clock
    size: tuple[int, int]  # height, width
    crf: int
    keyframes: int
    seed: int  # of the look


def write_clip(path: Path, spec: ClipSpec) -> None:
    """Draw and encode one clip."""
    height, width = spec.size
    painter = Painter(spec.scene, make_look(random.Random(spec.seed), len(spec.scene.sprites)), height, width)
    options = {"crf": str(spec.crf), "preset": "veryfast", "g": str(spec.keyframes), "threads": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=spec.clock.rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for seconds in frame_times(spec.clock):
            frame = av.VideoFrame.from_ndarray(painter.frame(seconds), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_spec(rng: random.Random, example: Example, size: tuple[int, int]) -> ClipSpec:
    """Random encoding choices for an example's clip."""
    return ClipSpec(
        scene=example.scene,
        clock=example.clock,
        size=size,
        crf=rng.choice(QUALITIES),
        keyframes=rng.choice((12, 48, 250)),
        seed=rng.randrange(1 << 30),
    )


def extent_of(size: tuple[int, int]) -> tuple[float, float]:
    """The (width, height) of a picture in world units."""
    return size[1] / min(size), size[0] / min(size)


def record(name: str, number: int, example: Example, spec: ClipSpec) -> dict:
    """One line of `clips.jsonl`."""
    return {
        "id": f"{name}-{number}",
        "video": f"clips/{name}.mp4",
        "question": example.question,
        "options": list(example.options) if example.options else None,
        "answer": example.answer,
        "kind": example.ask,
        "group": example.group,
        "about": example.kind,
        "swaps": example.swaps,
        "trace": "".join(example.trace).strip(),
        "size": list(spec.size),
        "fps": str(spec.clock.rate),
        "frames": spec.clock.frames,
        "crf": spec.crf,
    }


def held_out_set(seed: int, clips: int) -> Iterable[tuple[str, ClipSpec, list[dict]]]:
    """Fresh clips as (name, spec, records), the groups in turn; tracking clips are also asked about what they show."""
    rng = random.Random(f"shellgame held-out set {seed}")
    plan = ["moving", "tracking", "game", "held-out sequences", "easy", "moving", "longer games", "counting"]
    return _set(rng, plan, clips, "clip")


def training_set(seed: int, clips: int) -> Iterable[tuple[str, ClipSpec, list[dict]]]:
    """Clips to fine-tune on, as `held_out_set` gives them; no sequence of swaps is among them that tests hold out."""
    rng = random.Random(f"shellgame training set {seed}")
    plan = ["tracking", "moving", "tracking", "game", "tracking", "counting", "tracking", "easy"]
    return _set(rng, plan, clips, "train")


def reworded_set(seed: int, clips: int) -> Iterable[tuple[str, ClipSpec, list[dict]]]:
    """Clips of moving shapes, each asked for direction and shape in words that are in no training row."""
    rng = random.Random(f"shellgame reworded set {seed}")
    for index in range(clips):
        yield _reworded_clip(rng, index, "reworded", REWORDED)


def reworded_held_out_set(seed: int, clips: int) -> Iterable[tuple[str, ClipSpec, list[dict]]]:
    """What to test with after `reworded_set`: clips in turn of a moving shape and of a shell game.

    Shapes are asked for in the words of `reworded_set` or, in turn, in words kept back from it too. Games ask in the
    familiar words where the ball is at the start or, after two to five swaps, at the end.
    """
    rng = random.Random(f"shellgame reworded held-out set {seed}")
    for index in range(clips):
        if index % 2 == 0:
            wordings, group = ((REWORDED, "reworded"), (KEPT_BACK, "kept back"))[index // 2 % 2]
            yield _reworded_clip(rng, index, group, wordings)
            continue
        size = SIZES[index // 2 % len(SIZES)]
        kind = ("start_cup", "final_cup")[index // 2 % 2]
        example = _game(rng, kind, 2 + index // 4 % (TRAINED_SWAPS - 1), extent_of(size))
        name, spec = f"game{index:04d}", make_spec(rng, example, size)
        yield name, spec, [record(name, 0, example, spec)]


def _reworded_clip(
    rng: random.Random, index: int, group: str, wordings: Mapping[str, Sequence[str]]
) -> tuple[str, ClipSpec, list[dict]]:
    size = SIZES[(index // len(SIZES) + index) % len(SIZES)]
    first = make_example(rng, "direction", rng.randint(7, 16), extent_of(size), wordings=wordings)
    other = make_question(rng, "shape", first.clock, first.scene, wordings=wordings)
    name, spec = f"moving{index:04d}", make_spec(rng, first, size)
    return name, spec, [record(name, number, one, spec) | {"group": group} for number, one in enumerate((first, other))]


def _set(rng: random.Random, plan: Sequence[str], clips: int, name: str) -> Iterable[tuple[str, ClipSpec, list[dict]]]:
    for index in range(clips):
        size = SIZES[(index // len(plan) + index) % len(SIZES)]
        examples = _examples_for(rng, plan[index % len(plan)], index // len(plan), extent_of(size))
        clip, spec = f"{name}{index:04d}", make_spec(rng, examples[0], size)
        yield clip, spec, [record(clip, number, example, spec) for number, example in enumerate(examples)]


def _examples_for(rng: random.Random, turn: str, number: int, extent: tuple[float, float]) -> list[Example]:
    moving, game = PERCEPTION[:5], PERCEPTION[5:]
    if turn == "moving":
        return [_lasting_example(rng, rng.choice(moving), extent)]
    if turn == "game":
        return [_lasting_example(rng, game[number % len(game)], extent)]
    if turn == "counting":
        return [make_example(rng, "count", rng.randint(7, 16), extent)]
    if turn == "easy":
        return [make_example(rng, "final_cup", rng.randint(7, 16), extent, swaps=number % 2)]
    swaps = TRAINED_SWAPS + 1 + number % 2 if turn == "longer games" else 2 + number % (TRAINED_SWAPS - 1)
    example = _game(rng, "final_cup", swaps, extent, held_out=turn == "held-out sequences")
    about = rng.choice(("start_cup", "ball_color", "cup_color", "first_swap"))
    return [example, make_question(rng, about, example.clock, example.scene)]


def _game(rng: random.Random, kind: str, swaps: int, extent: tuple[float, float], *, held_out: bool = False) -> Example:
    """A shell game that is long enough for its swaps."""
    pairs = rng.choice([p for p in range(7, 17) if most_swaps(p) >= swaps])
    return make_example(rng, kind, pairs, extent, swaps=swaps, held_out=held_out)


def _lasting_example(rng: random.Random, kind: str, extent: tuple[float, float]) -> Example:
    """An example whose answer, if it is about time, is no single moment: two swaps may fall into one pair of frames."""
    while True:
        example = make_example(rng, kind, rng.randint(7, 16), extent)
        if not re.search(r"\[(\S+), \1\]", example.answer):
            return example


def demo_set(seed: int = 0) -> Iterable[tuple[str, ClipSpec, list[dict]]]:
    """The bundled clips, one for each kind of scene; the first is asked what can be seen and what must be followed."""
    rng = random.Random(f"shellgame demo {seed}")
    for index, (kind, swaps, held_out, more) in enumerate(_DEMO):
        size = SIZES[(index + 1) % len(SIZES)]
        pairs = rng.choice([p for p in range(7, 17) if most_swaps(p) >= (swaps or 0)])
        open_answer = None if index else False  # the first clip's questions have options
        main = make_example(rng, kind, pairs, extent_of(size), swaps=swaps, held_out=held_out, open_answer=open_answer)
        others = [make_question(rng, k, main.clock, main.scene, open_answer=open_answer) for k in more]
        name, spec = f"clip{index:02d}", make_spec(rng, main, size)
        yield name, spec, [record(name, number, example, spec) for number, example in enumerate([*others, main])]


# kind, swaps, whether its sequence is held out, and what else is asked about the clip, first
_DEMO: tuple[tuple[str, int | None, bool, tuple[str, ...]], ...] = (
    ("final_cup", 4, False, ("start_cup",)),
    ("direction", None, False, ("color",)),
    ("final_cup", 2, False, ("ball_color",)),
    ("visible", None, False, ("shape",)),
    ("final_cup", 3, False, ("first_swap",)),
    ("grounded_color", None, False, ()),
    ("final_cup", 5, False, ("count", "cup_color")),
    ("color", None, False, ("direction",)),
    ("final_cup", 0, False, ("ball_visible",)),
    ("shape", None, False, ("color",)),
    ("final_cup", 1, False, ("start_cup",)),
    ("final_cup", 3, True, ("cups_moving",)),
    ("final_cup", 6, False, ("first_swap",)),
    ("count", 3, False, ("ball_color",)),
)


def write_set(folder: Path, clips: Iterable[tuple[str, ClipSpec, list[dict]]]) -> list[dict]:
    """Write `clips/*.mp4` and `clips.jsonl` into a folder; the records are returned."""
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    records = []
    for name, spec, lines in clips:
        write_clip(folder / "clips" / f"{name}.mp4", spec)
        records += lines
    text = "".join(json.dumps(line) + "\n" for line in records)
    (folder / "clips.jsonl").write_text(text, encoding="utf-8")
    return records


def main(argv: list[str] | None = None) -> int:
    """Write a set of clips."""
    sets = {
        "bundled": None,
        "held-out": held_out_set,
        "training": training_set,
        "reworded": reworded_set,
        "reworded-held-out": reworded_held_out_set,
    }
    parser = argparse.ArgumentParser(description="Write clips and their questions.")
    parser.add_argument("folder", type=Path, help="gets clips.jsonl and clips/*.mp4")
    parser.add_argument("--set", choices=sets, default="bundled", help="which clips (default: the bundled ones)")
    parser.add_argument("--count", type=int, default=300, help="clips of the other sets")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    make = sets[options.set]
    write_set(options.folder, demo_set(options.seed) if make is None else make(options.seed, options.count))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
