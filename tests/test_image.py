"""Still pictures: every mode and orientation comes out as upright RGB on white."""

import numpy as np
import pytest
from PIL import Image

from mlxvr.errors import ConfigError, MediaError
from mlxvr.media import VisionSpec, load_vision, read_image

SPEC = VisionSpec.from_files({"model_type": "qwen3_vl"})


def corner(height: int = 40, width: int = 60) -> np.ndarray:
    """A gray picture with a red upper left and a blue lower right corner."""
    pixels = np.full((height, width, 3), 128, dtype=np.uint8)
    pixels[:10, :10] = (255, 0, 0)
    pixels[-10:, -10:] = (0, 0, 255)
    return pixels


# EXIF orientation -> how the upright picture is stored (EXIF 2.32, tag 0x0112: where row 0 and column 0 lie)
STORED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, 1),  # shown after a turn by 90 degrees clockwise
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(np.ascontiguousarray(STORED[orientation](corner()))).save(path, exif=exif)
    assert np.array_equal(read_image(path), corner())
    with Image.open(path) as image:
        assert np.array_equal(read_image(image), corner())


class TestTransparency:
    def test_rgba_lies_on_white(self):
        pixels = np.zeros((4, 4, 4), dtype=np.uint8)
        pixels[..., 0] = 200
        pixels[0, 0, 3], pixels[0, 1, 3], pixels[0, 2, 3] = 255, 0, 51
        image = read_image(Image.fromarray(pixels))
        assert image[0, 0].tolist() == [200, 0, 0]
        assert image[0, 1].tolist() == [255, 255, 255]
        assert image[0, 2].tolist() == [244, 204, 204]  # a fifth of the colour: 200 / 5 + 255 * 4 / 5
        assert np.array_equal(read_image(pixels), image)

    def test_gray_with_alpha(self):
        assert read_image(Image.new("LA", (3, 3), (0, 0)))[1, 1].tolist() == [255, 255, 255]

    def test_palette_with_a_transparent_entry(self, tmp_path):
        image = Image.new("P", (4, 4), 1)
        image.putpalette([0, 0, 0, 10, 20, 30])
        image.putpixel((0, 0), 0)
        image.save(tmp_path / "palette.png", transparency=0)
        pixels = read_image(tmp_path / "palette.png")
        assert pixels[0, 0].tolist() == [255, 255, 255]
        assert pixels[1, 1].tolist() == [10, 20, 30]

    def test_rgb_with_a_transparent_colour(self, tmp_path):
        Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "colour.png", transparency=(1, 2, 3))
        assert np.all(read_image(tmp_path / "colour.png") == 255)


class TestModes:
    @pytest.mark.parametrize(
        ("mode", "colour", "expected"),
        [
            ("L", 77, (77, 77, 77)),
            ("1", 1, (255, 255, 255)),
            ("RGB", (1, 2, 3), (1, 2, 3)),
            ("P", 0, (0, 0, 0)),
            ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
            ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
            ("YCbCr", (128, 128, 128), (128, 128, 128)),
            ("HSV", (0, 255, 255), (255, 0, 0)),
            ("I;16", 257 * 100, (100, 100, 100)),
            ("I", 257 * 100, (100, 100, 100)),
            ("I", 100, (100, 100, 100)),
            ("F", 99.6, (100, 100, 100)),
        ],
    )
    def test_each(self, mode, colour, expected):
        pixels = read_image(Image.new(mode, (5, 3), colour))
        assert pixels.shape == (3, 5, 3)
        assert pixels.dtype == np.uint8
        assert np.all(pixels == expected)

    def test_a_png_of_16_bits(self, tmp_path):
        Image.fromarray(np.full((4, 4), 257 * 40, dtype=np.uint16)).save(tmp_path / "deep.png")
        assert np.all(read_image(tmp_path / "deep.png") == 40)

    @pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tiff", "gif"])
    def test_files(self, tmp_path, suffix):
        path = tmp_path / f"picture.{suffix}"
        Image.fromarray(corner()).save(path, **({"lossless": True} if suffix == "webp" else {}))
        assert np.array_equal(read_image(path), corner())
        assert load_vision(path, SPEC).kind == "image"

    def test_a_file_is_known_by_its_content(self, tmp_path):
        path = tmp_path / "picture.mp4"
        Image.fromarray(corner()).save(path, format="png")
        assert load_vision(path, SPEC).kind == "image"

    def test_a_moving_gif_is_a_video(self, tmp_path):
        path = tmp_path / "moving.gif"
        images = [Image.fromarray(np.full((64, 64, 3), level, dtype=np.uint8)) for level in (0, 80, 160, 240)]
        images[0].save(path, save_all=True, append_images=images[1:], duration=500)
        vision = load_vision(path, SPEC)
        assert vision.kind == "video"
        assert vision.grid[0] == 2
        assert vision.seconds == pytest.approx((0.25, 1.25))


class TestArrays:
    def test_shapes(self):
        pixels = corner()
        assert np.array_equal(read_image(pixels), pixels)
        assert np.array_equal(read_image(pixels[..., 0]), np.repeat(pixels[..., :1], 3, axis=2))
        assert np.array_equal(read_image(pixels[..., :1]), np.repeat(pixels[..., :1], 3, axis=2))

    @pytest.mark.parametrize(
        "pixels",
        [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros(4, np.uint8)],
    )
    def test_others_are_refused(self, pixels):
        with pytest.raises(MediaError, match=r"expected uint8 \(height, width, 3\)"):
            read_image(pixels)


class TestLoading:
    def test_an_image(self):
        vision = load_vision(Image.fromarray(corner(480, 640)), SPEC)
        assert vision.kind == "image"
        assert vision.grid == (1, 30, 40)
        assert vision.patches.shape == (1200, 3 * 2 * 16 * 16)
        assert vision.seconds == ()
        assert vision.token_count(2) == 300
        first, second = np.split(vision.patches.reshape(1200, 3, 2, 256), 2, axis=2)
        assert np.array_equal(first, second)  # an image is shown twice

    def test_video_options_are_refused(self):
        for options in ({"nframes": 4}, {"start": 1.0}, {"end": 2.0}):
            with pytest.raises(ConfigError, match="the source is an image"):
                load_vision(corner(), SPEC, **options)

    @pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4000), (4000, 1), (5, 1005)])
    def test_hopeless_shapes(self, height, width):
        for source in (np.zeros((height, width, 3), np.uint8), [np.zeros((height, width, 3), np.uint8)] * 4):
            with pytest.raises(MediaError) as caught:
                load_vision(source, SPEC)
            assert f"{width}x{height}" in str(caught.value)
            assert "\n" not in str(caught.value)

    def test_something_else(self):
        with pytest.raises(ConfigError, match="the source is a int"):
            load_vision(5, SPEC)


class TestBadFiles:
    def test_missing_folder_empty_and_text(self, tmp_path):
        (tmp_path / "empty.png").touch()
        (tmp_path / "text.png").write_text("no picture")
        for name, says in [
            ("none.png", "does not exist"),
            ("", "folder"),
            ("empty.png", "empty"),
            ("text.png", "not an image"),
        ]:
            with pytest.raises(MediaError) as caught:
                read_image(tmp_path / name)
            assert says in str(caught.value)
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("suffix", ["png", "jpeg", "webp", "gif"])
    def test_cut(self, tmp_path, suffix):
        path = tmp_path / f"cut.{suffix}"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(MediaError) as caught:
            load_vision(path, SPEC)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
