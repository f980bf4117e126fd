"""Animated pictures as clips: what is seen, when, and which frames are taken.

What is seen is compared with the formats' own rules, worked out here pixel by pixel on random animations that use every
kind of disposal and blending.
"""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from mlxvr.errors import Cancelled, MediaError
from mlxvr.evaluation.report.gallery import read_thumbnails
from mlxvr.media import load_vision, probe
from mlxvr.media.animation.animation_reader import is_animation, read_animation
from mlxvr.media.animation.apng import read_apng
from mlxvr.media.animation.canvas import composite
from mlxvr.media.animation.gif import read_gif
from mlxvr.media.frame_options import FrameSelection
from mlxvr.media.image import to_rgb
from mlxvr.model.families.base import FAMILIES
from mlxvr.runtime.hooks import Hooks

SPEC = FAMILIES["qwen3_vl"].vision_spec({})
PALETTE = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 20, 30))
WIDTH, HEIGHT = 8, 6


def random_box(rng, *, full: bool = False) -> tuple[int, int, int, int]:
    width, height = (WIDTH, HEIGHT) if full else (int(rng.integers(1, WIDTH + 1)), int(rng.integers(1, HEIGHT + 1)))
    return int(rng.integers(0, WIDTH - width + 1)), int(rng.integers(0, HEIGHT - height + 1)), width, height


def on_white(frame: np.ndarray) -> np.ndarray:
    """RGBA levels on a white page, as floats."""
    alpha = frame[..., 3:] / 255
    return frame[..., :3] * alpha + 255 * (1 - alpha)


def lzw(indices: np.ndarray) -> bytes:
    """Colours of two bits as GIF's LZW with a clear code before its table can grow."""
    codes = [4]
    for place, index in enumerate(indices.ravel()):
        codes += [int(index)] + ([4] if place % 2 else [])
    bits = "".join(f"{code:03b}"[::-1] for code in [*codes, 5])
    data = bytes(int(bits[at : at + 8][::-1], 2) for at in range(0, len(bits), 8))
    blocks = [data[at : at + 255] for at in range(0, len(data), 255)]
    return b"\x02" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def write_gif(frames, *, trailer: bytes = b";") -> bytes:
    """frames: (x, y, colours (h, w), delay in 1/100 s, disposal, transparent colour or None)."""
    data = b"GIF89a" + struct.pack("<HHBBB", WIDTH, HEIGHT, 0xF1, 3, 0) + bytes(sum(PALETTE, ()))
    for x, y, colours, delay, disposal, transparent in frames:
        flags = disposal << 2 | (transparent is not None)
        data += b"\x21\xf9\x04" + struct.pack("<BHB", flags, delay, transparent or 0) + b"\0"
        data += b"\x2c" + struct.pack("<HHHHB", x, y, colours.shape[1], colours.shape[0], 0) + lzw(colours)
    return data + trailer


def show_gif(frames) -> list[np.ndarray]:
    canvas, shown = np.zeros((HEIGHT, WIDTH, 4)), []
    for x, y, colours, _, disposal, transparent in frames:
        before = canvas.copy()
        region = canvas[y : y + colours.shape[0], x : x + colours.shape[1]]
        for place in np.ndindex(colours.shape):
            if colours[place] != transparent:
                region[place] = (*PALETTE[colours[place]], 255)
        shown.append(on_white(canvas))
        if disposal == 2:
            region[:] = 0
        elif disposal == 3:
            canvas = before
    return shown


def random_gif(rng):
    frames = []
    for _ in range(4):
        x, y, width, height = random_box(rng)
        transparent = int(rng.integers(0, 4)) if rng.random() < 0.7 else None
        frames.append((x, y, rng.integers(0, 4, (height, width)), 10, int(rng.integers(0, 4)), transparent))
    return frames


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def scanlines(pixels: np.ndarray) -> bytes:
    return zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))


def write_apng(frames, *, still: np.ndarray | None = None) -> bytes:
    """frames: (x, y, RGBA pixels, (numerator, denominator) of the delay, disposal, blending)."""
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 6, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"acTL", struct.pack(">II", len(frames), 0))
    if still is not None:
        data += chunk(b"IDAT", scanlines(still))
    number = 0
    for index, (x, y, pixels, delay, disposal, blending) in enumerate(frames):
        height, width, _ = pixels.shape
        data += chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, width, height, x, y, *delay, disposal, blending))
        number += 1
        if index == 0 and still is None:
            data += chunk(b"IDAT", scanlines(pixels))
        else:
            data += chunk(b"fdAT", struct.pack(">I", number) + scanlines(pixels))
            number += 1
    return data + chunk(b"IEND", b"")


