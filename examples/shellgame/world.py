"""The world: what can happen in a clip, in continuous time, and when a sampled frame sees it.

Two scenes exist. In `MovingShape` a coloured shape crosses the picture (perhaps only for a part of the clip, perhaps
beside a second shape that stays still). In `ShellGame` a ball is shown under one of three cups, the cup comes down, and
pairs of cups swap places: whoever wants to know where the ball ends up has to follow every swap.

A scene is a function of time; nothing in it knows about frames. `Clock` is the other half: the frame rate and length of
the container, and which frames a model at 2 frames per second is shown. Sampling follows qwen-vl-utils, the code that
Qwen3-VL was trained with, so sampled times are NOT a 0.5 s grid: n frames are spread evenly from the first frame of the
file to the last. Frames are read in pairs, and a pair is named by the mean of its two times: those labels are the only
clock that the model can see, so they are what traces and answers speak of.

Lengths are in units of the picture's shorter side, seconds are seconds, the origin is the top left corner.
"""

import functools
import random
import zlib
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

COLORS = {
    "red": (220, 40, 40),
    "orange": (240, 135, 25),
    "yellow": (235, 215, 50),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "purple": (160, 60, 200),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "diamond")
OUTLINES = (*SHAPES, "cup", "ball")
DIRECTIONS = ("left", "right", "up", "down")
SLOTS = ("left", "middle", "right")
SWAPS = ((0, 1), (1, 2), (0, 2))
RATES = tuple(Fraction(r) for r in ("12", "15", "20", "24", "24000/1001", "25", "30", "30000/1001"))
SAMPLED_FPS = 2.0
MAX_SPRITES = 4
HIDDEN = -9.0  # a coordinate far outside every picture

TRAINED_SWAPS = 5  # games with more swaps are never trained on
_SWAP_SECONDS = (1.0, 1.4)
_REST_SECONDS = 0.65  # longer than the widest gap between sampled frames, so every rest is seen
_LOWERED_SECONDS = (1.3, 4.0)  # when the ball's cup comes down: never before the second pair of frames
_LOWERING_SECONDS = 0.15
_BALL_SEEN = 0.2  # the ball counts as seen while its cup is lifted by at least this share
_SWAP_SEEN = 0.05  # a swap counts as seen from this share of its way on


@dataclass(frozen=True)
class Clock:
    """Frame rate and length of a clip's container, and the frames of it that a model is shown."""

    rate: Fraction
    frames: int

    @property
    def duration(self) -> float:
        """Seconds."""
        return float(self.frames / self.rate)

    def sampled(self) -> np.ndarray:
        """Indices (n,) int64 of the sampled frames, n even: qwen-vl-utils' rule at 2 frames per second."""
        wanted = self.frames / float(self.rate) * SAMPLED_FPS
        count = int(min(max(wanted, 4), self.frames)) // 2 * 2
        return np.round(np.linspace(0, self.frames - 1, count)).astype(np.int64)

    @functools.cached_property
    def times(self) -> np.ndarray:
        """Seconds (n,) float64 of the sampled frames."""
        return self.sampled() / float(self.rate)

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """The names of the pairs of frames, as Qwen3-VL writes them before each: `0.3`, `1.4`, ..."""
        return tuple(f"{t:.1f}" for t in self.times.reshape(-1, 2).mean(1))


def make_clock(rng: random.Random, pairs: int) -> Clock:
    """A clock of random rate and length whose clip is sampled as exactly `pairs` pairs of frames."""
    while True:
        rate = rng.choice(RATES)
        clock = Clock(rate, round(rng.uniform(pairs + 0.02, pairs + 0.98) * rate))
        if len(clock.sampled()) == 2 * pairs:
            return clock


@dataclass(frozen=True)
class Sprite:
    """One outline of one colour; `radius` is half of its height."""

    outline: str
    color: str
    radius: float

    @property
    def name(self) -> str:
        """What a viewer would call it."""
        return f"{self.color} {self.outline}"

    @property
    def a_name(self) -> str:
        """The name with its article."""
        return f"{'an' if self.color[0] in 'aeiou' else 'a'} {self.name}"


@dataclass(frozen=True)
class MovingShape:
    """A shape that goes from `origin` to `target` during the clip and is seen from `start` to `end`.

    `extent` is the picture's (width, height).
    """

    extent: tuple[float, float]
    mover: Sprite
    direction: str
    origin: tuple[float, float]
    target: tuple[float, float]
    duration: float
    start: float
    end: float
    still: Sprite | None = None
    still_at: tuple[float, float] = (HIDDEN, HIDDEN)

    @property
    def sprites(self) -> tuple[Sprite, ...]:
        """From back to front, as `places` lists them."""
        return (self.mover,) if self.still is None else (self.still, self.mover)

    def visible(self, seconds: np.ndarray) -> np.ndarray:
        """Where the mover can be seen: (n,) bool."""
        return (seconds >= self.start) & (seconds < self.end)

    def places(self, seconds: np.ndarray) -> np.ndarray:
        """Centres of the sprites: (sprites, n, 2) as x, y; `HIDDEN` where one is not to be seen."""
        way = (seconds / self.duration)[:, None]
        path = np.asarray(self.origin) * (1 - way) + np.asarray(self.target) * way
        path[~self.visible(seconds)] = HIDDEN
        if self.still is None:
            return path[None]
        return np.stack([np.broadcast_to(self.still_at, path.shape), path])


