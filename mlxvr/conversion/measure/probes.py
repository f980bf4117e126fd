r"""Probe prompts, on which a converted model is compared with its source.

The bundled probes are four questions about each of six of the package's own clips, one about each of two pictures that
are drawn here, and four without a picture: multiple choice, free text and one grounding question. Models are certain of
some and guess others, so that confidences lie on both sides of any threshold. Questions about a clip share its prefix.

The probes are short, because whole models read them: a clip takes at most 320 visual tokens, a picture at most 64. With
Qwen's own tokenizer the thirty prompts have some 12,000 tokens (Qwen2.5-VL) or 14,000 (Qwen3-VL); 5,000 of them go
through the model, since questions about one clip share its tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mlxvr.media import VisionInput, VisionSpec, load_vision
from mlxvr.media.vision import VisionSource
from mlxvr.model.network import VideoModel
from mlxvr.model.prompt import Prompt, build_prompt
from mlxvr.runtime.hooks import Hooks, ShouldStop

__all__ = ["Probe", "budgeted", "build_prompts", "bundled", "load_media"]

_VIDEO_TOKENS = 320
_IMAGE_TOKENS = 64

Asked = tuple[str, tuple[str, ...] | None, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """A question for both models.

    Attributes:
        name: for reports.
        source: the clip or picture, as `mlxvr.media.load_vision` takes it; None: text alone. Probes with the same path
            or the same object share its computation.
        question, options, kind: as in `mlxvr.model.prompt.build_prompt`.
    """

    name: str
    source: "VisionSource | None" = field(default=None, repr=False)
    question: str
    options: tuple[str, ...] | None = None
    kind: str = "qa"


def bundled() -> list[Probe]:
    """The probes that come with the package, always the same."""
    clips = Path(str(files("mlxvr"))) / "demo" / "clips"
    probes = [
        Probe(name=f"{clip}-{index}", source=clips / f"{clip}.mp4", question=question, options=options, kind=kind)
        for clip, asked in _CLIPS.items()
        for index, (question, options, kind) in enumerate(asked)
    ]
    disc, squares = _draw_disc(), _draw_squares()
    probes += [
        Probe(name="disc", source=disc, question="What color is the disc?", options=("blue", "red", "green")),
        Probe(name="squares", source=squares, question="Where is the larger of the two squares?"),
    ]
    return probes + [
        Probe(name=f"text-{index}", question=question, options=options)
        for index, (question, options) in enumerate(_TEXTS)
    ]


def budgeted(spec: VisionSpec) -> VisionSpec:
    """A model's own frame rules, with at most the tokens that a probe may have."""
    most = min(spec.image_max_tokens, _IMAGE_TOKENS)
    return spec.with_overrides(
        video_tokens=min(spec.video_tokens, _VIDEO_TOKENS),
        image_max_tokens=most,
        image_min_tokens=min(spec.image_min_tokens, most),
    )


def load_media(
    probes: Sequence[Probe], spec: VisionSpec, *, should_stop: ShouldStop | None = None
) -> list[tuple[VisionInput, ...]]:
    """The media of each probe, prepared for a model; probes about the same media get the same objects.

    Raises as `load_vision`.
    """
    loaded: dict[Any, VisionInput] = {}
    media: list[tuple[VisionInput, ...]] = []
    for probe in probes:
        if probe.source is None:
            media.append(())
            continue
        key = probe.source if isinstance(probe.source, str | Path) else id(probe.source)
        if key not in loaded:
            loaded[key] = load_vision(probe.source, spec, hooks=Hooks(should_stop=should_stop))
        media.append((loaded[key],))
    return media


def build_prompts(
    model: VideoModel, probes: Sequence[Probe], media: Sequence[Sequence[VisionInput]], *, system: str | None = None
) -> list[Prompt]:
    """The probes as prompts of a model; `media` as `load_media` returns them.

    `system`: the system prompt; None: `model.system_prompt`. Raises as `build_prompt`.
    """
    return [
        build_prompt(
            model.tokenizer,
            model.family,
            model.config,
            inputs,
            probe.question,
            options=probe.options,
            kind=probe.kind,
            system=model.system_prompt if system is None else system,
        )
        for probe, inputs in zip(probes, media, strict=True)
    ]


