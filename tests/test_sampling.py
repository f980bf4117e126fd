"""Which frames and what sizes: against tables worked by hand from qwen-vl-utils' rules.

Every expected value below was worked out on paper from the formulas in the comments, not taken from a program.
"""

import math

import numpy as np
import pytest

from mlxvr.errors import ConfigError, MediaError
from mlxvr.media.sampling import frame_indices, frame_size, image_size
from mlxvr.model.families.base import FAMILIES, family_of

QWEN2 = FAMILIES["qwen2_5_vl"].vision_spec({})  # factor 28
QWEN3 = FAMILIES["qwen3_vl"].vision_spec({})  # factor 32

# n = total / source_fps * fps, clipped to [min_frames, max_frames] and to total, down to a multiple of 2;
# indices = round(first + i * (last - first) / (n - 1))
INDICES = [
    # few frames
    (1, 30, {}, [0]),
    (2, 30, {}, [0, 1]),
    (3, 30, {}, [0, 2]),  # 3 -> 2
    (4, 30, {}, [0, 1, 2, 3]),
    (5, 30, {}, [0, 1, 3, 4]),  # 5 / 30 s -> at least 4; steps of 4/3
    (7, 1, {}, [0, 1, 2, 4, 5, 6]),  # 7 s -> 14, only 7 exist, even 6; steps of 1.2
    (1, 30, {"fps": 60.0}, [0]),
    # by rate
    (60, 30, {}, [0, 20, 39, 59]),  # 2 s -> 4; steps of 59/3
    (90, 30, {}, [0, 18, 36, 53, 71, 89]),  # 3 s -> 6; steps of 17.8
    (75, 30, {}, [0, 25, 49, 74]),  # 2.5 s -> 5 -> 4; steps of 74/3
    (300, 30, {"fps": 1.0}, [0, 33, 66, 100, 133, 166, 199, 233, 266, 299]),  # steps of 299/9
    (240, 24, {"fps": 0.5}, [0, 80, 159, 239]),  # 10 s -> 5 -> 4
    (10, 5, {"fps": 30.0}, list(range(10))),  # faster than the source: every frame, once
    (11, 5, {"fps": 30.0}, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]),  # 11 -> 10; steps of 10/9
    # bounds on the number
    (60, 30, {"min_frames": 8}, [0, 8, 17, 25, 34, 42, 51, 59]),  # steps of 59/7
    (60, 30, {"min_frames": 5}, [0, 12, 24, 35, 47, 59]),  # 5 is rounded up to 6
    (60, 30, {"min_frames": 1}, [0, 20, 39, 59]),  # 2 s -> 4 anyway
    (300, 30, {"max_frames": 7}, [0, 60, 120, 179, 239, 299]),  # 7 is rounded down to 6; steps of 59.8
    (300, 30, {"max_frames": 2}, [0, 299]),  # the upper bound beats the lower one
    (300, 30, {"max_frames": 3}, [0, 299]),
    # a given number, rounded to a multiple of 2 (halves to the even multiple)
    (10, 30, {"nframes": 2}, [0, 9]),
    (10, 30, {"nframes": 3}, [0, 3, 6, 9]),  # 1.5 -> 2 pairs
    (10, 30, {"nframes": 4}, [0, 3, 6, 9]),
    (10, 30, {"nframes": 5}, [0, 3, 6, 9]),  # 2.5 -> 2 pairs
    (15, 30, {"nframes": 7}, [0, 2, 4, 6, 8, 10, 12, 14]),  # 3.5 -> 4 pairs
    (4, 30, {"nframes": 4}, [0, 1, 2, 3]),
    (9, 30, {"nframes": 16}, [0, 1, 2, 3, 5, 6, 7, 8]),  # 9 exist -> 8; steps of 8/7
    (5, 30, {"nframes": 6}, [0, 1, 3, 4]),  # 5 exist -> 4; steps of 4/3
    (1, 30, {"nframes": 6}, [0]),
    (10, 30, {"nframes": 4, "fps": 30.0, "max_frames": 2}, [0, 3, 6, 9]),  # beats the rate and its bounds
    # a range in seconds: from ceil(start * fps) to floor(end * fps)
    (300, 30, {"start": 1, "end": 2}, [30, 40, 50, 60]),  # 31 frames -> 2.07, at least 4
    (100, 25, {"start": 0.5}, [13, 30, 47, 65, 82, 99]),  # ceil(12.5); 87 frames -> 6.96; steps of 17.2
    (100, 25, {"end": 1.99}, [0, 16, 33, 49]),  # floor(49.75); 50 frames -> 4; steps of 49/3
    (300, 30, {"start": 9, "end": 100}, [270, 280, 289, 299]),  # an end after the clip's is the clip's
    (300, 30, {"start": 1.0, "end": 1.02}, [30]),  # holds a single frame
    (300, 30, {"start": 1.0, "end": 1.04}, [30, 31]),
    (
        300,
        30,
        {"start": 0, "end": 10},
        [0, 16, 31, 47, 63, 79, 94, 110, 126, 142, 157, 173, 189, 205, 220, 236, 252, 268, 283, 299],
    ),
    (300, 30, {"start": 1.1, "end": 1.3}, [33, 35, 37, 39]),  # 1.1 * 30 is 33, though not in floating point
    (300, 30, {"start": 2, "end": 4, "nframes": 2}, [60, 120]),
    (300, 30, {"start": 2, "end": 4, "max_frames": 2}, [60, 120]),
]


