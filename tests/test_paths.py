"""What a user writes becomes the file that is meant; what a system keeps beside files never counts."""

import ast
import json
import os
import socket
import unicodedata
from pathlib import Path

import pytest

import mlxvr
from mlxvr.checkpoint.folder import ModelFolder
from mlxvr.convert import convert
from mlxvr.data.rows import load_rows, make_locator
from mlxvr.errors import DataError, MediaError
from mlxvr.media import probe
from mlxvr.media.container import check_file
from mlxvr.storage.paths import list_all, list_frames, list_visible, local_path, natural_key, parse_location
from tests import checkpoints
from tests.clips import write_clip

PACKAGE = Path(mlxvr.__file__).parent
LISTINGS = {"glob", "iterdir", "listdir", "rglob", "scandir"}
HIDDEN = ["._00001.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.jpg", "Icon\r"]


def bare_listings(source: str) -> list[str]:
    """Calls that list a folder."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = [ast.unparse(call.func) for call in calls]
    return [name for name in names if name.split(".")[-1] in LISTINGS or name in ("os.walk", "os.fwalk", "Path.walk")]


class TestListing:
    def test_hidden_files_never_count(self, tmp_path):
        for name in ["b.jpg", "a.jpg", "notes.txt", *HIDDEN]:
            (tmp_path / name).touch()
        (tmp_path / "__MACOSX").mkdir()
        (tmp_path / "__MACOSX" / "c.jpg").touch()
        assert [path.name for path in list_visible(tmp_path)] == ["a.jpg", "b.jpg", "notes.txt"]
        assert [path.name for path in list_visible(tmp_path, "*.jpg")] == ["a.jpg", "b.jpg"]
        assert list_visible(tmp_path, "*/*.jpg") == []
        assert len(list_all(tmp_path)) == 10

    def test_a_hidden_folder_on_the_way_to_the_folder_is_fine(self, tmp_path):
        folder = tmp_path / ".cache" / "model"
        folder.mkdir(parents=True)
        (folder / "a.json").touch()
        assert [path.name for path in list_visible(folder, "*.json")] == ["a.json"]

    def test_frames_come_in_natural_order(self, tmp_path):
        for name in ["10.png", "2.png", "1.PNG", "02.png", "notes.txt", *HIDDEN]:
            (tmp_path / name).touch()
        (tmp_path / "3.png").mkdir()
        assert [path.name for path in list_frames(tmp_path)] == ["1.PNG", "02.png", "2.png", "10.png"]

    def test_natural_order_of_names(self):
        names = ["v1.10", "v1.9", "v1", "V1.2", "a", "10", "9"]
        assert sorted(names, key=natural_key) == ["9", "10", "a", "v1", "V1.2", "v1.9", "v1.10"]

    def test_no_module_lists_a_folder_by_itself(self):
        sources = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "examples").rglob("*.py")]
        found = {
            f"{path.relative_to(PACKAGE.parent)}: {call}"
            for path in sources
            if path.name != "paths.py"
            for call in bare_listings(path.read_text(encoding="utf-8"))
        }
        assert found == set()

    @pytest.mark.parametrize("line", ["p.glob('*')", "sorted(a.b.iterdir())", "os.listdir(x)", "os.walk(x)"])
    def test_what_that_catches(self, line):
        assert bare_listings(line)

    def test_a_checkpoint_on_a_foreign_drive_loads(self, tmp_path):
        checkpoints.write_checkpoint(tmp_path, "qwen3_vl")
        for path in [path for path in list_all(tmp_path) if path.is_file()]:
            (tmp_path / f"._{path.name}").write_bytes(b"\0\5\x16\7" + bytes(60))
        ModelFolder.open(tmp_path).check_shapes()
        out = tmp_path / "converted"
        out.mkdir()
        (out / ".DS_Store").touch()  # Finder has looked into the new folder: it is empty all the same
        convert(tmp_path, out, bits=4)
        assert [path.name for path in list_all(out) if path.name.startswith(".")] == []
        ModelFolder.open(out).check_shapes()


class TestLocations:
    def test_a_home_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert local_path("~/clip.mp4") == tmp_path / "clip.mp4"
        assert local_path("~nobody-of-this-name/clip.mp4") == Path("~nobody-of-this-name/clip.mp4")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "~").mkdir()
        (tmp_path / "~" / "clip.mp4").touch()
        assert local_path("~/clip.mp4") == Path("~/clip.mp4")  # that very file is there

    @pytest.mark.parametrize(
        ("url", "path"),
        [
            ("file:///Volumes/Disk/My%20Clip.mov", "/Volumes/Disk/My Clip.mov"),
            ("file://localhost/My%20Clip.mov", "/My Clip.mov"),
            ("file:/clip.mov", "/clip.mov"),
            ("FILE:///100%25.mov", "/100%.mov"),
            ("file:///caf%C3%A9%23%3f.mov", "/café#?.mov"),
        ],
    )
    def test_file_urls(self, url, path):
        assert parse_location(url) == Path(path)

    @pytest.mark.parametrize(
        "url",
        [
            "https://example.com/a.mp4",
            "http://x/y?z=1",
            "s3://bucket/key",
            "rtsp://camera:554/live",
            "hf://datasets/a/b",
        ],
    )
    @pytest.mark.parametrize("kind", [str, Path])
    def test_other_urls_are_to_be_downloaded(self, url, kind):
        with pytest.raises(MediaError) as caught:
            local_path(kind(url))
        assert str(caught.value) == f"{url} is a URL, and only local files are read: download it first"

    @pytest.mark.parametrize(
        ("location", "says"),
        [
            ("file://nas/clip.mp4", "a file of the machine 'nas'"),
            ("data:image/png;base64,iVBORw0KGgo", "is the data of a file, not a path"),
            ("", "the path is empty"),
            ("a\0b", "zero byte"),
        ],
    )
    def test_what_no_file_can_be(self, location, says):
        with pytest.raises(MediaError, match=says):
            local_path(location)

    def test_names_that_look_like_something_else(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "http:").mkdir()
        for name in [
            "04.23:50.mp4",
            "file:x.mp4",
            "-clip.mp4",
            "50%.mp4",
            "a%20b.mp4",
            "http:/x.mp4",
            " a .mp4 ",
            "🎬\n.mp4",
        ]:
            (tmp_path / name).touch()
            assert local_path(name) == Path(name)
            assert local_path(tmp_path / name) == tmp_path / name

    @pytest.mark.parametrize(("written", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
    def test_both_normal_forms_are_one_name(self, tmp_path, written, stored):
        name = "Prüfung é.mp4"
        (tmp_path / unicodedata.normalize(stored, name)).touch()
        assert local_path(tmp_path / unicodedata.normalize(written, name)).exists()

    def test_spaces_of_another_kind(self, tmp_path):
        """macOS writes a narrow one before PM, in Czech a fixed one; pasting makes them plain."""
        stored = tmp_path / "Screenshot at 3.05.12\u202fPM.png"
        stored.touch()
        asked = tmp_path / "Screenshot at 3.05.12 PM.png"
        assert local_path(asked) == stored
        (tmp_path / "Screenshot at\u00a03.05.12 PM.png").touch()
        assert local_path(asked) == asked  # two are alike: none is chosen
        asked.touch()
        assert local_path(asked) == asked

    @pytest.mark.parametrize("name", ["04.23:50.mp4", "pipe:0.mp4", "concat:a.mp4", "a%03d.mp4", b"caf\xe9.mp4", "-"])
    def test_ffmpeg_opens_them_too(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        write_clip(tmp_path / "clip.mp4", frames=6).rename(os.fsdecode(name))
        assert probe(os.fsdecode(name)).frames == 6

    def test_a_name_that_is_not_utf8(self, tmp_path):
        raw = os.fsencode(tmp_path) + b"/caf\xe9.mp4"
        Path(os.fsdecode(raw)).touch()
        assert local_path(os.fsdecode(raw)).exists()


class TestMissing:
    def check(self, path: Path, *says: str) -> None:
        with pytest.raises(MediaError) as caught:
            check_file(path)
        for part in says:
            assert part in str(caught.value)

    def test_hints(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "My Clip.mov").touch()
        self.check(Path("'My Clip.mov'"), "leave them out", "quotes")
        self.check(Path("My\\ Clip.mov"), "leave them out", "backslashes")
        self.check(Path("my clip.MOV"), "is 'My Clip.mov' meant")
        self.check(Path("My Clip.mov "), "is 'My Clip.mov' meant")
        self.check(Path("none.mp4"), "does not exist: check the path")
        (tmp_path / "Screenshot at 3.05.12\u202fPM.png").touch()  # macOS writes a narrow space there
        self.check(Path("Screenshot at 3.05.12 PM.png"), "is 'Screenshot at 3.05.12\\u202fPM.png' meant")

    def test_a_file_that_is_in_icloud(self, tmp_path):
        (tmp_path / ".clip.mp4.icloud").write_bytes(b"bplist00")
        self.check(tmp_path / "clip.mp4", "is in iCloud and has not been downloaded")

    def test_links(self, tmp_path):
        (tmp_path / "broken").symlink_to("nowhere.mp4")
        self.check(tmp_path / "broken", "is a link to nowhere.mp4, which does not exist")
        (tmp_path / "loop").symlink_to("loop")
        self.check(tmp_path / "loop", "cannot be looked up")
        (tmp_path / "clip.mp4").write_bytes(b"content")
        (tmp_path / "good").symlink_to("clip.mp4")
        check_file(tmp_path / "good")

    def test_what_is_no_file(self, tmp_path, monkeypatch):
        os.mkfifo(tmp_path / "pipe")
        self.check(tmp_path / "pipe", "is not a regular file")
        self.check(Path("/dev/null"), "is not a regular file")
        self.check(tmp_path, "is a folder")
        with socket.socket(socket.AF_UNIX) as server:
            monkeypatch.chdir(tmp_path)  # a socket's name must be short
            server.bind("socket")
            self.check(tmp_path / "socket", "is not a regular file")
        (tmp_path / "clip.mp4").write_bytes(b"content")
        self.check(tmp_path / "clip.mp4" / "inside", "does not exist")

    def test_a_name_that_is_too_long(self, tmp_path):
        self.check(tmp_path / ("iVBORw0KGgo" * 400), "cannot be looked up", "check the path")

    def test_what_macos_keeps_beside_a_file(self, tmp_path):
        (tmp_path / "._clip.mp4").write_bytes(b"\0\5\x16\7" + bytes(100))
        self.check(tmp_path / "._clip.mp4", "give the file without `._`")

    def test_a_file_that_cannot_be_read(self, tmp_path, monkeypatch):
        path = tmp_path / "clip.mp4"
        path.write_bytes(b"content")

        def refuse(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(Path, "open", refuse)
        self.check(path, "may not be read", "Privacy & Security")


class TestRows:
    """Rows of a dataset name files by the same rules, within the borders that they have."""

    def row(self, tmp_path: Path, video: str) -> Path | None:
        (tmp_path / "rows.jsonl").write_text(
            f'{{"id": "a", "video": {json.dumps(video)}, "question": "What?", "answer": "x"}}\n', encoding="utf-8"
        )
        return load_rows(tmp_path / "rows.jsonl")[0].video

    def test_a_name_in_the_other_form(self, tmp_path):
        stored = tmp_path / unicodedata.normalize("NFD", "é.mp4")
        stored.touch()
        assert self.row(tmp_path, unicodedata.normalize("NFC", "é.mp4")) == stored

    def test_a_colon(self, tmp_path):
        assert self.row(tmp_path, "04.23:50.mp4") == tmp_path / "04.23:50.mp4"

    @pytest.mark.parametrize("name", [unicodedata.normalize("NFD", "é.mp4"), "a\u202fb.mp4"])
    def test_another_spelling_is_no_way_out_of_the_folder(self, tmp_path, name):
        inner = tmp_path / "inner"
        inner.mkdir()
        (tmp_path / "secret.mp4").touch()
        (inner / name).symlink_to(tmp_path / "secret.mp4")
        with pytest.raises(DataError, match="leaves the folder of the file"):
            make_locator(inner, None)(unicodedata.normalize("NFC", name).replace("\u202f", " "))

    @pytest.mark.parametrize("url", ["https://example.com/a.mp4", "data:video/mp4;base64,AAAA"])
    def test_urls(self, tmp_path, url):
        with pytest.raises(DataError, match=r"rows\.jsonl:1: .*(download it first|not a path)"):
            self.row(tmp_path, url)

    def test_urls_and_homes_stay_within_the_media_root(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path / "me"))
        locate = make_locator(tmp_path, tmp_path)
        assert locate(f"file://{tmp_path}/My%20Clip.mov") == tmp_path / "My Clip.mov"
        assert locate("~/clip.mp4") == tmp_path / "me" / "clip.mp4"
        with pytest.raises(DataError, match="leaves the media root"):
            locate("file:///etc/passwd")
        for text in ("file:///etc/passwd", "~/clip.mp4"):
            with pytest.raises(DataError, match="is an absolute path"):
                make_locator(tmp_path, None)(text)

    def test_a_folder_without_a_rate(self, tmp_path):
        """Its times would be those of frames that were sampled as the checkpoint samples them."""
        (tmp_path / "frames").mkdir()
        self.row(tmp_path, "frames")
        with pytest.raises(DataError, match=r"frames is a folder: give the rate of its frames as 'frames_fps'"):
            load_rows(tmp_path / "rows.jsonl")[0].source()

    def test_frames_of_a_folder(self, tmp_path):
        folder = tmp_path / "frames"
        folder.mkdir()
        for name in ["10.jpg", "9.jpg", "._9.jpg", ".DS_Store"]:
            (folder / name).touch()
        (tmp_path / "rows.jsonl").write_text(
            '{"id": "a", "video": "frames", "frames_fps": 3, "question": "What?", "answer": "x"}\n', encoding="utf-8"
        )
        assert load_rows(tmp_path / "rows.jsonl")[0].source() == [folder / "9.jpg", folder / "10.jpg"]