def _draw_disc() -> np.ndarray:
    """A red disc on grey, uint8 (224, 224, 3)."""
    y, x = np.indices((224, 224))
    picture = np.full((224, 224, 3), 200, dtype=np.uint8)
    picture[(y - 112) ** 2 + (x - 96) ** 2 < 60**2] = (210, 30, 30)
    return picture


def _draw_squares() -> np.ndarray:
    """A small green square at the left and a large blue one at the right, uint8 (192, 256, 3)."""
    picture = np.full((192, 256, 3), 240, dtype=np.uint8)
    picture[80:112, 32:64] = (20, 160, 60)
    picture[48:144, 136:232] = (40, 60, 200)
    return picture


_SIDES = ("up", "right", "left", "down")
_CUPS = ("left", "right", "middle")
_SHAPES = ("triangle", "square", "diamond", "circle")
_PAIRS = ("middle and right", "left and middle", "left and right")

_CLIPS: dict[str, tuple[Asked, ...]] = {
    "clip01": (
        ("Which color does the moving object have?", ("orange", "blue", "purple", "green"), "qa"),
        ("Where is the moving object heading?", _SIDES, "qa"),
        ("Which shape is moving?", None, "qa"),
        ("What color is the moving shape?", None, "qa"),
    ),
    "clip03": (
        ("Which shape is moving?", None, "qa"),
        ("the blue diamond is in view.", None, "grounding"),
        ("Name the shape that moves.", _SHAPES, "qa"),
        ("What color is the moving shape?", ("white", "orange", "green", "blue"), "qa"),
    ),
    "clip07": (
        ("Where is the moving object heading?", ("up", "down", "right", "left"), "qa"),
        ("What color is the moving shape?", ("white", "orange", "green", "blue"), "qa"),
        ("Name the shape that moves.", _SHAPES, "qa"),
        ("Where is the moving object heading?", None, "qa"),
    ),
    "clip02": (
        ("What color is the ball?", ("yellow", "red", "purple", "green"), "qa"),
        ("After all swaps, where is the ball?", _CUPS, "qa"),
        ("How many swaps happen?", ("2", "3", "4", "6"), "qa"),
        ("Under which cup is the ball at the end of the game?", None, "qa"),
    ),
    "clip08": (
        ("Under which cup is the ball at the start?", ("middle", "right", "left"), "qa"),
        ("Which cup hides the ball when the video ends?", _CUPS, "qa"),
        ("Which color do the cups have?", ("orange", "blue", "red", "white"), "qa"),
        ("Count the swaps.", ("4", "3", "1", "2"), "qa"),
    ),
    "clip10": (
        ("Under which cup is the ball at the start?", ("middle", "right", "left"), "qa"),
        ("Which cups change places in the first swap?", _PAIRS, "qa"),
        ("What color is the ball?", None, "qa"),
        ("After all swaps, where is the ball?", _CUPS, "qa"),
    ),
}

_STORY = (
    "Three cups stand on a table: a white one at the left, a white one in the middle and a white one at the right. "
    "At the beginning the left cup is up, and under it lies a small yellow ball. Then the cup comes down and nothing "
    "can be seen of the ball any more. After three seconds the left cup and the middle cup change places, slowly, so "
    "that everybody can follow. A moment later the middle cup and the right cup change places too. For a while nothing "
    "moves. Somebody walks past the table, and a bell rings twice in the house next door. Then the left cup and the "
    "right cup change places, faster than before, and at once the left cup and the middle cup do so as well. At the "
    "end all cups stand in a row again, the bell rings once more, and the cup that hides the ball is to be named. "
    "Under which cup is the ball?"
)
_TEXTS: tuple[tuple[str, tuple[str, ...] | None], ...] = (
    ("How many sides does a square have?", ("3", "4", "5", "6")),
    ("What is the capital of France?", None),
    ("A clip shows 24 frames in a second. How many frames does it show in half a minute?", None),
    (_STORY, _CUPS),
)