@pytest.mark.parametrize(("total", "source_fps", "options", "expected"), INDICES)
def test_indices_are_the_hand_worked_ones(total, source_fps, options, expected):
    indices = frame_indices(total, source_fps, **options)
    assert indices.dtype == np.int64
    assert indices.tolist() == expected


@pytest.mark.parametrize(
    ("total", "nframes", "says"),
    [
        (9, 16, "16 frames were asked for, and there are 9: 8 are sampled"),
        (9, 8, ""),
        (9, 9, ""),
        (1, 2, "there are 1"),
    ],
)
def test_frames_that_do_not_exist_are_told(caplog, total, nframes, says):
    frame_indices(total, 30, nframes=nframes)
    assert says in caplog.text
    assert len(caplog.records) == bool(says)


@pytest.mark.parametrize(
    ("total", "source_fps", "options", "count", "head", "last"),
    [
        (36_000, 30, {}, 768, [0, 47, 94, 141], 35_999),  # 20 min -> 2,400, at most 768; steps of 35999/767 = 46.93..
        (18_000, 30, {}, 768, [0, 23, 47, 70], 17_999),  # 10 min -> 1,200; steps of 17999/767 = 23.466..
        (18_000, 30, {"max_frames": 256}, 256, [0, 71, 141, 212], 17_999),  # steps of 17999/255 = 70.584..
        (300, 30_000 / 1001, {}, 20, [0, 16, 31, 47], 299),  # 10.01 s -> 20.02
        (1_798, 30_000 / 1001, {}, 118, [0, 15, 31, 46], 1_797),  # 59.99 s -> 119.98; steps of 1797/117 = 15.358..
        (1_800, 30, {}, 120, [0, 15, 30, 45, 60, 76], 1_799),  # steps of 1799/119 = 15.117..
        (1_400, 30, {"fps": 0.3}, 14, [0, 108, 215, 323], 1_399),  # 46.67 s -> 14, though not in floating point
        (18_000, 30, {"nframes": 64}, 64, [0, 286, 571, 857], 17_999),  # steps of 17999/63 = 285.698..
    ],
)
def test_long_clips(total, source_fps, options, count, head, last):
    indices = frame_indices(total, source_fps, **options)
    assert len(indices) == count
    assert indices[: len(head)].tolist() == head
    assert indices[-1] == last
    assert np.all(np.diff(indices) > 0)


