"""Questions about a scene, their answers, and the chains of thought that lead to them.

A chain says what is seen over the clip's time, each observation with the label of the first pair of frames that shows
it, and ends with the conclusion; how long it is follows from what there is to see. Perception questions (colour, shape,
direction, when something is in view, which cup at the start, which swap comes first) can be read off the clip; the
final place of the ball can't, beyond the first swaps: that is what the chain is for.

Answers about time are labels of pairs of frames, not the true times of the event: the first and the last pair in which
it is seen. Nothing finer can be known from sampled frames.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .world import (
    COLORS,
    DIRECTIONS,
    SHAPES,
    SLOTS,
    SWAPS,
    TRAINED_SWAPS,
    Clock,
    MovingShape,
    Scene,
    ShellGame,
    make_clock,
    make_moving_shape,
    make_shell_game,
    most_swaps,
    sequence_held_out,
)

LETTERS = "ABCDEF"
TRACKING_SWAPS = 2  # a game with fewer swaps can be answered at a glance

WORDINGS = {
    "color": (
        "What color is the moving shape?",
        "Which color does the moving object have?",
        "What is the color of the shape that moves?",
    ),
    "shape": ("Which shape is moving?", "What shape does the moving object have?", "Name the shape that moves."),
    "direction": (
        "In which direction does the shape move?",
        "Which way is the moving shape going?",
        "Where is the moving object heading?",
    ),
    "visible": ("the {name} is visible.", "the {name} is in view.", "the {name} can be seen."),
    "grounded_color": ("What color is the moving shape?", "Which color does the moving object have?"),
    "start_cup": (
        "Under which cup is the ball at the start?",
        "Which cup hides the ball when the video begins?",
        "Before any swap, where is the ball?",
    ),
    "ball_color": ("What color is the ball?", "Which color does the ball have?"),
    "cup_color": ("What color are the cups?", "Which color do the cups have?"),
    "first_swap": ("Which two cups are swapped first?", "Which cups change places in the first swap?"),
    "ball_visible": ("the ball is visible.", "the ball can be seen."),
    "cups_moving": ("the cups are being swapped.", "cups are moving."),
    "count": ("How many swaps happen?", "How many times are two cups swapped?", "Count the swaps."),
    "final_cup": (
        "The ball is hidden under one cup and the cups are swapped. Under which cup is the ball at the end?",
        "Which cup hides the ball when the video ends?",
        "After all swaps, where is the ball?",
        "Under which cup is the ball at the end of the game?",
    ),
}
# Other words for what is asked above, in no row that the bundled checkpoint was trained on. `KEPT_BACK` is for tests of
# what was fine-tuned on `REWORDED`.
REWORDED = {
    "shape": ("Name the object.", "Which object is it?", "What moves?", "What is seen?"),
    "direction": (
        "Which way does it move?",
        "What is its direction?",
        "Which direction?",
        "Where does the object go?",
        "Where is it heading?",
        "In which direction is it heading?",
    ),
}
KEPT_BACK = {
    "shape": ("What does the video show?", "What object is it?"),
    "direction": ("Where does it go?", "In what direction does it go?"),
}
PERCEPTION = (
    "color", "shape", "direction", "visible", "grounded_color",
    "start_cup", "ball_color", "cup_color", "first_swap", "ball_visible", "cups_moving",
)  # fmt: skip
KINDS = (*PERCEPTION, "count", "final_cup")
GROUPS = ("perception", "counting", "easy", "tracking", "held-out sequences", "longer games")
_ABOUT_TIME = ("visible", "ball_visible", "cups_moving")
_MOVING_KINDS = ("color", "shape", "direction", "visible", "grounded_color")
_ALWAYS_OPTIONS = ("first_swap", "grounded_color")


@dataclass(frozen=True)
class Example:
    """One question on one clip. `trace` is the chain in pieces, each beginning with a space but the first.

    `ask` is the library's kind (`qa`, `grounding`, `grounded_qa`); `guesses` are the answers that someone who has not
    seen the clip could give.
    """

    kind: str
    ask: str
    question: str
    options: tuple[str, ...] | None
    answer: str
    trace: tuple[str, ...]
    guesses: tuple[str, ...]
    clock: Clock
    scene: Scene

    @property
    def extent(self) -> tuple[float, float]:
        """The picture's (width, height) in world units."""
        return self.scene.extent

    @property
    def swaps(self) -> int:
        """How many swaps the clip holds."""
        return len(self.scene.swaps) if isinstance(self.scene, ShellGame) else 0

    @property
    def group(self) -> str:
        """One of `GROUPS`. A game of fewer than `TRACKING_SWAPS` swaps is easy; the last two were never trained on."""
        if self.kind != "final_cup":
            return "counting" if self.kind == "count" else "perception"
        if self.swaps > TRAINED_SWAPS:
            return "longer games"
        if sequence_held_out([swap.slots for swap in self.scene.swaps]):
            return "held-out sequences"
        return "tracking" if self.swaps >= TRACKING_SWAPS else "easy"


