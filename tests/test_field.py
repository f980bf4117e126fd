"""Files and names that users of other programs stumbled over; `FIELD.md` says where each comes from.

Videos are in `test_video`, names in `test_paths`, animations in `test_animation`.
"""

import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from mlxvr.errors import ConfigError, MediaError
from mlxvr.media import load_vision, read_image
from mlxvr.model.families.base import FAMILIES
from tests import clips

SPEC = FAMILIES["qwen3_vl"].vision_spec({})


@pytest.fixture
def picture() -> Image.Image:
    """Gray, with a red upper left quarter."""
    pixels = np.full((96, 128, 3), 128, np.uint8)
    pixels[:48, :64] = (255, 0, 0)
    return Image.fromarray(pixels)


def distance(path, picture) -> int:
    """The largest difference in level to the picture, away from its edges."""
    difference = np.abs(read_image(path).astype(int) - np.asarray(picture))
    return max(int(difference[8:40, 8:56].max()), int(difference[56:88, 72:120].max()))


class TestPictures:
    def test_a_cmyk_jpeg(self, tmp_path, picture):
        """Photoshop and Pillow write the inks inverted, and a marker that says so."""
        picture.convert("CMYK").save(tmp_path / "print.jpg", quality=95)
        assert b"Adobe" in (tmp_path / "print.jpg").read_bytes()
        assert distance(tmp_path / "print.jpg", picture) <= 2

    @pytest.mark.parametrize("mode", ["L", "RGB", "P"])
    def test_a_transparent_colour(self, tmp_path, mode):
        """What no viewer shows is not shown to the model either."""
        hidden = Image.new(mode, (64, 64), 0)
        hidden.save(tmp_path / "hidden.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
        assert read_image(tmp_path / "hidden.png").min() == 255

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, when it opens a JPEG
    @pytest.mark.parametrize("exif", [b"garbage", b"Exif\0\0II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08\0\1"])
    @pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
    def test_damaged_exif_says_nothing(self, tmp_path, picture, exif, suffix):
        picture.save(tmp_path / f"photo.{suffix}", exif=b"Exif\0\0" + exif, quality=95)
        assert distance(tmp_path / f"photo.{suffix}", picture) <= 4

    def test_exif_that_cannot_be_written_again_still_turns(self, tmp_path, picture):
        """A resolution of -1/0 stands beside the orientation; Pillow's own turning fails to write it back."""
        entries = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(">HHII", 0x011A, 10, 1, 38)
        exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + entries + bytes(4) + struct.pack(">ii", -1, 0)
        picture.save(tmp_path / "photo.jpg", exif=exif)
        with Image.open(tmp_path / "photo.jpg") as image, pytest.raises(struct.error):
            ImageOps.exif_transpose(image)
        assert read_image(tmp_path / "photo.jpg").shape == (128, 96, 3)

    def test_several_pictures_in_a_jpeg(self, tmp_path, picture):
        """Phones keep depth maps and second lenses behind the photo."""
        picture.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[picture.resize((64, 48))])
        assert load_vision(tmp_path / "photo.jpg", SPEC).kind == "image"
        assert read_image(tmp_path / "photo.jpg").shape == (96, 128, 3)

    def test_a_motion_photo(self, tmp_path, picture):
        """A video is glued to a photo, which is what is asked about."""
        picture.save(tmp_path / "photo.jpg", quality=95)
        film = clips.write_clip(tmp_path / "film.mp4", frames=10)
        (tmp_path / "photo.jpg").write_bytes((tmp_path / "photo.jpg").read_bytes() + film.read_bytes())
        assert load_vision(tmp_path / "photo.jpg", SPEC).kind == "image"
        assert distance(tmp_path / "photo.jpg", picture) <= 4

    def test_bytes_between_the_pixels_and_the_end(self, tmp_path, picture):
        picture.save(tmp_path / "camera.jpg", quality=95)
        data = (tmp_path / "camera.jpg").read_bytes()
        (tmp_path / "camera.jpg").write_bytes(data[:-2] + b"\0\0tail" + data[-2:])
        assert distance(tmp_path / "camera.jpg", picture) <= 4

    @pytest.mark.parametrize("missing", [2, 30, 400])
    def test_a_jpeg_that_lacks_its_end(self, tmp_path, picture, missing):
        """What is missing would be gray, and nobody would know."""
        picture.save(tmp_path / "cut.jpg", quality=95)
        (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-missing])
        with pytest.raises(MediaError, match=r"cut\.jpg is a damaged image .*: copy or download it again"):
            read_image(tmp_path / "cut.jpg")

    @pytest.mark.parametrize("kind", ["WEBP", "PNG", "GIF", "HEIF"])
    def test_a_wrong_suffix(self, tmp_path, picture, kind):
        if kind == "HEIF":
            pytest.importorskip("pillow_heif").register_heif_opener()
        picture.save(tmp_path / "photo.jpg", format=kind, **({} if kind == "GIF" else {"quality": 95}))
        assert load_vision(tmp_path / "photo.jpg", SPEC).kind == "image"
        assert distance(tmp_path / "photo.jpg", picture) <= 4

    @pytest.mark.parametrize(("suffix", "size"), [("ico", (96, 128)), ("icns", (128, 128)), ("jp2", (96, 128))])
    def test_still_pictures_that_ffmpeg_takes_for_videos(self, tmp_path, picture, suffix, size):
        picture.resize(size[::-1]).save(tmp_path / f"icon.{suffix}")
        assert load_vision(tmp_path / f"icon.{suffix}", SPEC).kind == "image"
        assert read_image(tmp_path / f"icon.{suffix}").shape[:2] >= (48, 48)

    @pytest.mark.parametrize("size", [(257, 27), (27, 257), (10, 10), (400, 2)])
    def test_pictures_smaller_than_a_token(self, size):
        vision = load_vision(Image.new("RGB", size), SPEC)
        assert 128 <= vision.token_count(SPEC.merge_size) <= 512

    def test_a_picture_200_times_as_wide_as_high(self):
        assert load_vision(Image.new("RGB", (1000, 5)), SPEC).kind == "image"
        with pytest.raises(MediaError, match="1093x5 pixels: its sides differ by more than 200 times, crop it"):
            load_vision(Image.new("RGB", (1093, 5)), SPEC)

    def test_a_raw_photo_is_not_its_preview(self, tmp_path, picture):
        """The first picture of a DNG is a thumbnail."""
        picture.resize((64, 48)).save(tmp_path / "raw.tiff", tiffinfo={0xC612: b"\1\4\0\0"})
        (tmp_path / "raw.tiff").rename(tmp_path / "photo")  # whatever its name
        for name in ("photo", "photo.dng", "photo.NEF"):
            if name != "photo":
                picture.save(tmp_path / name, format="TIFF")
            with pytest.raises(MediaError, match="is a raw photo, of which only a small preview can be read"):
                load_vision(tmp_path / name, SPEC)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.pdf", b"%PDF-1.7\n", "is a PDF document: export the page as an image"),
        ("a.svg", b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "is an SVG drawing"),
        ("a.jxl", b"\xff\x0a" + bytes(40), "is a JPEG XL picture"),
        ("b.jxl", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "is a JPEG XL picture"),
        (
            "a.mp4",
            b"<!DOCTYPE html>\n<html><head><title>Not found</title>",
            "is a web page, not the file",
        ),
        ("a.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "run `git lfs pull`"),
        ("a.m3u8", b"#EXTM3U\n#EXTINF:1,\nhttp://example.com/a.ts\n", "is not a video: it holds text"),
        ("a.cr3", b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "is a raw photo"),
    ],
)
def test_what_is_often_taken_for_a_video_or_an_image(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError) as caught:
        load_vision(tmp_path / name, SPEC)
    assert says in str(caught.value)


def test_a_pdf_that_holds_a_photo_is_no_video(tmp_path, picture):
    """FFmpeg finds the photo's first bytes somewhere in the file."""
    picture.save(tmp_path / "scan.pdf")
    with pytest.raises(MediaError, match="is a PDF document"):
        load_vision(tmp_path / "scan.pdf", SPEC)


def test_a_video_among_the_frames(tmp_path):
    film = clips.write_clip(tmp_path / "film.mp4", frames=10)
    with pytest.raises(MediaError, match=r"film\.mp4 is not an image"):
        load_vision([str(film), str(film)], SPEC)


@pytest.mark.parametrize("source", [b"\x89PNG", {"image": "a.png"}, {"a.png"}, 5])
def test_what_is_no_source(source):
    with pytest.raises(ConfigError, match=f"the source is a {type(source).__name__}"):
        load_vision(source, SPEC)


def test_frames_with_levels_between_0_and_1():
    with pytest.raises(MediaError, match=r"is float32 .*: expected uint8"):
        load_vision(np.zeros((4, 64, 64, 3), np.float32), SPEC)