@pytest.mark.parametrize(
    ("total", "source_fps", "options", "error", "says"),
    [
        (0, 30, {}, MediaError, "no frames"),
        (10, 0, {}, MediaError, "frame rate is 0"),
        (10, 30, {"fps": 0}, ConfigError, "fps is 0"),
        (10, 30, {"fps": -2}, ConfigError, "fps is -2"),
        (10, 30, {"fps": math.nan}, ConfigError, "fps is nan"),
        (10, 30, {"fps": math.inf}, ConfigError, "fps is inf"),
        (10, 30, {"nframes": 0}, ConfigError, "0 frames cannot be sampled"),
        (10, 30, {"nframes": 1}, ConfigError, "1 frames cannot be sampled"),
        (10, 30, {"nframes": -4}, ConfigError, "-4 frames cannot be sampled"),
        (10, 30, {"max_frames": 1}, ConfigError, "max_frames is 1"),
        (10, 30, {"min_frames": 0}, ConfigError, "min_frames is 0"),
        (300, 30, {"start": 2, "end": 2}, ConfigError, "empty"),
        (300, 30, {"start": 0, "end": 0}, ConfigError, "empty"),
        (300, 30, {"end": 0}, ConfigError, "empty"),
        (300, 30, {"start": 3, "end": 2}, ConfigError, "backwards"),
        (300, 30, {"start": -1}, ConfigError, "start is -1"),
        (300, 30, {"end": -1}, ConfigError, "end is -1"),
        (300, 30, {"end": math.nan}, ConfigError, "end is nan"),
        (300, 30, {"start": 10}, MediaError, "ends at 10.00 s"),
        (300, 30, {"start": 99, "end": 100}, MediaError, "ends at 10.00 s"),
        (300, 30, {"start": 1.01, "end": 1.02}, MediaError, "no frame lies between"),  # ceil(30.3) > floor(30.6)
    ],
)
def test_what_cannot_be_sampled_is_one_clear_line(total, source_fps, options, error, says):
    with pytest.raises(error) as caught:
        frame_indices(total, source_fps, **options)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# Sides are rounded to the factor; if the area is over `most`, both are divided by sqrt(height * width / most) and
# rounded down; if it is under `least`, multiplied by sqrt(least / (height * width)) and rounded up.
# most = max(min(768, 16384 / n * 2), 1.05 * 16) tokens of factor * factor pixels, least = 16 tokens.
FRAME_SIZES = [
    (QWEN3, 720, 1280, 120, (384, 704)),  # most 273.07 tokens, / 1.8155: 12.39 and 22.03 tokens a side
    (QWEN3, 1280, 720, 120, (704, 384)),
    (QWEN3, 720, 1280, 4, (640, 1152)),  # most 768, / 1.0825: 20.78 and 36.95
    (QWEN2, 720, 1280, 4, (560, 1008)),  # most 768, / 1.2372: 20.78 and 36.95
    (QWEN3, 128, 128, 24, (128, 128)),  # exactly 16 tokens
    (QWEN3, 100, 100, 24, (128, 128)),  # 3 x 3 -> * 1.28: 4 x 4
    (QWEN2, 2, 2, 4, (112, 112)),  # * 56: 4 x 4
    (QWEN2, 10, 1000, 8, (28, 1008)),  # 0.36 -> 1 and 35.7 -> 36: 36 tokens, within bounds
    (QWEN3, 2, 400, 8, (32, 1824)),  # ratio 200 passes; 1 x 12 -> * 4.5255: 0.28 -> 1 and 56.57 -> 57
    (QWEN2, 480, 640, 64, (476, 644)),  # most 512; 17.14 -> 17 and 22.86 -> 23: 391 tokens
    (QWEN2, 1080, 1920, 256, (224, 420)),  # most 128, / 4.5457: 8.49 and 15.09
    (QWEN2, 1080, 1920, 768, (112, 224)),  # most 42.67, / 7.8734: 4.90 and 8.71
    (QWEN2, 720, 1280, 4000, (84, 140)),  # most int(1.05 * 16 * 784) = 13171 pixels, / 8.3649: 3.07 and 5.47
    (QWEN2, 224, 224, 16, (224, 224)),
    (QWEN2, 42, 700, 16, (56, 700)),  # 1.5 -> 2 (halves to even)
    (QWEN2, 70, 700, 16, (56, 700)),  # 2.5 -> 2
    (QWEN3, 63, 2791, 765, (32, 1376)),  # / 2.0022: 0.98 -> 0, but never below 1 token; 43.56
    (QWEN3.with_overrides(frame_max_tokens=64), 720, 1280, 4, (192, 320)),  # / 3.75: 6.0 and 10.67
    (QWEN3.with_overrides(video_tokens=4096), 720, 1280, 256, (128, 224)),  # most 32, / 5.3033: 4.24 and 7.54
]


@pytest.mark.parametrize(("spec", "height", "width", "n_frames", "expected"), FRAME_SIZES)
def test_frame_sizes_are_the_hand_worked_ones(spec, height, width, n_frames, expected):
    assert frame_size(height, width, n_frames, spec) == expected