def make_example(
    rng: random.Random,
    kind: str,
    pairs: int,
    extent: tuple[float, float],
    *,
    swaps: int | None = None,
    held_out: bool = False,
    open_answer: bool | None = None,
    wordings: Mapping[str, Sequence[str]] = WORDINGS,
) -> Example:
    """A random example of this kind on a clip of `pairs` pairs; `swaps` fixes the length of the game."""
    clock = make_clock(rng, pairs)
    scene: Scene
    if kind in _MOVING_KINDS:
        partial = kind in ("visible", "grounded_color") or rng.random() < 0.3
        scene = make_moving_shape(rng, clock, extent, partial=partial)
    else:
        if swaps is None:
            fewest = 1 if kind in ("first_swap", "cups_moving", "count") else 0
            swaps = _random_swaps(rng, fewest, min(TRAINED_SWAPS, most_swaps(clock.duration)))
        scene = make_shell_game(rng, clock, extent, swaps=swaps, held_out=held_out)
    return make_question(rng, kind, clock, scene, open_answer=open_answer, wordings=wordings)


def _random_swaps(rng: random.Random, fewest: int, most: int) -> int:
    counts = range(fewest, most + 1)
    return rng.choices(counts, [(0.5, 1.0, 1.5, 2.0, 2.5, 3.0)[min(n, 5)] for n in counts])[0]


def make_question(
    rng: random.Random,
    kind: str,
    clock: Clock,
    scene: Scene,
    *,
    open_answer: bool | None = None,
    wordings: Mapping[str, Sequence[str]] = WORDINGS,
) -> Example:
    """A question of this kind about a given clip; multiple choice unless `open_answer` (None: a third are open)."""
    answer, words, trace = _FACTS[kind](clock, scene)
    wording = rng.choice(wordings[kind])
    if kind in _ABOUT_TIME:
        name = scene.mover.name if isinstance(scene, MovingShape) else ""
        question, guesses = wording.format(name=name), (_random_span(rng, clock),)
        return Example(kind, "grounding", question, None, answer, tuple(trace), guesses, clock, scene)
    if open_answer is None:
        open_answer = kind not in _ALWAYS_OPTIONS and rng.random() < 0.33
    if open_answer:
        return Example(kind, "qa", wording, None, answer, tuple(trace), tuple(words), clock, scene)
    options = _choose_options(rng, answer, words)
    letter, letters = LETTERS[options.index(answer)], tuple(LETTERS[: len(options)])
    if kind != "grounded_color":
        return Example(kind, "qa", wording, options, letter, tuple(trace), letters, clock, scene)
    span = _span(clock, scene.visible(clock.times))
    guesses = tuple(f"{x} <> {rng.choice((span, _random_span(rng, clock)))}" for x in letters)
    return Example(kind, "grounded_qa", wording, options, f"{letter} <> {span}", tuple(trace), guesses, clock, scene)


def _choose_options(rng: random.Random, answer: str, words: list[str]) -> tuple[str, ...]:
    """At most four of `words` in random order, the answer among them."""
    options = [*rng.sample([w for w in words if w != answer], min(3, len(words) - 1)), answer]
    rng.shuffle(options)
    return tuple(options)


# ---- when something is seen