@dataclass(frozen=True)
class Swap:
    """Two slots whose cups change places along half circles, the left cup above (`over`) or below."""

    slots: tuple[int, int]
    start: float
    duration: float
    over: bool = True

    @property
    def end(self) -> float:
        """Seconds at which both cups are in place again."""
        return self.start + self.duration

    def progress(self, seconds: np.ndarray) -> np.ndarray:
        """0 before, 1 after, linear between: (n,)."""
        return np.clip((seconds - self.start) / self.duration, 0.0, 1.0)

    def seen(self, seconds: np.ndarray) -> np.ndarray:
        """Where the cups are visibly on their way: (n,) bool."""
        way = self.progress(seconds)
        return (way >= _SWAP_SEEN) & (way <= 1 - _SWAP_SEEN)


@dataclass(frozen=True)
class ShellGame:
    """Three cups in a row, a ball under the one in slot `ball_slot`, and swaps in the order of time."""

    extent: tuple[float, float]
    ball: Sprite
    cup: Sprite
    ball_slot: int
    slots: tuple[float, float, float]
    row: float
    lowered: float
    swaps: tuple[Swap, ...]

    @property
    def sprites(self) -> tuple[Sprite, ...]:
        """From back to front, as `places` lists them."""
        return (self.ball, self.cup, self.cup, self.cup)

    def final_slot(self) -> int:
        """Where the ball is after the last swap."""
        return self.ball_after()[-1]

    def ball_after(self) -> list[int]:
        """The ball's slot at the start and after each swap."""
        slots = [self.ball_slot]
        for swap in self.swaps:
            first, second = swap.slots
            slots.append({first: second, second: first}.get(slots[-1], slots[-1]))
        return slots

    def lift(self, seconds: np.ndarray) -> np.ndarray:
        """How far the ball's cup is lifted, 1 to 0: (n,)."""
        return np.clip((self.lowered - seconds) / _LOWERING_SECONDS, 0.0, 1.0)

    def ball_seen(self, seconds: np.ndarray) -> np.ndarray:
        """Where the ball can be seen: (n,) bool."""
        return self.lift(seconds) >= _BALL_SEEN

    def places(self, seconds: np.ndarray) -> np.ndarray:
        """Centres of ball and cups: (4, n, 2) as x, y. The ball is always under its cup, drawn behind it."""
        size = self.cup.radius
        out = np.empty((4, len(seconds), 2))
        out[1:, :, 0] = np.asarray(self.slots)[:, None]
        out[1:, :, 1] = self.row
        at = [0, 1, 2]  # which cup stands in each slot
        for swap in self.swaps:
            left, right = swap.slots
            moving, way = seconds > swap.start, swap.progress(seconds)
            middle, reach = (self.slots[left] + self.slots[right]) / 2, (self.slots[right] - self.slots[left]) / 2
            swing = reach * np.cos(np.pi * way)
            rise = 2.25 * size * np.sin(np.pi * way) * (1 if swap.over else -1)
            for slot, side in ((left, 1), (right, -1)):
                cup = out[1 + at[slot]]
                cup[:, 0] = np.where(moving, middle - side * swing, cup[:, 0])
                cup[:, 1] = np.where(moving, self.row - side * rise, cup[:, 1])
            at[left], at[right] = at[right], at[left]
        out[0] = out[1 + self.ball_slot]
        out[0, :, 1] += 0.35 * size
        out[1 + self.ball_slot, :, 1] -= 2.1 * size * self.lift(seconds)
        return out


Scene = MovingShape | ShellGame


def sequence_held_out(pairs: list[tuple[int, int]] | tuple[tuple[int, int], ...]) -> bool:
    """Whether a whole sequence of two or more swaps is kept out of training (about one in eight, by a fixed hash)."""
    if len(pairs) < 2:
        return False
    return zlib.crc32("-".join(f"{a}{b}" for a, b in pairs).encode()) % 8 == 1


def most_swaps(duration: float) -> int:
    """How many swaps surely fit into a clip of this many seconds."""
    return int((duration - 1.3) / (_SWAP_SECONDS[1] + _REST_SECONDS - 0.1))