@pytest.mark.parametrize(
    ("spec", "height", "width", "expected"),
    [
        (QWEN2, 480, 640, (476, 644)),  # 391 tokens, within 128 to 4,096
        (QWEN2, 100, 100, (336, 336)),  # * 3.1678: 11.31 -> 12
        (QWEN2, 4000, 6000, (1456, 2184)),  # / 2.7338: 52.26 and 78.38
        (QWEN2.with_overrides(image_max_tokens=16_384), 4000, 6000, (2912, 4368)),  # / 1.3669: 104.5 and 156.8
        (QWEN3, 3024, 4032, (1760, 2336)),  # a phone's 12 megapixels, / 1.7050: 55.43 and 73.90
        (
            QWEN3.with_overrides(image_max_tokens=64),
            1080,
            1920,
            (192, 320),
        ),  # under the least: 6.0 and 10.7
        (QWEN3.with_overrides(video_tokens=64), 1080, 1920, (192, 320)),  # an image is all of what is shown
        (QWEN3, 64, 64, (384, 384)),  # * 5.6569: 11.31 -> 12
        (QWEN3, 1080, 1920, (1088, 1920)),  # 33.75 -> 34 and 60: 2,040 tokens
    ],
)
def test_image_sizes_are_the_hand_worked_ones(spec, height, width, expected):
    assert image_size(height, width, spec) == expected


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4000), (4000, 1), (2, 402), (10, 2001), (1, 50), (0, 5)])
def test_hopeless_shapes_are_one_clear_line(height, width):
    for size in (lambda: frame_size(height, width, 4, QWEN3), lambda: image_size(height, width, QWEN3)):
        with pytest.raises(MediaError) as caught:
            size()
        assert f"{width}x{height}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_budgets_hold_for_every_shape():
    for spec in (QWEN2, QWEN3):
        for height, width in ((240, 320), (1080, 1920), (2160, 3840), (1920, 1080)):
            for n_frames in (2, 8, 64, 256, 768):
                rows, columns = frame_size(height, width, n_frames, spec)
                assert rows % spec.factor == 0
                assert columns % spec.factor == 0
                tokens = rows * columns // spec.factor**2
                assert tokens <= spec.frame_max_tokens
                assert tokens * n_frames // 2 <= max(spec.video_tokens, 1.05 * spec.frame_min_tokens * n_frames / 2)