def _pairs_with(seen) -> list[int]:
    """Indices of the pairs of frames of which at least one frame shows it."""
    return [int(i) for i in seen.reshape(-1, 2).any(1).nonzero()[0]]


def _span(clock: Clock, seen) -> str:
    """`[first label, last label]` of what is seen."""
    labels, pairs = clock.labels, _pairs_with(seen)
    return f"[{labels[pairs[0]]}, {labels[pairs[-1]]}]"


def _random_span(rng: random.Random, clock: Clock) -> str:
    first, last = sorted(rng.sample(range(len(clock.labels)), 2))
    return f"[{clock.labels[first]}, {clock.labels[last]}]"


# ---- chains of a moving shape


def _where(value: float, extent: float, axis: int) -> str:
    third = min(2, max(0, int(value / extent * 3)))
    return (("at the left", "in the middle", "at the right"), ("at the top", "in the middle", "at the bottom"))[axis][
        third
    ]


def _watch_shape(clock: Clock, scene: MovingShape) -> list[str]:
    """What is seen of the mover at the first, the middle and the last pair that shows it."""
    times, labels = clock.times, clock.labels
    seen = scene.visible(times)
    pairs = _pairs_with(seen)
    axis = 0 if scene.direction in ("left", "right") else 1
    path = scene.places(times)[-1, :, axis]
    pieces = []
    if pairs[0] > 0:
        pieces.append(f" At {labels[0]} seconds there is no {scene.mover.name}.")
    for number, pair in enumerate((pairs[0], pairs[len(pairs) // 2], pairs[-1])):
        frames = [2 * pair + i for i in (0, 1) if seen[2 * pair + i]]
        place = _where(sum(path[f] for f in frames) / len(frames), scene.extent[axis], axis)
        subject = scene.mover.a_name if number == 0 else "it"
        pieces.append(f" At {labels[pair]} seconds {subject} is {place}.")
    if pairs[-1] + 1 < len(labels):
        pieces.append(f" At {labels[pairs[-1] + 1]} seconds it is gone.")
    if scene.still is not None:
        pieces.append(f" {scene.still.a_name.capitalize()} stays still.")
    return pieces


def _color(clock: Clock, scene: MovingShape) -> tuple[str, list[str], list[str]]:
    answer = scene.mover.color
    return answer, list(COLORS), [*_watch_shape(clock, scene), f" So the moving shape is {answer}."]


def _shape(clock: Clock, scene: MovingShape) -> tuple[str, list[str], list[str]]:
    answer = scene.mover.outline
    return answer, list(SHAPES), [*_watch_shape(clock, scene), f" So the moving shape is a {answer}."]


def _direction(clock: Clock, scene: MovingShape) -> tuple[str, list[str], list[str]]:
    answer = scene.direction
    return answer, list(DIRECTIONS), [*_watch_shape(clock, scene), f" So it moves {answer}."]


def _visible(clock: Clock, scene: MovingShape) -> tuple[str, list[str], list[str]]:
    span = _span(clock, scene.visible(clock.times))
    first, last = span[1:-1].split(", ")
    conclusion = f" So it is visible from {first} to {last} seconds."
    return span, [], [*_watch_shape(clock, scene), conclusion]


def _grounded_color(clock: Clock, scene: MovingShape) -> tuple[str, list[str], list[str]]:
    span, _, trace = _visible(clock, scene)
    first, last = span[1:-1].split(", ")
    trace[-1] = f" So it is {scene.mover.color}, from {first} to {last} seconds."
    return scene.mover.color, list(COLORS), trace


# ---- chains of a shell game


def _swap_name(slots: tuple[int, int]) -> str:
    return f"{SLOTS[slots[0]]} and {SLOTS[slots[1]]}"


def _swap_labels(clock: Clock, scene: ShellGame) -> list[str]:
    """For each swap the label of the first pair that shows the cups on their way."""
    labels, times = clock.labels, clock.times
    return [labels[_pairs_with(swap.seen(times))[0]] for swap in scene.swaps]


def _watch_start(clock: Clock, scene: ShellGame) -> list[str]:
    """The ball under its cup, the cup coming down, and what moves first."""
    labels, times = clock.labels, clock.times
    down = _pairs_with(~scene.ball_seen(times))[0]
    pieces = [
        f" At {labels[0]} seconds the {SLOTS[scene.ball_slot]} cup is up",
        f" and {scene.ball.a_name} is under it.",
        f" At {labels[down]} seconds the {scene.cup.color} cup is down.",
    ]
    if scene.swaps:
        swap = f"{_swap_name(scene.swaps[0].slots)} swap"
        return [*pieces, f" At {_swap_labels(clock, scene)[0]} seconds {swap}."]
    return [*pieces, f" At {labels[-1]} seconds nothing has moved."]


def _start_cup(clock: Clock, scene: ShellGame) -> tuple[str, list[str], list[str]]:
    answer = SLOTS[scene.ball_slot]
    return answer, list(SLOTS), [*_watch_start(clock, scene), f" So the ball starts under the {answer} cup."]


def _ball_color(clock: Clock, scene: ShellGame) -> tuple[str, list[str], list[str]]:
    answer = scene.ball.color
    return answer, list(COLORS), [*_watch_start(clock, scene), f" So the ball is {answer}."]


def _cup_color(clock: Clock, scene: ShellGame) -> tuple[str, list[str], list[str]]:
    answer = scene.cup.color
    return answer, list(COLORS), [*_watch_start(clock, scene), f" So the cups are {answer}."]


def _first_swap(clock: Clock, scene: ShellGame) -> tuple[str, list[str], list[str]]:
    answer = _swap_name(scene.swaps[0].slots)
    return answer, [_swap_name(s) for s in SWAPS], [*_watch_start(clock, scene), " That is the first swap."]


def _ball_visible(clock: Clock, scene: ShellGame) -> tuple[str, list[str], list[str]]:
    span = _span(clock, scene.ball_seen(clock.times))
    first, last = span[1:-1].split(", ")
    conclusion = f" So the ball is visible from {first} to {last} seconds."
    return span, [], [*_watch_start(clock, scene), conclusion]


def _cups_moving(clock: Clock, scene: ShellGame) -> tuple[str, list[str], list[str]]:
    times = clock.times
    span = _span(clock, scene.swaps[0].seen(times) | scene.swaps[-1].seen(times))
    first, last = span[1:-1].split(", ")
    ends = [f" At {last} seconds the last swap ends.", f" So the cups move from {first} to {last} seconds."]
    return span, [], [*_watch_start(clock, scene), *ends]


def _count(clock: Clock, scene: ShellGame) -> tuple[str, list[str], list[str]]:
    labels = _swap_labels(clock, scene)
    trace = [f" At {clock.labels[0]} seconds the cups stand still."]
    for number, (swap, label) in enumerate(zip(scene.swaps, labels), 1):
        trace += [f" At {label} seconds", f" {_swap_name(swap.slots)} swap,", f" that is {number}."]
    answer = str(len(scene.swaps))
    low = max(0, min(len(scene.swaps) - 1, 3))
    return answer, [str(n) for n in range(low, low + 5)], [*trace, " Then nothing moves."]


def _final_cup(clock: Clock, scene: ShellGame) -> tuple[str, list[str], list[str]]:
    labels, slots = _swap_labels(clock, scene), scene.ball_after()
    trace = [f" At {clock.labels[0]} seconds the ball is under the {SLOTS[slots[0]]} cup."]
    for swap, label, slot in zip(scene.swaps, labels, slots[1:]):
        trace += [f" At {label} seconds", f" {_swap_name(swap.slots)} swap,", f" ball under {SLOTS[slot]}."]
    return SLOTS[slots[-1]], list(SLOTS), [*trace, " Then nothing moves."]


_FACTS: dict[str, Callable[[Clock, Scene], tuple[str, list[str], list[str]]]] = {
    "color": _color,
    "shape": _shape,
    "direction": _direction,
    "visible": _visible,
    "grounded_color": _grounded_color,
    "start_cup": _start_cup,
    "ball_color": _ball_color,
    "cup_color": _cup_color,
    "first_swap": _first_swap,
    "ball_visible": _ball_visible,
    "cups_moving": _cups_moving,
    "count": _count,
    "final_cup": _final_cup,
}