def show_apng(frames) -> list[np.ndarray]:
    canvas, shown = np.zeros((HEIGHT, WIDTH, 4)), []
    for index, (x, y, pixels, _, disposal, blending) in enumerate(frames):
        before = canvas.copy()
        region = canvas[y : y + pixels.shape[0], x : x + pixels.shape[1]]
        if blending:
            above, below = pixels[..., 3:] / 255, region[..., 3:] / 255
            alpha = above + below * (1 - above)
            colour = pixels[..., :3] * above + region[..., :3] * below * (1 - above)
            region[:] = np.concatenate([colour / np.maximum(alpha, 1e-9), 255 * alpha], axis=-1)
        else:
            region[:] = pixels
        shown.append(on_white(canvas))
        if disposal == 1 or (disposal == 2 and index == 0):
            region[:] = 0
        elif disposal == 2:
            canvas = before
    return shown


def random_apng(rng):
    frames = []
    for index in range(4):
        x, y, width, height = random_box(rng, full=index == 0)
        pixels = rng.integers(0, 256, (height, width, 4)).astype(np.uint8)
        pixels[..., 3] = rng.choice([0, 128, 255], (height, width))
        frames.append((x, y, pixels, (1, 10), int(rng.integers(0, 3)), int(rng.integers(0, 2))))
    return frames


def test_gifs_are_shown_by_the_rules():
    rng = np.random.default_rng(0)
    for _ in range(40):
        frames = random_gif(rng)
        shown = [to_rgb(image) for image in composite(read_gif(write_gif(frames)))]
        assert all(np.array_equal(mine, truth) for mine, truth in zip(shown, show_gif(frames), strict=True))


def test_pngs_are_shown_by_the_rules():
    rng = np.random.default_rng(0)
    for trial in range(40):
        frames = random_apng(rng)
        still = np.full((HEIGHT, WIDTH, 4), 7, np.uint8) if trial % 4 == 0 else None
        shown = [to_rgb(image) for image in composite(read_apng(write_apng(frames, still=still)))]
        for mine, truth in zip(shown, show_apng(frames), strict=True):
            assert np.abs(mine - truth).max() <= 1  # levels are rounded when they are laid over each other


@pytest.mark.parametrize("kind", ["gif", "png"])
def test_times_are_the_delays(tmp_path, kind):
    """0.2, 0.1 (asked for none), 0.1 (asked for 10 ms), 0.5, 0.3 and 0.4 s."""
    path = tmp_path / f"moving.{kind}"
    rng = np.random.default_rng(0)
    delays = [20, 0, 1, 50, 30, 40]
    if kind == "gif":
        path.write_bytes(write_gif([(0, 0, rng.integers(0, 4, (HEIGHT, WIDTH)), delay, 1, None) for delay in delays]))
    else:
        pixels = rng.integers(0, 256, (6, HEIGHT, WIDTH, 4)).astype(np.uint8)
        ratios = [(delay, 100 if place % 2 else 0) for place, delay in enumerate(delays)]  # 0 stands for 100
        path.write_bytes(write_apng([(0, 0, part, ratio, 0, 0) for part, ratio in zip(pixels, ratios)]))
    spec = SPEC.with_overrides(sample_by="index")
    frames = read_animation(path, spec, FrameSelection(frames=6))
    assert frames.seconds == pytest.approx([0, 0.2, 0.3, 0.4, 0.9, 1.2])
    assert frames.duration == pytest.approx(1.6)
    assert frames.sampled_fps == pytest.approx(6 / 1.6)
    part = read_animation(path, spec, FrameSelection(start=0.25, end=0.95))
    assert part.indices.tolist() == [2, 4]  # of frames 2 to 4, an even number
    with pytest.raises(MediaError, match=r"no frame is shown between 1\.3 s"):
        read_animation(path, spec, FrameSelection(start=1.3))
    # at even distances from 0 to 1.56 s (0.04 s before the end): 0, 0.312, 0.624, 0.936, 1.248 and 1.56 s
    by_time = read_animation(path, SPEC, FrameSelection(frames=6))
    assert by_time.indices.tolist() == [0, 2, 3, 4, 5, 5]
    assert by_time.seconds == pytest.approx(np.arange(6) * 0.312)
    assert np.array_equal(by_time.pixels[4], by_time.pixels[5])