QWEN25_IMAGE = {  # Qwen2.5-VL-7B-Instruct, as published
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
}
QWEN25_VIDEO = {  # transformers 4.57 gives the pixels in both spellings
    **QWEN25_IMAGE,
    "size": {"shortest_edge": 3136, "longest_edge": 12845056},
    "min_frames": 4,
    "max_frames": 768,
    "do_sample_frames": False,
    "fps": None,
    "num_frames": None,
}
QWEN3_IMAGE = {  # Qwen3-VL-8B-Instruct, as published
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
QWEN3_VIDEO = {**QWEN3_IMAGE, "size": {"longest_edge": 25165824, "shortest_edge": 4096}}


class TestSpecFromFiles:
    """What published and freshly written processor files look like."""

    def test_qwen25(self):
        config = {"model_type": "qwen2_5_vl", "vision_config": {"patch_size": 14, "spatial_merge_size": 2}}
        spec = family_of(config).vision_spec(config, QWEN25_IMAGE, QWEN25_VIDEO)
        assert (spec.patch_size, spec.merge_size, spec.temporal_patch_size, spec.factor) == (14, 2, 2, 28)
        assert (spec.frame_min_tokens, spec.frame_max_tokens) == (16, 768)  # the files allow 4 to 16,384
        assert (spec.image_min_tokens, spec.image_max_tokens) == (128, 4096)  # the files allow 4 to 16,384
        assert (spec.video_tokens, spec.fps, spec.min_frames, spec.max_frames) == (16384, 2.0, 4, 768)
        assert spec.mean[0] == 0.48145466

    def test_qwen3(self):
        config = {"model_type": "qwen3_vl", "vision_config": {"patch_size": 16, "spatial_merge_size": 2}}
        spec = family_of(config).vision_spec(config, QWEN3_IMAGE, QWEN3_VIDEO)
        assert (spec.patch_size, spec.factor) == (16, 32)
        assert spec.video_tokens == 12288  # 25165824 pixels of all frames / 1024 a token / 2 frames a patch
        assert (spec.frame_min_tokens, spec.frame_max_tokens) == (16, 768)
        assert spec.mean == spec.std == (0.5, 0.5, 0.5)

    def test_silent_files_leave_the_method_and_the_family(self):
        assert (QWEN2.patch_size, QWEN3.patch_size) == (14, 16)
        assert QWEN2.mean != QWEN3.mean
        assert QWEN2.video_tokens == QWEN3.video_tokens == 16384

    def test_file_budgets_narrow_the_training_budgets(self):
        video = {"min_pixels": 32 * 784, "max_pixels": 100 * 784}
        spec = FAMILIES["qwen2_5_vl"].vision_spec({}, None, video)
        assert (spec.frame_min_tokens, spec.frame_max_tokens) == (32, 100)

    def test_a_disjoint_file_budget_wins(self):
        spec = FAMILIES["qwen2_5_vl"].vision_spec({}, None, {"min_pixels": 784, "max_pixels": 8 * 784})
        assert (spec.frame_min_tokens, spec.frame_max_tokens) == (1, 8)

    def test_sampling_settings_come_from_the_video_file(self):
        spec = FAMILIES["qwen3_vl"].vision_spec({}, None, {"fps": 4, "min_frames": 8, "max_frames": 32})
        assert (spec.fps, spec.min_frames, spec.max_frames) == (4.0, 8, 32)

    def test_a_cap_on_the_tokens_of_a_frame(self):
        spec = FAMILIES["qwen3_vl"].vision_spec({}, None, {**QWEN3_VIDEO, "max_video_tokens": 20})
        assert (spec.frame_min_tokens, spec.frame_max_tokens) == (16, 20)

    def test_nested_processor_config_of_transformers_5(self):
        nested = {"image_processor": QWEN3_IMAGE, "video_processor": QWEN3_VIDEO}
        split = FAMILIES["qwen3_vl"].vision_spec({}, QWEN3_IMAGE, QWEN3_VIDEO)
        assert FAMILIES["qwen3_vl"].vision_spec({}, nested, nested) == split

    @pytest.mark.parity
    def test_files_that_transformers_writes(self, tmp_path):
        pytest.importorskip("torch")
        import json

        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        Qwen2VLImageProcessorPil(patch_size=16, min_pixels=200 * 1024, max_pixels=900 * 1024).save_pretrained(tmp_path)
        image = json.loads((tmp_path / "preprocessor_config.json").read_text())
        spec = FAMILIES["qwen3_vl"].vision_spec({}, image)
        assert (spec.image_min_tokens, spec.image_max_tokens) == (200, 900)

    def test_contradictions_are_refused(self):
        from mlxvr.errors import CheckpointError

        config = {"model_type": "qwen3_vl", "vision_config": {"patch_size": 14}}
        with pytest.raises(CheckpointError, match="disagree on patch_size"):
            family_of(config).vision_spec(config, QWEN3_IMAGE)
        with pytest.raises(CheckpointError, match="cannot be used"):
            FAMILIES["qwen3_vl"].vision_spec({}, None, {"max_frames": "many"})


class TestOverrides:
    def test_none_keeps_the_field(self):
        assert QWEN3.with_overrides(fps=None, max_frames=None) == QWEN3
        assert QWEN3.with_overrides(fps=1.0).fps == 1.0
        assert QWEN3.fps == 2.0

    @pytest.mark.parametrize(
        ("values", "says"),
        [
            ({"fps": 0}, "fps is 0"),
            ({"fps": -1.0}, "fps is -1.0"),
            ({"fps": math.nan}, "fps is nan"),
            ({"fps": "fast"}, "fps is 'fast'"),
            ({"max_frames": 0}, "max_frames is 0"),
            ({"max_frames": 1}, "max_frames is 1"),
            ({"max_frames": 2.5}, "max_frames is 2.5"),
            ({"video_tokens": -5}, "video_tokens is -5"),
            ({"frame_min_tokens": 800}, "above frame_max_tokens"),
            ({"std": (1.0, 0.0, 1.0)}, "std is"),
            ({"mean": (1.0,)}, "mean is"),
            ({"max_pixels": 5}, "unknown vision setting 'max_pixels'"),
        ],
    )
    def test_bad_values_are_one_clear_line(self, values, says):
        with pytest.raises(ConfigError) as caught:
            QWEN3.with_overrides(**values)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
