"""Levels and geometry against FFmpeg's own filters: what is followed, and what is left as the training code has it.

The training code's readers (qwen-vl-utils with torchcodec, decord or torchvision) give the pixels as they are stored,
turned to RGB by the stream's matrix and range: torchcodec ignores the sample aspect ratio (its issue 733) and maps no
tones. So do we. Our frames are held against a filter graph that does the same and against the standards' formulas, and
what a player would show (scaled by the aspect ratio, deinterlaced, tone mapped) is shown to be something else.
"""

import itertools
from fractions import Fraction

import av
import clips
import numpy as np
import pytest

from mlxvr.media import read_video
from mlxvr.media.frame_options import FrameSelection
from mlxvr.model.families.base import FAMILIES

SPEC = FAMILIES["qwen3_vl"].vision_spec({}).with_overrides(frame_min_tokens=1)

X265 = {"x265-params": "log-level=none:qp=1"}
X264 = {"qp": "1"}

# Kr and Kb of the matrix (ITU-T H.273, table 4), the encoder, its pixel format, tags, bits
STREAMS = {
    "SDR, BT.601": ((0.299, 0.114), "libx264", "yuv420p", {"colorspace": 5}, X264),
    "SDR, BT.709": ((0.2126, 0.0722), "libx264", "yuv420p", {"colorspace": 1, "color_primaries": 1}, X264),
    "HLG, 10 bits": (
        (0.2627, 0.0593),
        "libx265",
        "yuv420p10le",
        {"colorspace": 9, "color_primaries": 9, "color_trc": 18},
        X265,
    ),
    "PQ, 10 bits": (
        (0.2627, 0.0593),
        "libx265",
        "yuv420p10le",
        {"colorspace": 9, "color_primaries": 9, "color_trc": 16},
        X265,
    ),
    "BT.709, 10 bits": ((0.2126, 0.0722), "libx265", "yuv420p10le", {"colorspace": 1}, X265),
}
LIMITED, FULL = 1, 2