def ramp(path, count: int, **options) -> None:
    """An animation whose k-th frame is gray of level 20 k."""
    images = [Image.new("RGB", (64, 48), (20 * index,) * 3) for index in range(count)]
    images[0].save(path, save_all=True, append_images=images[1:], **options)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "avif"])
def test_each_format_is_a_clip(tmp_path, kind):
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    path = tmp_path / f"moving.{kind}"
    ramp(path, 10, duration=250, **({"lossless": True} if kind == "webp" else {}))
    assert is_animation(path)
    frames = read_animation(path, SPEC)  # 2.5 s at 2 frames a second, an even number, at least 4
    assert frames.indices.tolist() == [0, 3, 6, 9]
    assert frames.seconds == pytest.approx([0, 0.75, 1.5, 2.25])
    assert frames.source_size == (48, 64)
    levels = frames.pixels.reshape(4, -1).mean(axis=1)
    assert levels == pytest.approx([0, 60, 120, 180], abs=3 if kind == "avif" else 0.5)
    vision = load_vision(path, SPEC)
    assert vision.kind == "video"
    assert vision.seconds == pytest.approx((0.375, 1.875))
    assert vision.second_per_grid == pytest.approx(2 / (4 / 2.5))


def test_a_single_frame_is_an_image(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "one.gif").write_bytes(write_gif(random_gif(rng)[:1]))
    still = np.full((HEIGHT, WIDTH, 4), 255, np.uint8)
    (tmp_path / "one.png").write_bytes(write_apng(random_apng(rng)[:1], still=still))
    ramp(tmp_path / "pages.tiff", 3)
    for name in ("one.gif", "one.png", "pages.tiff"):
        assert not is_animation(tmp_path / name)
        assert load_vision(tmp_path / name, SPEC).kind == "image"


def test_a_gif_without_its_last_byte_is_whole(tmp_path):
    path = tmp_path / "moving.gif"
    path.write_bytes(write_gif(random_gif(np.random.default_rng(0)), trailer=b""))
    assert len(read_animation(path, SPEC)) == 4


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_a_file_cut_short_is_refused(tmp_path, kind):
    path = tmp_path / f"cut.{kind}"
    ramp(path, 10, duration=100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(MediaError) as caught:
        load_vision(path, SPEC)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rectangles_that_stick_out(tmp_path):
    """What lies outside of the animation is not drawn."""
    rng = np.random.default_rng(0)
    boxes = [
        (0, 0, rng.integers(0, 4, (HEIGHT, WIDTH))),
        (5, 4, rng.integers(0, 4, (HEIGHT, WIDTH))),
        (9, 9, np.zeros((2, 2), int)),
    ]
    frames = [(x, y, colours, 10, 2, None) for x, y, colours in boxes]
    inside = [(x, y, colours[: max(0, HEIGHT - y), : max(0, WIDTH - x)], 10, 2, None) for x, y, colours in boxes]
    shown = [to_rgb(image) for image in composite(read_gif(write_gif(frames)))]
    assert all(np.array_equal(mine, truth) for mine, truth in zip(shown, show_gif(inside), strict=True))


def test_it_can_be_stopped_and_says_how_far_it_is(tmp_path):
    path = tmp_path / "moving.webp"
    ramp(path, 10, duration=100)
    steps: list[tuple[str, int, int]] = []
    read_animation(path, SPEC, hooks=Hooks(progress=lambda *step: steps.append(step)))
    assert steps == [("decoding", done, 4) for done in (1, 2, 3, 4)]
    with pytest.raises(Cancelled):
        read_animation(path, SPEC, hooks=Hooks(should_stop=lambda: True))


def test_a_report_shows_its_frames(tmp_path):
    path = tmp_path / "moving.gif"
    ramp(path, 10, duration=250)
    shown = read_thumbnails(path)
    assert [thumbnail["seconds"] for thumbnail in shown] == [0.0, 0.75, 1.5, 2.25]


def test_a_picture_is_said_to_be_one_where_a_video_is_wanted(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "still.png")
    with pytest.raises(MediaError, match="is not a video: it holds an image"):
        probe(tmp_path / "still.png")