def make_moving_shape(rng: random.Random, clock: Clock, extent: tuple[float, float], *, partial: bool) -> MovingShape:
    """A random `MovingShape`; `extent` is the picture's (width, height) in world units, `partial` hides a part."""
    direction = rng.choice(DIRECTIONS)
    axis = 0 if direction in ("left", "right") else 1
    radius = rng.uniform(0.1, 0.155)
    seen = _visible_span(rng, clock) if partial else (0.0, clock.duration)
    # the way is chosen for the time in sight, then stretched over the whole clip
    low, high = radius * 0.8, extent[axis] - radius * 0.8
    length = rng.uniform(0.55, 0.95) * (high - low)
    begin = rng.uniform(low, high - length)
    along = (begin, begin + length) if direction in ("right", "down") else (begin + length, begin)
    speed = (along[1] - along[0]) / (seen[1] - seen[0])
    full = (along[0] - speed * seen[0], along[1] + speed * (clock.duration - seen[1]))
    cross = rng.uniform(radius * 1.1, extent[1 - axis] - radius * 1.1)
    ends = [(place, cross) if axis == 0 else (cross, place) for place in full]
    mover = Sprite(rng.choice(SHAPES), rng.choice(list(COLORS)), radius)
    still, still_at = _still_neighbour(rng, mover, extent, axis, cross)
    return MovingShape(extent, mover, direction, *ends, clock.duration, *seen, still, still_at)


def _visible_span(rng: random.Random, clock: Clock) -> tuple[float, float]:
    """A span that covers at least three seconds and leaves something out at one end or both."""
    length = rng.uniform(3.0, clock.duration - 1.2)
    start = rng.choice((0.0, rng.uniform(0.0, clock.duration - length), clock.duration - length))
    return start, start + length if start + length < clock.duration - 1e-6 else clock.duration


def _still_neighbour(
    rng: random.Random, mover: Sprite, extent: tuple[float, float], axis: int, cross: float
) -> tuple[Sprite | None, tuple[float, float]]:
    """A second shape of another colour and outline beside the mover's path: in half of the clips, if it fits."""
    radius = rng.uniform(0.09, 0.13)
    side = [c for c in (radius * 1.1, extent[1 - axis] - radius * 1.1) if abs(c - cross) > mover.radius + radius + 0.06]
    if not side or rng.random() < 0.5:
        return None, (HIDDEN, HIDDEN)
    place, beside = rng.uniform(radius, extent[axis] - radius), rng.choice(side)
    sprite = Sprite(
        rng.choice([s for s in SHAPES if s != mover.outline]),
        rng.choice([c for c in COLORS if c != mover.color]),
        radius,
    )
    return sprite, (place, beside) if axis == 0 else (beside, place)


def make_shell_game(
    rng: random.Random, clock: Clock, extent: tuple[float, float], *, swaps: int, held_out: bool = False
) -> ShellGame:
    """A random `ShellGame` of so many swaps; `held_out` asks for a sequence that training never shows."""
    if held_out and swaps < 2:
        raise ValueError(f"sequences of {swaps} swaps are never held out; ask for two or more")
    while True:
        pairs = [rng.choice(SWAPS) for _ in range(swaps)]
        if sequence_held_out(pairs) == held_out:
            break
    width, height = extent
    radius = rng.uniform(0.088, 0.105)
    shift = rng.uniform(-0.03, 0.03)
    slots = [width * 0.5 + shift + rng.uniform(-0.02, 0.02) + d for d in (-rng.uniform(0.3, 0.33), 0.0, 0.0)]
    slots[2] = slots[1] + rng.uniform(0.3, 0.33)
    row = height * 0.5 + rng.uniform(-0.06, 0.06)
    spare = clock.duration - _LOWERED_SECONDS[0] - 0.55 - swaps * (_SWAP_SECONDS[1] + _REST_SECONDS)
    lowered = rng.uniform(_LOWERED_SECONDS[0], min(_LOWERED_SECONDS[1], _LOWERED_SECONDS[0] + max(0.0, spare)))
    times = _swap_times(rng, clock, swaps, lowered + 0.3)
    ball_color, cup_color = rng.sample(list(COLORS), 2)
    return ShellGame(
        extent=extent,
        ball=Sprite("ball", ball_color, radius * rng.uniform(0.5, 0.62)),
        cup=Sprite("cup", cup_color, radius),
        ball_slot=rng.randrange(3),
        slots=(slots[0], slots[1], slots[2]),
        row=row,
        lowered=lowered,
        swaps=tuple(Swap(p, start, d, rng.random() < 0.5) for p, (start, d) in zip(pairs, times)),
    )


def _swap_times(rng: random.Random, clock: Clock, swaps: int, after: float) -> list[tuple[float, float]]:
    """(start, seconds) of each swap: rests of at least `_REST_SECONDS` between, what time is left spread at random."""
    lengths = [rng.uniform(*_SWAP_SECONDS) for _ in range(swaps)]
    spare = clock.duration - 0.25 - after - sum(lengths) - _REST_SECONDS * max(0, swaps - 1)
    if spare < 0:  # a tight clip: the quickest swaps
        lengths = [_SWAP_SECONDS[0]] * swaps
        spare = max(0.0, clock.duration - 0.25 - after - sum(lengths) - _REST_SECONDS * max(0, swaps - 1))
    cuts = sorted(rng.uniform(0.0, spare) for _ in range(swaps))
    out, at = [], after
    for index, (length, cut) in enumerate(zip(lengths, cuts)):
        start = at + cut - (cuts[index - 1] if index else 0.0)
        out.append((start, length))
        at = start + length + _REST_SECONDS
    return out
