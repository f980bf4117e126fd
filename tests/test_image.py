"""Still pictures: every mode and orientation comes out as upright RGB on white."""

import sys

import av
import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError, features

from mlxvr.errors import ConfigError, MediaError
from mlxvr.media import load_vision, read_image
from mlxvr.media.frame_options import FrameSelection
from mlxvr.model.families.base import FAMILIES

SPEC = FAMILIES["qwen3_vl"].vision_spec({})


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


class TestPhones:
    """HEIC and AVIF, as phones write their photos."""

    @pytest.fixture
    def heif(self):
        heif = pytest.importorskip("pillow_heif")
        heif.register_heif_opener()  # so that Pillow writes them; reading does not need it
        return heif

    @pytest.mark.parametrize("orientation", STORED)
    @pytest.mark.parametrize("suffix", ["heic", "avif"])
    def test_orientation(self, tmp_path, heif, suffix, orientation):
        """Both formats turn by boxes of their own (irot and imir), whatever their EXIF data says besides."""
        if suffix == "avif" and not features.check("avif"):
            pytest.skip("this Pillow reads no AVIF")
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"photo.{suffix}"
        stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](corner(160, 240))))
        stored.save(path, exif=exif.tobytes(), quality=95)
        assert (b"irot" in path.read_bytes() or b"imir" in path.read_bytes()) == (orientation != 1)
        assert np.abs(read_image(path).astype(int) - corner(160, 240))[12:-12, 12:-12].max() < 8
        assert np.abs(read_image(path)[2:8, 2:8].astype(int) - (255, 0, 0)).max() < 12
        assert load_vision(path, SPEC).grid == load_vision(corner(160, 240), SPEC).grid

    def test_tiles(self, tmp_path, heif):
        """A phone cuts its photos into tiles, which FFmpeg would give one by one."""
        pixels = np.asarray(Image.linear_gradient("L").resize((500, 300)).convert("RGB"))
        heif.from_pillow(Image.fromarray(pixels)).save(tmp_path / "photo.heic", tile_size=128, quality=95)
        with av.open(str(tmp_path / "photo.heic")) as container:
            if len(container.streams.video) == 1:
                pytest.skip("this pillow-heif writes no tiles")
            assert len(container.streams.video) == 12
        assert np.abs(read_image(tmp_path / "photo.heic").astype(int) - pixels).max() <= 4

    def test_10_bits(self, tmp_path, heif):
        """What is shown are the upper 8 of the 10 bits, within a level."""
        deep = np.linspace(0, 65535, 64 * 96 * 3).reshape(64, 96, 3).astype(np.uint16)
        heif.from_bytes(mode="RGB;16", size=(96, 64), data=deep.tobytes()).save(tmp_path / "deep.heic", quality=-1)
        assert np.abs(read_image(tmp_path / "deep.heic") - deep / 257).max() <= 1.5

    def test_the_primary_picture_of_several(self, tmp_path, heif):
        several = heif.from_pillow(Image.fromarray(corner()))
        several.add_from_pillow(Image.new("RGB", (64, 80), (0, 255, 0)))
        several.save(tmp_path / "burst.heic", primary_index=1)
        vision = load_vision(tmp_path / "burst.heic", SPEC)
        assert vision.kind == "image"
        assert read_image(tmp_path / "burst.heic").shape == (80, 64, 3)

    def test_transparency(self, tmp_path, heif):
        heif.from_pillow(Image.new("RGBA", (64, 64), (0, 0, 0, 0))).save(tmp_path / "clear.heic")
        assert read_image(tmp_path / "clear.heic").min() >= 253

    def test_a_damaged_one(self, tmp_path, heif):
        path = tmp_path / "cut.heic"
        heif.from_pillow(Image.fromarray(corner(300, 400))).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(MediaError) as caught:
            load_vision(path, SPEC)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_without_the_package(self, tmp_path, heif, monkeypatch):
        heif.from_pillow(Image.fromarray(corner())).save(tmp_path / "photo.heic")
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(MediaError, match="pip install pillow-heif"):
            load_vision(tmp_path / "photo.heic", SPEC)

    def test_a_pillow_that_cannot_read_it(self, tmp_path, monkeypatch):
        (tmp_path / "photo.avif").write_bytes(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(100))
        monkeypatch.setattr(Image, "open", lambda _: (_ for _ in ()).throw(UnidentifiedImageError()))
        with pytest.raises(MediaError, match="pip install -U pillow"):
            read_image(tmp_path / "photo.avif")


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
        for options in ({"frames": 4}, {"start": 1.0}, {"end": 2.0}):
            with pytest.raises(ConfigError, match="the source is an image"):
                load_vision(corner(), SPEC, FrameSelection(**options))

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