def write_flat(path, ycc, *, codec, pix_fmt, tags, options, full):
    """A clip of one colour, given in units of the 8-bit code."""
    bits = 10 if "10" in pix_fmt else 8
    kind = np.uint16 if bits == 10 else np.uint8
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=5, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 64, pix_fmt
        for name, value in {**tags, "color_range": FULL if full else LIMITED}.items():
            setattr(stream.codec_context, name, value)
        for index in range(4):
            frame = av.VideoFrame(64, 64, pix_fmt)
            for plane, level in zip(frame.planes, ycc):
                rows = np.full((plane.height, plane.line_size // kind().itemsize), level * 2 ** (bits - 8), dtype=kind)
                plane.update(rows.tobytes())
            frame.pts, frame.time_base = index, Fraction(1, 5)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def filtered(path, *filters):
    """The first frame through a graph of FFmpeg's filters, as RGB."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frame = next(container.decode(stream))
        graph = av.filter.Graph()
        chain = [graph.add_buffer(template=stream, time_base=stream.time_base)]
        chain += [graph.add(name, arguments) for name, arguments in (*filters, ("format", "rgb24"))]
        chain.append(graph.add("buffersink"))
        for left, right in itertools.pairwise(chain):
            left.link_to(right)
        graph.configure()
        graph.push(frame)
        graph.push(None)
        return graph.pull().to_ndarray()


class TestLevels:
    @pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
    @pytest.mark.parametrize("name", STREAMS)
    @pytest.mark.parametrize("ycc", [(120, 90, 180), (200, 128, 128), (60, 160, 110)], ids=str)
    def test_matrix_and_range(self, tmp_path, name, full, ycc):
        (kr, kb), codec, pix_fmt, tags, options = STREAMS[name]
        path = write_flat(
            tmp_path / "flat.mp4", ycc, codec=codec, pix_fmt=pix_fmt, tags=tags, options=options, full=full
        )
        y, cb, cr = ycc
        scale = 255 / 255.75 if full and "10" in pix_fmt else 1.0  # 10-bit full range ends at 1023, not at 4 * 255
        luma = y / scale if full else (y - 16) * 255 / 219
        blue, red = ((c - 128) * (1 if full else 255 / 224) for c in (cb, cr))
        r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
        g = (luma - kr * r - kb * b) / (1 - kr - kb)
        pixels = read_video(path, SPEC, FrameSelection(frames=2)).pixels.astype(float)
        assert np.abs(pixels - np.clip([r, g, b], 0, 255)).max() <= 3
        assert np.abs(pixels[0] - filtered(path, ("scale", "in_color_matrix=auto")).astype(float)).max() <= 1

    def test_tones_are_not_mapped(self, tmp_path):
        """As stored: a player would show PQ's half, 92 nits, as a mid-tone of a picture whose white has 203 nits."""
        _, codec, pix_fmt, tags, options = STREAMS["PQ, 10 bits"]
        path = write_flat(
            tmp_path / "pq.mp4", (126, 128, 128), codec=codec, pix_fmt=pix_fmt, tags=tags, options=options, full=False
        )
        assert read_video(path, SPEC, FrameSelection(frames=2)).pixels.mean() == pytest.approx(128, abs=2)
        code = 0.5 ** (32 / 2523)  # SMPTE ST 2084
        nits = 10_000 * (max(code - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * code)) ** (16_384 / 2610)
        assert nits == pytest.approx(92, abs=1)
        assert 255 * (nits / 203) ** (1 / 2.4) > 180


class TestGeometry:
    @pytest.fixture
    def wide(self, tmp_path):
        """720x576 of a DVD in small: 128x96 stored, shown 16:9 (pixels 4:3)."""
        path = tmp_path / "wide.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
            stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
            for index in range(8):
                frame = av.VideoFrame.from_ndarray(clips.draw_code(index, 128, 96), format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 30)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    def test_pixels_that_are_not_square_are_left_as_stored(self, wide):
        with av.open(str(wide)) as container:
            assert container.streams.video[0].sample_aspect_ratio == Fraction(4, 3)
        frames = read_video(wide, SPEC, FrameSelection(frames=4))
        assert frames.source_size == (96, 128)
        assert np.array_equal(frames.pixels[0], filtered(wide, ("setsar", "1")))
        assert filtered(wide, ("setsar", "4/3"), ("scale", "iw*sar:ih")).shape == (96, 170, 3)  # a player's

    def test_interlaced_pictures_are_left_as_stored(self, tmp_path):
        """Both fields in one picture: one shows code 5, the other code 250, which a deinterlacer takes apart."""
        comb = clips.draw_code(5, 128, 96)
        comb[1::2] = clips.draw_code(250, 128, 96)[1::2]
        path = clips.write_clip(
            tmp_path / "comb.mp4",
            images=[comb] * 8,
            pix_fmt="yuv444p",
            options={"x264-params": "tff=1", "qp": "1"},
        )
        with av.open(str(path)) as container:
            assert next(container.decode(video=0)).interlaced_frame
        ours = read_video(path, SPEC, FrameSelection(frames=4)).pixels[0]
        assert np.array_equal(ours, filtered(path, ("scale", "in_color_matrix=auto")))
        assert np.abs(ours.astype(int) - comb).mean() < 5
        assert np.abs(filtered(path, ("yadif", "mode=send_frame")).astype(int) - comb).mean() > 20

    @pytest.mark.parametrize("rotation", [90, 180, 270])
    def test_a_phones_hdr_video_is_turned_upright(self, tmp_path, rotation):
        """10-bit HEVC, HLG, BT.2020, with a display matrix, as an iPhone writes it."""
        upright = [clips.draw_code(index, 128, 96) for index in range(8)]
        stored = [np.ascontiguousarray(np.rot90(pixels, -rotation // 90)) for pixels in upright]
        path = clips.write_clip(
            tmp_path / "phone.mov",
            images=stored,
            size=(stored[0].shape[1], stored[0].shape[0]),
            codec="libx265",
            pix_fmt="yuv420p10le",
            rotation=rotation,
            options={"x265-params": "log-level=none:colorprim=bt2020:transfer=arib-std-b67:colormatrix=bt2020nc"},
        )
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            assert (frame.format.name, frame.color_trc) == ("yuv420p10le", 18)
        assert clips.read_codes(read_video(path, SPEC, FrameSelection(frames=4)).pixels) == [0, 2, 5, 7]
